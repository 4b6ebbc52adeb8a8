"""What the instances say of themselves, polled from their peer ports.

Counters of a process start at nought when it is started again; here they go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import anyio
from grpclib.client import Channel
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from mm.core.ids import UNIT_BYTES
from mm.demo.cluster import HOST, Instance
from mm.demo.lost_connections import told_as_errors
from mm.pb.mm.peer import InstanceStatistics, PeerStub

POLL_S: Final = 0.5
_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Counts:
    """Counters, summed over all processes that an instance has been."""

    loads: int = 0
    load_failures: int = 0
    evictions: int = 0
    calls: int = 0
    hits: int = 0
    misses: int = 0
    forwards: int = 0
    calls_by_wire: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Reading:
    """One instance as it was last seen. ``is_up`` is False while it does not answer."""

    name: str
    is_up: bool = False
    models_loaded: int = 0
    models_loading: int = 0
    capacity_bytes: int = 0
    used_bytes: int = 0
    calls_per_s: float = 0.0
    counts: Counts = Counts()

    @property
    def free_bytes(self) -> int:
        """What models could still take."""
        return max(0, self.capacity_bytes - self.used_bytes)


@dataclass(slots=True)
class InstanceHistory:
    """Folds what one instance answers into readings."""

    name: str
    reading: Reading
    _before: Counts = Counts()
    _current: Counts = Counts()
    _uptime_ms: int = 0
    _seen_s: float = 0.0

    def fold(self, answer: InstanceStatistics, now_s: float) -> None:
        """Take an answer; a shorter uptime than before means another process."""
        if answer.uptime_ms < self._uptime_ms:
            self._before += self._current
            self._current = Counts()
        counts = Counts(*(getattr(answer, f.name) for f in fields(Counts)))
        elapsed_s = now_s - self._seen_s
        calls = counts.calls - self._current.calls
        self.reading = Reading(
            name=self.name,
            is_up=True,
            models_loaded=answer.models_loaded,
            models_loading=answer.models_loading,
            capacity_bytes=answer.capacity_units * UNIT_BYTES,
            used_bytes=answer.used_units * UNIT_BYTES,
            calls_per_s=calls / elapsed_s if self._seen_s and elapsed_s > 0 else 0.0,
            counts=self._before + counts,
        )
        self._current, self._uptime_ms, self._seen_s = counts, answer.uptime_ms, now_s

    def lose(self) -> None:
        """The instance does not answer: it holds nothing that anybody could use."""
        self.reading = replace(
            self.reading,
            is_up=False,
            models_loaded=0,
            models_loading=0,
            used_bytes=0,
            calls_per_s=0.0,
        )


class Statistics:
    """Polls all instances until cancelled."""

    def __init__(self, instances: Sequence[Instance]) -> None:
        self._instances = tuple(instances)
        #: One poll at a time: an answer that another overtook would look like a new process.
        self._polling = anyio.Lock()
        self._histories = {
            instance.name: InstanceHistory(instance.name, Reading(instance.name))
            for instance in instances
        }

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The newest reading of each instance."""
        return tuple(history.reading for history in self._histories.values())

    @property
    def total(self) -> Counts:
        """All counters of all instances."""
        return total(self.readings)

    async def run(self) -> None:
        """Poll for ever."""
        while True:
            await self.poll()
            await anyio.sleep(POLL_S)

    async def poll(self) -> None:
        """Ask every instance once."""
        async with self._polling, anyio.create_task_group() as askers:
            for instance in self._instances:
                askers.start_soon(self._ask, instance)

    async def _ask(self, instance: Instance) -> None:
        history = self._histories[instance.name]
        channel = Channel(HOST, instance.peer_port)
        try:
            with told_as_errors():
                answer = await PeerStub(channel).statistics(timeout=_TIMEOUT_S)
        except (OSError, GRPCError, StreamTerminatedError, ProtocolError):
            history.lose()
        else:
            history.fold(answer, anyio.current_time())
        finally:
            channel.close()


def total(readings: Iterable[Reading]) -> Counts:
    """Answer the sums of all counters."""
    return sum((reading.counts for reading in readings), Counts())


def hit_ratio(counts: Counts) -> float:
    """Answer the share of clients' calls that found a loaded copy; 0 before the first."""
    asked = counts.hits + counts.misses
    return counts.hits / asked if asked else 0.0


def wire_ratio(counts: Counts) -> float:
    """Answer the share of calls, to runtimes and between instances, that the wire carried."""
    attempts = counts.calls + counts.forwards
    return counts.calls_by_wire / attempts if attempts else 0.0
