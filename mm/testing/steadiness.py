"""Copies by load in simulated runs: they do not come and go again and again.

Owns which runs have them, and a last part of few: after the faults, under even load, the number of
copies of a model falls to what is needed, or rises to it, and stays. That takes longer than a copy
too many is held, so there is little traffic, and a copy bears little in these runs. (That nothing
is given up before its time is held in all of them: ``invariants``.)
"""

from __future__ import annotations

from typing import Final

import anyio

from mm.core.ids import ModelId
from mm.scaling_settings import ScalingSettings
from mm.testing.invariants import InvariantError
from mm.testing.simulated_cluster import SimulatedCluster
from mm.testing.workload import Workload

#: In one of so many runs copies follow load all the time, one of so many has the last part.
LOAD_EVERY: Final = 4
STEADY_EVERY: Final = 48
#: A copy bears a call in 2.5 s, and demand is looked at less often than usual, because each look
#: takes time and virtual time has many. A copy too many is held for ten minutes.
LIMITS: Final = {
    "scaling": ScalingSettings(rpm_threshold=24),
    "demand_interval_s": 2.0,
    "scaledown_settled_s": 300.0,
    "scaledown_gap_s": 20.0,
}
CALL_GAP_S: Final = 1.0
#: Each so many calls one of another model, so that memory is scarce.
OTHERS_EVERY: Final = 5
#: What the faults left may be too few; from then on there are enough.
BEGIN_S: Final = 60.0
STEADY_S: Final = 840.0
LOOK_S: Final = 1.0


def follows_load(seed: int) -> bool:
    """Answer whether a run has copies by load."""
    return seed % LOAD_EVERY == 1


def is_steady(seed: int) -> bool:
    """Answer whether a run has the last part."""
    return seed % STEADY_EVERY == 1


class Steadiness:
    """The last part of some runs."""

    def __init__(self, cluster: SimulatedCluster, workload: Workload, models: list[str]) -> None:
        self._cluster = cluster
        self._workload = workload
        # One that is dear to load: what loads in no time may well make way for others.
        chosen = max(models, key=lambda each: cluster.times_s(each)[0])
        self._model_id = ModelId(chosen)
        self._others = [each for each in models if each != chosen]
        #: Copies, each time that there was another number of them.
        self.history: list[int] = []

    async def run(self) -> None:
        """Call evenly; raise ``InvariantError`` if the number of copies turns."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch)
            serving = self._cluster.serving
            for number in range(round((BEGIN_S + STEADY_S) / CALL_GAP_S)):
                entry = serving[number % len(serving)]
                group.start_soon(self._workload.call, entry, self._model_id)
                if number % OTHERS_EVERY == 0:
                    other = self._others[number // OTHERS_EVERY % len(self._others)]
                    group.start_soon(self._workload.call, entry, other)
                await anyio.sleep(CALL_GAP_S)
            group.cancel_scope.cancel()
        if turns(self.history):
            raise InvariantError(
                self._cluster.log,
                "copies do not come and go under even load",
                f"{self._model_id} was called each {CALL_GAP_S:g} s and had {self.history} copies",
                models=[self._model_id],
            )

    async def _watch(self) -> None:
        await anyio.sleep(BEGIN_S)
        while True:
            record = self._cluster.record(self._model_id)
            count = 0 if record is None else len(record.copies)
            if self.history[-1:] != [count]:
                self.history.append(count)
            await anyio.sleep(LOOK_S)


def turns(counts: list[int]) -> int:
    """Answer how often counts, each other than the one before, rise after they fell or fall after
    they rose.
    """
    triples = zip(counts, counts[1:], counts[2:], strict=False)
    return sum((b > a) != (c > b) for a, b, c in triples)
