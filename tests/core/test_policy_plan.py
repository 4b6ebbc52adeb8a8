"""Of what policies ask for as much as there is room for, and the same each time."""

from __future__ import annotations

import random

from mm.core.ids import ModelId
from mm.core.policy_plan import Wish, planned

ALL, FEW = frozenset(("x", "y")), frozenset("y")
KINDS = {"any": ALL, "few": FEW}


def wish(name: str, copies_count: int = 1, size_units: int = 10, **more: bool) -> Wish:
    model_type = "few" if name.startswith("f") else "any"
    is_pinned = more.get("is_pinned", False)
    return Wish(ModelId(name), model_type, copies_count, size_units, is_pinned)


def plan(*wishes: Wish, x: int = 30, y: int = 20) -> dict[ModelId, int]:
    rooms = {"x": (3, x), "y": (2, y)}
    mixed = list(wishes)
    random.Random(1).shuffle(mixed)
    return planned(mixed, KINDS, rooms)


def test_what_fits_is_planned_up_to_the_number_of_instances() -> None:
    assert plan(wish("a", 2), wish("b")) == {"a": 2, "b": 1}
    assert plan(wish("a", 9, 1)) == {"a": 5}
    assert plan(wish("f", 9, 1)) == {"f": 2}


def test_first_copies_come_first_then_pinned_then_by_id() -> None:
    many = [wish(f"a{number}", 2) for number in range(3)]
    assert plan(*many) == {"a0": 2, "a1": 2, "a2": 1}
    assert plan(*many, wish("b"), wish("c")) == {"a0": 1, "a1": 1, "a2": 1, "b": 1, "c": 1}
    assert plan(*many, wish("b"), wish("c"), wish("d")).keys() == {"a0", "a1", "a2", "b", "c"}
    pinned = wish("d", is_pinned=True)
    assert plan(*many, wish("b"), wish("c"), pinned).keys() == {"a0", "a1", "a2", "b", "d"}
    # What is too large leaves its place to others.
    assert plan(wish("a", 1, 60), wish("b", 1, 50)) == {"b": 1}


def test_types_share_the_room_of_instances_that_may_hold_both() -> None:
    assert plan(wish("f0"), wish("f1"), wish("f2")) == {"f0": 1, "f1": 1}
    assert plan(*(wish(f"a{n}") for n in range(5)), wish("f0")).keys() == {
        f"a{n}" for n in range(5)
    }
    assert plan(wish("f0"), wish("f1"), wish("z0", 4)) == {"f0": 1, "f1": 1, "z0": 3}
