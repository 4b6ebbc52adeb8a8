"""Which instances may, and which should, load models of a type (spec core 4.5, intentions of 10.2).

Instances with the same labels are alike for every type, so the answer is given once for each group
of them. Owns no instance: who is in which group is ``mm.core.cluster_state``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mm.core.constraints import NO_CONSTRAINTS, TypeConstraints

#: A type that may not be at an instance weighs more than one that merely prefers it (Java's value).
PROHIBITED_WEIGHT: Final = 4


@dataclass(frozen=True, slots=True)
class TypeRule:
    """Numbers of groups; None says nothing: allowed everywhere, none better than others."""

    allowed: frozenset[int] | None = None
    preferred: frozenset[int] | None = None


_ANYWHERE: Final = TypeRule()


class LabelGroups:
    """The sets of labels in a cluster, and what the constraints make of them.

    Never changes; answers are kept, because there are few types in use and many decisions.
    """

    def __init__(
        self,
        constraints: TypeConstraints = NO_CONSTRAINTS,
        labels: Mapping[int, frozenset[str]] = MappingProxyType({}),
    ) -> None:
        self.constraints = constraints
        self._labels = dict(labels)
        self._prohibited = {
            number: constraints.prohibited(each) for number, each in self._labels.items()
        }
        self._rules: dict[str | None, TypeRule] = {}

    def prohibited(self, number: int) -> frozenset[str]:
        """Answer the entries of the constraints that the group does not meet: its partition."""
        return self._prohibited[number]

    def rule(self, model_type: str) -> TypeRule:
        """Answer where models of a type may and should be."""
        if not self.constraints:
            return _ANYWHERE
        key = self.constraints.key(model_type)
        rule = self._rules.get(key)
        if rule is None:
            rule = self._rules[key] = self._rule(key)
        return rule

    def _rule(self, key: str | None) -> TypeRule:
        allowed = {n for n, prohibited in self._prohibited.items() if key not in prohibited}
        entry = None if key is None else self.constraints.types[key]
        if entry is not None and entry.preferred:
            preferred = {n for n in allowed if entry.is_preferred_by(self._labels[n])}
        else:
            preferred = self._inferred(allowed)
        return TypeRule(
            allowed=None if len(allowed) == len(self._labels) else frozenset(allowed),
            # A preference for all or for none is no preference.
            preferred=frozenset(preferred) if 0 < len(preferred) < len(allowed) else None,
        )

    def _inferred(self, allowed: set[int]) -> set[int]:
        """Where the fewest other types can be: it keeps the instances free that others need."""
        scores = {
            number: PROHIBITED_WEIGHT * len(self._prohibited[number])
            - self.constraints.preferring_count(self._labels[number])
            for number in allowed
        }
        best = max(scores.values(), default=0)
        return {number for number, score in scores.items() if score == best}
