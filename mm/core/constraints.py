"""Type constraints: which labels an instance must or should have for models of a type (spec core
1.10, 4.5; around 14).

Owns their JSON and what they say of one set of labels. Who satisfies them in a cluster is
``mm.core.label_groups``'; the file that they come from is ``mm.edge.watched_file``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import msgspec

from mm.core.json_input import decode_entries, decode_json

#: The type whose constraint holds for every type that has none of its own.
DEFAULT_TYPE: Final = "_default"


@dataclass(frozen=True, slots=True)
class Constraint:
    """Labels for one type: sorted, none twice. Make one with ``constraint``."""

    #: An instance needs all of them.
    required: tuple[str, ...] = ()
    #: An instance with any of them is taken before others. None of these is required, too: what
    #: every candidate has cannot make one of them better.
    preferred: tuple[str, ...] = ()

    def is_met_by(self, labels: frozenset[str]) -> bool:
        """Answer whether an instance with these labels may host the type."""
        return labels.issuperset(self.required)

    def is_preferred_by(self, labels: frozenset[str]) -> bool:
        """Answer whether the type would rather be on an instance with these labels."""
        return not labels.isdisjoint(self.preferred)


def constraint(required: Iterable[str] = (), preferred: Iterable[str] = ()) -> Constraint:
    """Answer the constraint in its normal form, however it was written."""
    needed = _clean(required)
    return Constraint(tuple(sorted(needed)), tuple(sorted(_clean(preferred) - needed)))


def _clean(labels: Iterable[str]) -> set[str]:
    """MM_LABELS is trimmed as well: "gpu " must not be a label that nobody can have."""
    return {label.strip() for label in labels} - {""}


@dataclass(frozen=True, slots=True)
class TypeConstraints:
    """All of them, by type. Must be the same at all instances, which nobody can check."""

    types: Mapping[str, Constraint] = field(default_factory=lambda: MappingProxyType({}))

    def __len__(self) -> int:
        return len(self.types)

    def key(self, model_type: str) -> str | None:
        """Answer the entry that holds for a type: its own, ``_default``, or None."""
        if model_type in self.types:
            return model_type
        return DEFAULT_TYPE if DEFAULT_TYPE in self.types else None

    def required(self, model_type: str) -> tuple[str, ...]:
        """Answer the labels that an instance needs for a type."""
        key = self.key(model_type)
        return () if key is None else self.types[key].required

    def prohibited(self, labels: frozenset[str]) -> frozenset[str]:
        """Answer the entries, ``_default`` among them, that these labels do not meet."""
        return frozenset(key for key, each in self.types.items() if not each.is_met_by(labels))

    def preferring_count(self, labels: frozenset[str]) -> int:
        """Answer how many entries would rather be where these labels are."""
        return sum(each.is_preferred_by(labels) for each in self.types.values())


NO_CONSTRAINTS: Final = TypeConstraints()

#: What the text of every refusal for want of labels begins with.
NO_INSTANCE_TEXT: Final = "There are no running instances that meet the label requirements"


class _EntryJson(msgspec.Struct):
    """Unknown properties are ignored, as the Java mesh does; null is an empty list."""

    required: list[str] | None = None
    preferred: list[str] | None = None


def parse_type_constraints(text: str | bytes) -> TypeConstraints:
    """Read the JSON of the Java mesh; raises ``ValueError`` that names what is wrong with it.

    An entry without any label is no entry: ``_default`` holds for its type then.
    """
    raw = decode_json(text, dict[str, msgspec.Raw])
    written = {name: entry for name, entry in raw.items() if bytes(entry) != b"null"}
    types = {
        name: constraint(entry.required or (), entry.preferred or ())
        for name, entry in decode_entries(written, _EntryJson).items()
    }
    return TypeConstraints(
        MappingProxyType({name: each for name, each in types.items() if each != Constraint()})
    )


def no_instance_message(model_type: str, labels: Iterable[str]) -> str:
    """Answer the text that the controller of modelmesh-serving parses (interop 1.4)."""
    return f"{NO_INSTANCE_TEXT} of type {model_type}: [{', '.join(labels)}]"
