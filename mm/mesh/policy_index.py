"""The models with a policy, found without a walk through all (spec: issue 5 part 1).

Owns what is known of them from their records as those change, and the sums that a new policy is
held against. What is done about a policy is ``keeper``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mm.core.ids import ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.policy_plan import Wish
from mm.core.records import ModelRecord


@dataclass(frozen=True, slots=True)
class Promise:
    """What the mesh keeps of one model."""

    model_type: str
    policy: ModelPolicy
    #: Of one copy, as the record told last; 0: nobody knows yet.
    size_units: int

    def units(self, default_units: int) -> int:
        """Answer what the copies take that are kept, if one of unknown size takes so much."""
        return (self.size_units or default_units) * self.policy.copies_needed


class PolicyIndex:
    """Invariant: the sums are those of all promises, by type of model: the units of those of known
    size, the copies of the others.
    """

    def __init__(self) -> None:
        self._promises: dict[ModelId, Promise] = {}
        self._units: Counter[str] = Counter()
        self._unsized_copies: Counter[str] = Counter()
        self._listeners: list[Callable[[ModelId], None]] = []
        #: How often a policy was set, changed or taken away.
        self.changes_count = 0

    def __len__(self) -> int:
        return len(self._promises)

    def __iter__(self) -> Iterator[ModelId]:
        return iter(self._promises)

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._promises

    def listen(self, listener: Callable[[ModelId], None]) -> None:
        """Call ``listener`` after every change of the record of a model that has a policy, or had
        one until then; it must not block or raise.
        """
        self._listeners.append(listener)

    def get(self, model_id: ModelId) -> Promise | None:
        """Answer what is kept of a model, None if nothing is."""
        return self._promises.get(model_id)

    def units_by_type(self, default_units: int) -> dict[str, int]:
        """Answer what all that is kept takes, a copy of unknown size so much."""
        sums = self._units.copy()
        for model_type, count in self._unsized_copies.items():
            sums[model_type] += default_units * count
        return {model_type: units for model_type, units in sums.items() if units}

    def types(self) -> set[str]:
        """Answer the types of the models of which something is kept."""
        return {each for sums in (self._units, self._unsized_copies) for each in sums if sums[each]}

    def wishes(self, default_units: int) -> list[Wish]:
        """Answer what all policies ask for; a copy of unknown size takes so much."""
        return [
            Wish(
                model_id,
                each.model_type,
                each.policy.copies_needed,
                each.size_units or default_units,
                each.policy.pinned,
            )
            for model_id, each in self._promises.items()
        ]

    def note(self, model_id: ModelId, record: ModelRecord | None) -> None:
        """Take in a changed record; None when it is gone."""
        before, now = self._promises.pop(model_id, None), None
        if record is not None and record.policy.copies_needed:
            size_units = record.size_units
            if not size_units and before is not None:
                size_units = before.size_units  # it has no copy at the moment
            now = Promise(record.info.model_type, record.policy, size_units)
            self._promises[model_id] = now
        for promise, sign in ((before, -1), (now, 1)):
            if promise is not None:
                _add(self._units, self._unsized_copies, promise, sign)
        if (before and before.policy) != (now and now.policy):
            self.changes_count += 1
        if before is not None or now is not None:
            for listener in self._listeners:
                listener(model_id)

    def check_invariants(self) -> None:
        """Assert that the sums are right."""
        units: Counter[str] = Counter()
        unsized_copies: Counter[str] = Counter()
        for promise in self._promises.values():
            _add(units, unsized_copies, promise, 1)
        assert (self._units, self._unsized_copies) == (units, unsized_copies)


def _add(units: Counter[str], unsized_copies: Counter[str], promise: Promise, sign: int) -> None:
    if promise.size_units:
        units[promise.model_type] += sign * promise.units(0)
    else:
        unsized_copies[promise.model_type] += sign * promise.policy.copies_needed
