"""The wire: tier 1 of the data plane, threads that move calls without Python (design section 5).

``Wire`` starts and stops the threads, tells them what to go by, and reads what they counted. What
they do is in ``_wire.pyx`` and its parts; docs/wire.md explains it.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from mm.wire._wire import TlsContext, Worker
from mm.wire.addresses import Target
from mm.wire.client_limits import ClientLimits, client_of
from mm.wire.statistics import WireStatistics as WireStatistics

if TYPE_CHECKING:
    from mm.table import Table

#: Time for a thread to end its turn.
_JOIN_TIMEOUT_S = 5.0


class Role(enum.IntEnum):
    """Who calls on a listener."""

    EXTERNAL = 0
    PEER = 1


class MethodFlag(enum.IntFlag):
    """What is special about a method."""

    #: The mesh's own: tier 2 serves it; if it names a model, perhaps not.
    OWN = 1
    OWN_UNLESS_ID = 2
    #: The data-plane configuration does not list it.
    DENIED = 4
    #: The id in its message is a vmodel's.
    EXTRACTS_VMODEL = 8
    #: The runtime does not allow it.
    REFUSED_HERE = 16
    #: Somebody wants to see its calls, of ``WireSettings.observed_models``.
    OBSERVED = 32


_NOTHING: Final = MethodFlag(0)


#: What a call needs unless the mesh itself serves it (``mm.core.access.Role.INFER``).
_INFER: Final = 2


@dataclass(frozen=True, slots=True)
class Method:
    """How to treat the calls of a method."""

    flags: MethodFlag = _NOTHING
    #: Field numbers to the place of the id in its messages, for the runtime; and in its first one,
    #: from the client.
    injection_path: tuple[int, ...] = ()
    extraction_path: tuple[int, ...] = ()
    #: Of the mesh's own: the ``mm.core.access.Role`` of who may call it.
    needs: int = _INFER


@dataclass(frozen=True, slots=True)
class WireIdentity:
    """Somebody who may call."""

    name: bytes
    #: By what a call needs: why it is refused; empty: it is not.
    refusals: tuple[bytes, ...]
    #: SHA-256 of tokens, and names in certificates with their kind before them.
    known_by: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WireAccess:
    """Who may do what (``mm.core.access``)."""

    identities: tuple[WireIdentity, ...]
    #: Why nobody is known by what a call shows, in the order of ``_wire_access.pxd``.
    unknown: tuple[bytes, ...]
    #: Runtimes get tokens, too.
    passes_tokens: bool


@dataclass(frozen=True, slots=True)
class WireTls:
    """How each kind of connection speaks TLS; None: it speaks plain text."""

    clients: TlsContext | None = None
    peers: TlsContext | None = None
    to_peers: TlsContext | None = None
    #: From a connection to the end of its handshake.
    handshake_ms: int = 10_000


@dataclass(frozen=True, slots=True)
class WireSettings:
    """What the threads go by; replaced as a whole."""

    #: None: not there yet, and everything is tier 2's.
    table: Table | None = None
    #: By path.
    methods: Mapping[bytes, Method] = field(default_factory=dict)
    #: Any that is not among them.
    others: Method = field(default_factory=Method)
    header_bytes_max: int = 8192
    message_bytes_max: int = 16 * 2**20
    kept_bytes_max: int = 2**20
    #: Of a thread: answers that wait for their readers, a window (256 KiB) of each at most. Room
    #: for a thousand that read nothing; beyond, those go that took nothing for the longest.
    answer_bytes_max: int = 256 * 2**20
    #: Calls that wait in a thread while a connection to one place is made.
    waiting_max: int = 10_000
    #: Of a thread: what all calls take, with their requests; of that, requests that were sent and
    #: are kept to be sent again.
    held_bytes_max: int = 128 * 2**20
    buffer_bytes_max: int = 512 * 2**20
    external_streams_max: int = 1000
    peer_streams_max: int = 20_000
    clients: ClientLimits = field(default_factory=ClientLimits)
    #: Of all threads, as those of clients are.
    peer_connections_max: int = 10_000
    #: A connection to an instance, and to the runtime all but one, is closed after so long without
    #: calls: as long as tier 2 keeps its own.
    upstream_idle_ms: int = 300_000
    #: The runtime says nothing for so long though it has calls: it is asked for a sign of life, and
    #: what is under way on the connection is given up so long after that. As tier 2 does it
    #: (``SERVING_LIMITS``).
    quiet_ms: int = 60_000
    quiet_answer_ms: int = 240_000
    #: Calls for copies here are tier 2's: it logs each.
    leaves_here: bool = False
    #: Copies take few calls at a time: a thread takes a slot that is free, and tier 2 has a line.
    has_slots: bool = False
    #: Models whose calls tier 2 shows to observers, where the method is observed; None: all.
    observed_models: frozenset[bytes] | None = frozenset()
    #: Our instance id as ``mm-hop-from`` has it.
    instance: bytes = b""
    #: None: anybody may do anything.
    access: WireAccess | None = None
    tls: WireTls = WireTls()


@dataclass(frozen=True, slots=True)
class Measures:
    """How calls are measured: bounds of the buckets, the last of which has none."""

    bounds_us: tuple[int, ...]
    bounds_bytes: tuple[int, ...]
    #: By model as well, for so many rows of a thread, of which those go that were not used the
    #: longest; 0: not by model.
    models_max: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """How many values fell into each bucket, and what they came to there."""

    counts: list[int]
    sums: list[int]


@dataclass(frozen=True, slots=True)
class CallNumbers:
    """What calls of a method came to that ended with a status and that the wire served, in the
    series of ``mm.core.call_meter.CallSeries``.
    """

    #: Empty: all those that there is no place for.
    path: str
    status: int
    #: Empty without models.
    model_id: str
    vmodel_id: str
    invoked_us: Measured
    answered_us: Measured
    request_bytes: Measured
    response_bytes: Measured


@dataclass(frozen=True, slots=True)
class PeerCalls:
    """The calls of one peer for one model here, since one looked last."""

    sender: str
    model_id: str
    #: Calls in flight, as the last reply told; None: there was none.
    told: int | None
    #: Mean time to a reply.
    service_s: float | None


class Wire:
    """The threads of the wire, from ``start`` to ``close``.

    ``new_tier2`` is called, by ``listen`` and ``mend``, with a role and whether the connection is
    for the mesh's own services; it answers a connected socket that tier 2 serves.
    """

    def __init__(
        self,
        threads_count: int,
        new_tier2: Callable[[Role, bool], socket.socket],
        measures: Measures | None = None,
    ) -> None:
        #: Readable when ``mend`` should be called.
        self.notice_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_open = True
        self._workers = [Worker(self.notice_fd, measures)]
        while len(self._workers) < threads_count:
            self._workers.append(Worker(self.notice_fd, measures, self._workers[0]))
        self._threads: list[threading.Thread] = []
        self._listeners: list[socket.socket] = []
        self._new_tier2 = new_tier2

    def start(self, settings: WireSettings) -> None:
        """Let the threads run; without a listener nobody calls yet."""
        self.configure(settings)
        for number, worker in enumerate(self._workers):
            thread = threading.Thread(target=worker.run, name=f"wire-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def listen(self, listener: socket.socket, role: Role) -> None:
        """Accept connections on a socket that listens; it is closed with the wire."""
        listener.setblocking(False)
        self._listeners.append(listener)
        for worker in self._workers:
            for own in (False, True):
                self._connect_tier2(worker, role, own)
            worker.listen(os.dup(listener.fileno()), role)

    def configure(self, settings: WireSettings) -> None:
        """Go by these settings: calls that come from now on."""
        for worker in self._workers:
            worker.configure(settings)

    def set_runtime(self, target: Target) -> None:
        """Say where the runtime is."""
        for worker in self._workers:
            worker.set_runtime(target)

    def set_peers(self, targets: Iterable[Target]) -> None:
        """Say which instances can be called: all of them."""
        targets = list(targets)
        for worker in self._workers:
            worker.set_peers(targets)

    def mend(self) -> None:
        """Make the connections to tier 2 anew that are gone."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.notice_fd)
        for worker in self._workers:
            for role, own in worker.take_missing():
                self._connect_tier2(worker, Role(role), own)

    def take_reports(self) -> list[PeerCalls]:
        """Answer what peers called here since the last time; ``notice_fd`` says when there is
        something.
        """
        return [
            PeerCalls(
                # A peer's header, and so anything.
                unquote(sender.decode("ascii", "replace")),
                model_id.decode(),
                None if told < 0 else told,
                service_ns / answers / 1e9 if answers else None,
            )
            for worker in self._workers
            for sender, model_id, _, answers, told, service_ns in worker.take_reports()
        ]

    def take_failures(self) -> list[list[tuple[bytes, bytes]]]:
        """Answer what attempts came to whose calls cannot be sent again, since the last time;
        ``notice_fd`` says when there is something. Each in the headers that tell of an attempt
        (``mm.edge.wire_words``).
        """
        return [each for worker in self._workers for each in worker.take_failures()]

    def take_tls_failure(self) -> tuple[Role, str] | None:
        """Answer why a handshake with a client or peer failed since the last time, if one did."""
        found = None
        for worker in self._workers:
            role_and_why = worker.take_tls_failure()
            if role_and_why is not None:
                found = Role(role_and_why[0]), role_and_why[1]
        return found

    def take_crowded_address(self) -> str:
        """Answer which address had too many connections since the last time; "" if none had."""
        found = self._workers[0].take_crowded_address()
        if not found:
            return ""
        return client_of(found)

    def take_flood(self) -> tuple[str, str] | None:
        """Answer which client was cut off since the last time, and what it sent too much of."""
        for worker in self._workers:
            found = worker.take_flood()
            if found is not None:
                return client_of(found[0]), found[1]
        return None

    def _connect_tier2(self, worker: Worker, role: Role, own: bool) -> None:
        sock = self._new_tier2(role, own)
        sock.setblocking(False)
        worker.set_tier2(sock.detach(), role, own)

    def drain(self) -> None:
        """Accept no more, and tell clients and peers to call elsewhere; what runs goes on."""
        for worker in self._workers:
            worker.drain()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def end_calls(self) -> None:
        """Give up the calls that the threads serve themselves, with a status; tier 2 has the rest.

        Clients hear of it as soon as they read; until ``close`` there is time for that.
        """
        for worker in self._workers:
            worker.end_calls()

    def close(self) -> None:
        """End the threads, and whatever calls are left with them. Twice is as good as once."""
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT_S)
        is_open, self._is_open = self._is_open, False
        if is_open and not any(thread.is_alive() for thread in self._threads):
            os.close(self.notice_fd)
        self._threads.clear()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def statistics(self) -> WireStatistics:
        """Answer what was counted, all threads together."""
        each = [worker.counts() for worker in self._workers]
        return WireStatistics(*(sum(values) for values in zip(*each, strict=True)))

    def calls(self) -> Iterator[CallNumbers]:
        """Answer what calls came to, each thread by itself; nothing without ``measures``."""
        for worker in self._workers:
            for path, status, model_id, vmodel_id, *numbers in worker.calls():
                yield CallNumbers(
                    path.decode("ascii", "replace"),
                    status,
                    model_id.decode("utf-8", "replace"),
                    vmodel_id.decode("utf-8", "replace"),
                    *map(Measured, numbers[::2], numbers[1::2]),
                )

    def peer_traffic(self, handles: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Answer the calls under way to each instance, and the answers that came since the start.

        Numbers go by the handle's index: of an instance that took another's place they begin with
        those of the other.
        """
        handles = list(handles)
        each = [worker.peer_traffic(handles) for worker in self._workers]
        return {
            handle: (sum(one[0] for one in of_it), sum(one[1] for one in of_it))
            for handle, of_it in zip(handles, zip(*each, strict=True), strict=True)
        }
