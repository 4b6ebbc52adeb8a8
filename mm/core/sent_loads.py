"""Loads that this instance sent to others, and that their records cannot know of yet.

Records are seconds old. Without this book a burst of misses at one instance all goes to whoever
looked best at its beginning.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from mm.core.ids import InstanceId, ModelId

#: A record that came this soon after a load was sent may have been written before the load arrived
#: there: a write to the store and its event take tens of milliseconds, a slow store 200.
SETTLE_S: Final = 0.25
#: Without any news of an instance its loads are counted this long: twice the interval after which
#: whatever changed has been published.
COUNTED_S_MAX: Final = 80.0


@dataclass(slots=True)
class _Load:
    sent_s: float
    size_units: int
    #: It may be loading still, as far as anybody here knows.
    is_loading: bool = True


class SentLoads:
    """Per instance and model, one entry however many calls wait for the load.

    Invariant: ``sums`` answers the sums over the entries. An entry goes with the news of its
    instance, with a refusal, or after ``COUNTED_S_MAX``; so there are at most as many as loads were
    sent in that time.
    """

    def __init__(self) -> None:
        self._loads: dict[InstanceId, dict[ModelId, _Load]] = {}
        self._targets: dict[ModelId, InstanceId] = {}
        self._sums: dict[InstanceId, tuple[int, int]] = {}
        #: Every load sent in the last ``COUNTED_S_MAX``, oldest first, counted still or not.
        self._history: deque[tuple[float, InstanceId, ModelId]] = deque()

    def __len__(self) -> int:
        return sum(len(each) for each in self._loads.values())

    def sums(self, instance_id: InstanceId) -> tuple[int, int]:
        """Answer what was sent there and does not show yet: (units, loads in progress)."""
        return self._sums.get(instance_id, _NOTHING)

    def target(self, model_id: ModelId) -> InstanceId | None:
        """Answer where a load of this model was sent to last: the next call should go there too."""
        return self._targets.get(model_id)

    def sent(
        self, instance_id: InstanceId, model_id: ModelId, size_units: int, now_s: float
    ) -> None:
        """A call goes there to have the model loaded."""
        loads = self._loads.setdefault(instance_id, {})
        if model_id in loads:
            return
        loads[model_id] = _Load(now_s, size_units)
        self._targets[model_id] = instance_id
        self._history.append((now_s, instance_id, model_id))
        self._add(instance_id, size_units, 1)

    def ended(
        self, instance_id: InstanceId, model_id: ModelId, *, took: bool, is_loading: bool
    ) -> None:
        """A call came back. ``took``: the instance took the model; ``is_loading``: perhaps still.

        What it did not take costs no memory there; what it took does until its record says so.
        """
        load = self._loads.get(instance_id, {}).get(model_id)
        if load is None:
            return
        if not took:
            self._forget(instance_id, model_id)
        elif load.is_loading and not is_loading:
            load.is_loading = False
            self._add(instance_id, 0, -1)

    def observed(self, instance_id: InstanceId, now_s: float) -> None:
        """News of an instance came, which include all that was sent long enough before."""
        loads = self._loads.get(instance_id)
        while loads:
            # Entries stand in the order in which they were sent.
            model_id, load = next(iter(loads.items()))
            if load.sent_s > now_s - SETTLE_S:
                return
            self._forget(instance_id, model_id)

    def told(self, instance_id: InstanceId, model_id: ModelId) -> None:
        """It told how it was when the load of this model came: with all that was sent before it."""
        loads = self._loads.get(instance_id, {})
        if model_id not in loads:
            return
        for sent in list(loads):
            self._forget(instance_id, sent)
            if sent == model_id:
                return

    def forget(self, instance_id: InstanceId) -> None:
        """The instance is gone."""
        for model_id in list(self._loads.get(instance_id, ())):
            self._forget(instance_id, model_id)

    def expire(self, now_s: float) -> list[InstanceId]:
        """Stop counting what nobody confirmed for too long; answers where that changed the sums."""
        changed = []
        while self._history and self._history[0][0] < now_s - COUNTED_S_MAX:
            sent_s, instance_id, model_id = self._history.popleft()
            load = self._loads.get(instance_id, {}).get(model_id)
            if load is not None and load.sent_s == sent_s:
                self._forget(instance_id, model_id)
                changed.append(instance_id)
        return changed

    def _forget(self, instance_id: InstanceId, model_id: ModelId) -> None:
        loads = self._loads[instance_id]
        load = loads.pop(model_id)
        self._add(instance_id, -load.size_units, -load.is_loading)
        if self._targets.get(model_id) == instance_id:
            del self._targets[model_id]
        if not loads:
            del self._loads[instance_id]
            del self._sums[instance_id]

    def _add(self, instance_id: InstanceId, units: int, count: int) -> None:
        known_units, known_count = self._sums.get(instance_id, _NOTHING)
        self._sums[instance_id] = (known_units + units, known_count + count)


_NOTHING: Final = (0, 0)
