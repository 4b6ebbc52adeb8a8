"""Type constraints: their JSON in its normal form, and which groups of labels may and should."""

from __future__ import annotations

import json
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.constraints import (
    Constraint,
    TypeConstraints,
    constraint,
    no_instance_message,
    parse_type_constraints,
)
from mm.core.json_input import JSON_BYTES_MAX
from mm.core.label_groups import LabelGroups, TypeRule


def parse(**types: object) -> TypeConstraints:
    return parse_type_constraints(json.dumps(types))


# --- the JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"required": ["b", "a", "b"]}, Constraint(("a", "b"))),
        ({"preferred": ["b", "a", "b"]}, Constraint((), ("a", "b"))),
        ({"required": ["a"], "preferred": ["a", "c"]}, Constraint(("a",), ("c",))),
        ({"required": [" a "], "preferred": None, "more": {"x": 1}}, Constraint(("a",))),
        ({"required": ["a", " "]}, Constraint(("a",))),
    ],
)
def test_what_is_read_is_in_its_normal_form(entry: object, expected: Constraint) -> None:
    assert parse(t=entry).types["t"] == expected


@pytest.mark.parametrize("entry", [None, {}, {"required": []}, {"preferred": None}, {"x": ["a"]}])
def test_an_entry_without_labels_is_none_and_does_not_hide_the_default(entry: object) -> None:
    constraints = parse(t=entry, _default={"required": ["gpu"]})
    assert set(constraints.types) == {"_default"}
    assert constraints.required("t") == ("gpu",)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty; JSON is expected"),
        ("[]", "object"),
        ('{"t": []}', '"t": Expected `object`'),
        ('{"t": {"required": "gpu"}}', "required"),
        ('{"t": {"preferred": [1]}}', "preferred"),
        ('{"t": {"required": ["a"]}', "truncated"),
        (b"\xff", "."),
        ('{"t":' + "[" * 100_000, "."),
        (" " * (JSON_BYTES_MAX + 1), "longer than"),
    ],
)
def test_what_is_no_constraints_file_is_refused(text: str | bytes, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_type_constraints(text)


def test_a_type_that_is_not_listed_has_the_default() -> None:
    constraints = parse(t={"required": ["a"]}, _default={"required": ["_no_runtime"]})
    assert [constraints.required(t) for t in ("t", "u", "_default")] == [
        ("a",),
        ("_no_runtime",),
        ("_no_runtime",),
    ]
    assert parse(t={"required": ["a"]}).key("u") is None


def test_the_text_for_the_controller() -> None:
    assert no_instance_message("mt:sklearn:0|pv:v2", ("mt:sklearn:0", "pv:v2")) == (
        "There are no running instances that meet the label requirements of type"
        " mt:sklearn:0|pv:v2: [mt:sklearn:0, pv:v2]"
    )


# --- who may, and who should --------------------------------------------------------------------

#: Numbers of groups: 0 has no labels.
LABELS = {0: "", 1: "cpu", 2: "gpu", 3: "cpu gpu", 4: "gpu fast"}


def rule(constraints: TypeConstraints, model_type: str) -> TypeRule:
    labels = {number: frozenset(names.split()) for number, names in LABELS.items()}
    return LabelGroups(constraints, labels).rule(model_type)


def test_without_constraints_everybody_may_and_nobody_is_better() -> None:
    assert rule(TypeConstraints(), "t") == TypeRule()


@pytest.mark.parametrize(
    ("name", "types", "allowed", "preferred"),
    [
        ("all of the required", {"t": {"required": ["cpu", "gpu"]}}, {3}, None),
        ("one required", {"t": {"required": ["gpu"]}}, {2, 3, 4}, None),
        ("none has it", {"t": {"required": ["tpu"]}}, set(), None),
        ("any of the preferred", {"t": {"preferred": ["fast", "cpu"]}}, None, {1, 3, 4}),
        ("preferred by nobody", {"t": {"preferred": ["tpu"]}}, None, None),
        (
            "preferred among those that may",
            {"t": {"required": ["gpu"], "preferred": ["fast"]}},
            {2, 3, 4},
            {4},
        ),
        ("the default", {"_default": {"required": ["gpu"]}}, {2, 3, 4}, None),
        # Inferred: instances that other types may not use are taken first.
        (
            "the most prohibited",
            {"t": {"required": ["gpu"]}, "u": {"required": ["cpu"]}},
            {2, 3, 4},
            {2, 4},
        ),
        (
            "a type that prefers an instance keeps others from it",
            {"t": {"required": ["gpu"]}, "u": {"required": ["cpu"]}, "v": {"preferred": ["fast"]}},
            {2, 3, 4},
            {2},
        ),
    ],
)
def test_rules(
    name: str, types: dict[str, object], allowed: set[int] | None, preferred: set[int] | None
) -> None:
    expected = TypeRule(
        None if allowed is None else frozenset(allowed),
        None if preferred is None else frozenset(preferred),
    )
    assert rule(parse(**types), "t") == expected, name


def test_a_type_without_constraint_keeps_off_those_that_others_need() -> None:
    constraints = parse(t={"required": ["gpu"]})
    assert rule(constraints, "free") == TypeRule(None, frozenset({0, 1}))


LABEL_SETS = st.frozensets(st.sampled_from("abcd"), max_size=4)
ENTRIES = st.builds(constraint, LABEL_SETS, LABEL_SETS)


@settings(deadline=None)
@given(
    types=st.dictionaries(st.sampled_from(["t", "u", "v", "_default"]), ENTRIES),
    groups=st.dictionaries(st.integers(0, 9), LABEL_SETS),
)
def test_in_every_cluster(types: dict[str, Constraint], groups: dict[int, frozenset[str]]) -> None:
    constraints = TypeConstraints(MappingProxyType(types))
    label_groups = LabelGroups(constraints, groups)
    for model_type in ("t", "u", "other"):
        found = label_groups.rule(model_type)
        required = set(constraints.required(model_type))
        allowed = set(groups) if found.allowed is None else found.allowed
        assert allowed == {number for number, labels in groups.items() if required <= labels}
        assert found.preferred is None or set() < found.preferred < allowed
        key = constraints.key(model_type)
        prohibiting = {n for n in groups if key in label_groups.prohibited(n)}
        assert prohibiting == set(groups) - allowed, "partitions and candidates agree"
