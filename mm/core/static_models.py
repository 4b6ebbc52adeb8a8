"""Models that a deployment names itself, in a variable or a file (spec core 7.2, around 16).

Owns their JSON, what one list may say, and what is new in a list that was read again. Registering
them is ``mm.mesh.static_models``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from mm.core.ids import ModelId
from mm.core.json_input import decode_json
from mm.core.records import ModelInfo

#: Of an id that nobody can have meant, an error shows this much.
_SHOWN_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class StaticModel:
    """One entry of the list."""

    model_id: ModelId
    info: ModelInfo
    #: Registered as the target of this vmodel; empty: by itself.
    vmodel_id: str = ""
    #: The model stays when the vmodel goes on to another one.
    is_retained: bool = False
    #: The start waits for its first copy.
    is_awaited: bool = False
    #: Where it is written, for errors: "entry 3 of MM_AUTO_REGISTER_MODELS".
    place: str = field(default="", compare=False)
    #: Properties that it has, and that mean nothing: misspelt, most likely.
    unknown_properties: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        vmodel = f' of vmodel "{self.vmodel_id[:_SHOWN_MAX]}"' if self.vmodel_id else ""
        return f'{self.place} (model "{self.model_id[:_SHOWN_MAX]}"{vmodel})'

    @property
    def name(self) -> tuple[str, str]:
        """What the entry is about: two entries with one name are one that was changed."""
        return (self.vmodel_id, "") if self.vmodel_id else ("", self.model_id)


@dataclass(frozen=True, slots=True)
class StaticChanges:
    """What differs between two readings of a list."""

    #: To be registered: new, or changed.
    wanted: tuple[StaticModel, ...]
    #: Named no more. They stay registered.
    removed: tuple[StaticModel, ...]


def changes(before: Iterable[StaticModel], after: Iterable[StaticModel]) -> StaticChanges:
    """Answer what is to be done because of a list that was read again."""
    before, after = list(before), list(after)
    known, names = set(before), {each.name for each in after}
    return StaticChanges(
        tuple(each for each in after if each not in known),
        tuple(each for each in before if each.name not in names),
    )


class _InfoJson(msgspec.Struct):
    type: str | None = None
    path: str | None = None
    key: str | None = None


class _EntryJson(msgspec.Struct, rename="camel"):
    """Unknown properties are ignored, as the Java mesh does; null is as good as absent."""

    model_id: str | None = None
    model_info: _InfoJson | None = None
    # Not camel case as the rule makes it: the attribute is spelt "vModelId".
    vmodel_id: str | None = msgspec.field(default=None, name="vModelId")
    retain_after_transition: bool | None = None
    ensure_loaded: bool | None = None


_PROPERTIES: Final = frozenset(_EntryJson.__struct_encode_fields__)


def parse_static_models(text: str | bytes, source: str) -> tuple[StaticModel, ...]:
    """Read a list; ``source`` names it. Raises ``ValueError`` that says which entry is wrong, and
    why, without a word of any ``key``.
    """
    entries = decode_json(text, list[Any])
    return joined(
        _model(entry, f"entry {number} of {source}") for number, entry in enumerate(entries, 1)
    )


def _model(entry: object, place: str) -> StaticModel:
    model_id = entry.get("modelId") if isinstance(entry, dict) else None
    shown = f' (model "{model_id[:_SHOWN_MAX]}")' if isinstance(model_id, str) else ""
    try:
        raw = msgspec.convert(entry, _EntryJson)
    except msgspec.ValidationError as exc:
        raise ValueError(f"{place}{shown}: {exc}") from exc
    info = raw.model_info or _InfoJson()
    problem = ""
    if not raw.model_id:
        problem = "modelId is missing"
    elif raw.model_info is None:
        problem = "modelInfo is missing"
    elif not info.type:
        problem = "modelInfo.type is missing"
    elif raw.retain_after_transition and not raw.vmodel_id:
        problem = "retainAfterTransition is for entries with a vModelId"
    if problem:
        raise ValueError(f"{place}{shown}: {problem}")
    assert raw.model_id
    assert info.type
    return StaticModel(
        ModelId(raw.model_id),
        ModelInfo(info.type, info.path or "", info.key or ""),
        vmodel_id=raw.vmodel_id or "",
        is_retained=bool(raw.retain_after_transition),
        is_awaited=bool(raw.ensure_loaded),
        place=place,
        unknown_properties=tuple(_unknown_properties(entry)),
    )


def _unknown_properties(entry: object) -> Iterator[str]:
    """The names of an entry that nobody reads; never their values."""
    assert isinstance(entry, dict)
    for name in entry:
        if name not in _PROPERTIES:
            yield name[:_SHOWN_MAX]
    for name in entry.get("modelInfo") or ():
        if name not in _InfoJson.__struct_fields__:
            yield f"modelInfo.{name[:_SHOWN_MAX]}"


def joined(*lists: Iterable[StaticModel]) -> tuple[StaticModel, ...]:
    """Answer several lists as one; raises ``ValueError`` if two entries cannot both come true."""
    models = tuple(model for each in lists for model in each)
    infos: dict[ModelId, StaticModel] = {}
    targets: dict[str, StaticModel] = {}
    for model in models:
        first = infos.setdefault(model.model_id, model)
        if first.info != model.info:
            raise ValueError(f"{model}: {first.place} says the same id has other attributes")
        if model.vmodel_id:
            first = targets.setdefault(model.vmodel_id, model)
            if first.model_id != model.model_id:
                raise ValueError(f"{model}: {first.place} says another model")
    return models
