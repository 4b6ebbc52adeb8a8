"""What must hold in a simulated cluster at every moment, whatever goes wrong.

Owns the statements, and the excuses that they admit. What must hold once everything is well again
is ``convergence``'s.

1. *No call fails that a live ready copy could serve.* A copy could serve a call if, from the call's
   begin to its failure: it was ready, its runtime had the model, its instance served and was not
   told to stop, the instance that the client called knew of both from the store, and nothing was
   lost or swallowed on the wires between the two. The only excuses beside that: the client went
   away, the instance called crashed or was told to stop, or the model was unregistered meanwhile.
2. *No registered model is called unknown*, unless it was registered or unregistered meanwhile, or
   less than a second before: so long "there is none" stands where it was asked for (``look_ups``).
   A model that is lost again and again is no exception but in this: the runtime's own NOT_FOUND may
   reach the client (and excuses from 1, for it is an answer) if the instance beside it found other
   loads of the model lost twice in the 60 s before, or once and this one has not answered a call
   since (decision 8; ``losses``).
3. *Capacity is never exceeded*: all that a runtime holds, what it is unloading included, fits into
   its memory; a model larger than the mesh could know before it was loaded excuses the difference.
4. *No load is started twice* on an instance, no model is unloaded twice at a time or under calls,
   and no more load at a time than the runtime allows.
5. *Nothing is stuck*: each phase of a copy that is not final, each unload, and each call ends in
   bounded time.
6. *The books balance*: table, accounting and phases are in step (``check_invariants``).

7. *No view goes back*: what an instance knows of a model is never older than what it knew.
8. *No pinned copy is evicted* as long as the instance has all of its memory; and what is pinned is
   no more than may be. (That copies which policies ask for are there is ``convergence``'s.)
9. *Nothing is given up before its time*: no copy goes as one too many within five minutes of the
   last one that was made (half an hour in production), so none goes before. (That under even load
   none comes and goes is ``steadiness``'s.)

3 and 4 are looked at by the runtimes at each change; 1 and 2 at each failure of a call; 5 to 9
each second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import anyio

from mm.core.ids import ModelId
from mm.errors import MeshError, StatusCode
from mm.mesh.local_copy import Phase
from mm.mesh.look_ups import ANSWER_S
from mm.testing.event_log import EventLog
from mm.testing.fake_runtime import Held
from mm.testing.instance import Instance, RuntimeAnswerError
from mm.testing.simulated_cluster import SimulatedCluster

#: How long a copy may stay in a phase. With the limits of a simulated run (``simulator``) a load
#: waits 40 s at most for its place, for an earlier unload and for memory, and 10 s for the runtime;
#: a turn waits for those before it. The rest is for a store that answers slowly or not at all.
PHASE_S_MAX: Final = {
    Phase.NEW: 120.0,
    Phase.QUEUED: 400.0,
    Phase.WAITING: 60.0,
    Phase.LOADING: 60.0,
    Phase.SIZING: 60.0,
}
#: Calls in flight hold an unload back for 127.5 s, an outage of the runtime for its own time.
UNLOAD_S_MAX: Final = 300.0
#: So long nothing is given up; clocks step meanwhile, by ten seconds either way.
HELD_S: Final = 240.0
#: More than all that a call may wait for: five load time limits, and one try after another.
CALL_S_MAX: Final = 8 * 5 * 10.0


class InvariantError(Exception):
    """Something that must hold does not. Names whose events tell how it came to that.

    The log ends with it.
    """

    def __init__(
        self,
        log: EventLog,
        invariant: str,
        text: str,
        *,
        instances: Iterable[str] = (),
        models: Iterable[str] = (),
    ) -> None:
        super().__init__(f"{invariant}: {text}")
        log.close()
        self.instances = frozenset(instances)
        self.models = frozenset(models)


@dataclass(frozen=True, slots=True)
class _Witness:
    """A copy that can serve calls that come by an instance; equal as long as it could all along."""

    instance: Instance
    load_id: int
    losses: int
    disturbances: int


class CallWatch:
    """What one call could count on when it began."""

    def __init__(self, cluster: SimulatedCluster, entry: Instance, model_id: str) -> None:
        self._cluster = cluster
        self._entry = entry
        self._model_id = ModelId(model_id)
        self._registration = _registration(cluster, model_id)
        self._begun_s = anyio.current_time()
        self._witnesses = set(_witnesses(cluster, entry, self._model_id))

    def failed(self, error: MeshError) -> None:
        """Raise ``InvariantError`` if the call should not have failed."""
        entry, model_id = self._entry, self._model_id
        is_excused = not entry.is_serving or self._registration != _registration(
            self._cluster, model_id
        )
        if is_excused or (isinstance(error, RuntimeAnswerError) and error.is_own_word):
            return
        told = f"a call for {model_id} by {entry.name}, begun at {self._begun_s:.3f}, failed with"
        told += f" {error.code.name} ({error.message})"
        is_old = self._begun_s - self._cluster.registered_s(model_id) > ANSWER_S
        if error.code is StatusCode.NOT_FOUND and self._registration and is_old:
            raise InvariantError(
                self._cluster.log,
                "no registered model is called unknown",
                told,
                instances=[entry.name],
                models=[model_id],
            )
        for witness in _witnesses(self._cluster, entry, model_id):
            if witness in self._witnesses:
                raise InvariantError(
                    self._cluster.log,
                    "no call fails that a live ready copy could serve",
                    f"{told}, although {witness.instance.name} had it ready all the time",
                    instances=[entry.name, witness.instance.name],
                    models=[model_id],
                )

    def never_ended(self) -> None:
        """Raise: the call had longer than any call may take."""
        raise InvariantError(
            self._cluster.log,
            "nothing is stuck",
            f"a call for {self._model_id} by {self._entry.name} did not end in {CALL_S_MAX:g} s",
            instances=[self._entry.name],
            models=[self._model_id],
        )


def _registration(cluster: SimulatedCluster, model_id: str) -> int:
    """Answer which registration of the model is in force; 0 for none."""
    return cluster.revision_registered(model_id)


def _witnesses(cluster: SimulatedCluster, entry: Instance, model_id: ModelId) -> Iterable[_Witness]:
    record = entry.node.parts.registry.get(model_id)
    for each in cluster.serving:
        copy = each.node.parts.copies.get(model_id)
        if copy is None or not copy.serves or each.runtime.held(model_id) is not Held.LOADED:
            continue
        there, back = (entry.address, each.address), (each.address, entry.address)
        if each is not entry:
            if record is None or each.name not in record.copies:
                continue
            if each.name not in entry.node.parts.members:
                continue
            if cluster.network.is_cut(*there) or cluster.network.is_cut(*back):
                continue
        yield _Witness(
            each,
            copy.load_id,
            each.runtime.losses[model_id],
            cluster.network.disturbances[there] + cluster.network.disturbances[back],
        )


class Invariants:
    """What is looked at each second, over all instances that serve."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        #: Since when a copy is in its phase, or an unload under way.
        self._since_s: dict[tuple[object, ...], float] = {}
        #: The newest revision that each view has shown of each model, in the present store, which
        #: is known by the event that will tell of its loss.
        self._seen: dict[Instance, tuple[anyio.Event, dict[str, int]]] = {}
        #: Instances whose runtimes did not give back all memory, once.
        self._have_lost: set[Instance] = set()

    async def run(self) -> None:
        """Look each second, until cancelled."""
        while True:
            self.look()
            await anyio.sleep(1.0)

    def look(self) -> None:
        """Raise ``InvariantError`` for the first thing that is not as it must be."""
        now_s, since_s = anyio.current_time(), {}
        for each in self._cluster.instances.values():
            if each.runtime.violations:
                text = each.runtime.violations[0]
                raise InvariantError(
                    self._cluster.log,
                    "a runtime's contract",
                    f"{each.name}: {text}",
                    instances=[each.name],
                    models=[each.runtime.violators[0]],
                )
        for each in self._cluster.serving:
            self._check_books(each)
            self._check_view(each)
            self._check_pins(each)
            self._check_held(each)
            for key, model_id, what, s_max in _under_way(each):
                begun_s = since_s[key] = self._since_s.get(key, now_s)
                if now_s - begun_s > s_max:
                    raise InvariantError(
                        self._cluster.log,
                        "nothing is stuck",
                        f"{each.name}: {model_id} is {what} since {begun_s:.3f}",
                        instances=[each.name],
                        models=[model_id],
                    )
        self._since_s = since_s

    def _check_view(self, each: Instance) -> None:
        store, seen = self._seen.get(each, (None, {}))
        if store is not each.node.parts.registry.mirror.store_replaced:
            store, seen = each.node.parts.registry.mirror.store_replaced, {}
            self._seen[each] = (store, seen)
        for model_id, item in each.node.parts.registry._mirror.items():
            if item.mod_revision < seen.get(model_id, 0):
                raise InvariantError(
                    self._cluster.log,
                    "no view goes back",
                    f"{each.name} sees {model_id} as of revision {item.mod_revision},"
                    f" and saw {seen[model_id]} before",
                    instances=[each.name],
                    models=[model_id],
                )
            seen[model_id] = item.mod_revision

    def _check_pins(self, each: Instance) -> None:
        parts = each.node.parts
        if parts.accounting.lost_units:
            self._have_lost.add(each)
        if each in self._have_lost:
            return
        kept_units, room_units = parts.copies.table.kept_units, parts.pins.room_units
        text = ""
        if parts.counters.pins_evicted:
            text = f"{each.name} evicted {parts.counters.pins_evicted} pinned copies"
        elif kept_units > room_units:
            text = f"{each.name} keeps {kept_units} units, {room_units} it may"
        if text:
            log = self._cluster.log
            raise InvariantError(log, "no pinned copy is evicted", text, instances=[each.name])

    def _check_held(self, each: Instance) -> None:
        count = each.node.parts.counters.copies_dropped
        if count and anyio.current_time() < HELD_S:
            raise InvariantError(
                self._cluster.log,
                "nothing is given up before its time",
                f"{each.name} gave up {count} copies as too many",
                instances=[each.name],
            )

    def _check_books(self, each: Instance) -> None:
        try:
            each.node.parts.copies.check_invariants()
            each.node.parts.copies.table.check_invariants()
            each.node.parts.registry.policies.check_invariants()
        except AssertionError as exc:
            raise InvariantError(
                self._cluster.log, "the books balance", f"{each.name}: {exc}", instances=[each.name]
            ) from exc


def _under_way(each: Instance) -> Iterable[tuple[tuple[object, ...], ModelId, str, float]]:
    """Everything at one instance that must end: its key, model, state and time limit."""
    for copy in each.node.parts.copies:
        if copy.phase in PHASE_S_MAX:
            key = (each, copy.load_id, copy.phase)
            yield key, copy.model_id, copy.phase.value, PHASE_S_MAX[copy.phase]
    for model_id, ended in each.node.parts.copies.unloader._ended.items():
        yield (each, ended), model_id, "being unloaded", UNLOAD_S_MAX
