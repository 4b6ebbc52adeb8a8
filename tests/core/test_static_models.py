"""The list of models that a deployment names: what it may say, and how it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.core.static_models import (
    StaticModel,
    changes,
    joined,
    parse_static_models,
)

M: dict[str, Any] = {"modelId": "m", "modelInfo": {"type": "t"}}


def parse(*entries: object) -> tuple[StaticModel, ...]:
    return parse_static_models(json.dumps(entries), "LIST")


def test_everything_that_an_entry_can_say() -> None:
    info = {"type": "t", "path": "p", "key": "secret"}
    least, most = parse(
        {**M, "unknown": [1], "vModelId": None, "ensureLoaded": None},
        {
            "modelId": "n",
            "modelInfo": info,
            "vModelId": "v",
            "retainAfterTransition": True,
            "ensureLoaded": True,
        },
    )
    assert least == StaticModel(ModelId("m"), ModelInfo("t"))
    assert most == StaticModel(
        ModelId("n"), ModelInfo("t", "p", "secret"), "v", is_retained=True, is_awaited=True
    )
    assert str(least) == 'entry 1 of LIST (model "m")'
    assert str(most) == 'entry 2 of LIST (model "n" of vmodel "v")'
    assert "secret" not in repr(most)
    assert parse() == ()


def test_what_is_misspelt_is_known() -> None:
    info = {"type": "t", "keys": "secret"}
    (found,) = parse({"modelId": "m", "modelInfo": info, "ensureloaded": True})
    assert not found.is_awaited
    assert found.unknown_properties == ("ensureloaded", "modelInfo.keys")
    assert parse(M)[0].unknown_properties == ()


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (7, r"entry 2 of LIST: Expected `object`, got `int`"),
        ({"modelInfo": {"type": "t"}}, r"entry 2 of LIST: modelId is missing"),
        ({**M, "modelId": ""}, r'entry 2 of LIST \(model ""\): modelId is missing'),
        ({**M, "modelId": 3}, r"entry 2 of LIST: Expected `str \| null`, got `int` - .*modelId"),
        ({"modelId": "x"}, r'entry 2 of LIST \(model "x"\): modelInfo is missing'),
        ({"modelId": "x", "modelInfo": {"path": "p"}}, r'\(model "x"\): modelInfo.type is missing'),
        ({**M, "ensureLoaded": "yes"}, r'entry 2 of LIST \(model "m"\): Expected `bool'),
        ({**M, "retainAfterTransition": True}, r"retainAfterTransition is for entries with a vMod"),
        (
            {"modelId": "m", "modelInfo": {"type": "u"}},
            r'entry 2 of LIST \(model "m"\): entry 1 of LIST says the same id has other attributes',
        ),
    ],
)
def test_an_error_names_the_entry(entry: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(M, entry)


@pytest.mark.parametrize("text", ["", "{}", "[", "null", '[{"modelId": "m"},]', b"\xff"])
def test_what_is_no_list(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_static_models(text, "LIST")


def test_no_error_tells_a_key() -> None:
    for info in ({"key": "secret"}, {"type": 1, "key": "secret"}, {"type": "t", "key": ["secret"]}):
        with pytest.raises(ValueError, match="entry 1") as caught:
            parse({"modelId": "m", "modelInfo": info})
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="other attributes") as caught:
        parse(M, {"modelId": "m", "modelInfo": {"type": "t", "key": "secret"}})
    assert "secret" not in str(caught.value)


def test_two_entries_may_name_one_model_but_not_one_vmodel_twice() -> None:
    parse(M, M)
    parse({**M, "vModelId": "v"}, {**M, "vModelId": "w"}, M)
    other = {"modelId": "n", "modelInfo": {"type": "t"}}
    with pytest.raises(ValueError, match=r"entry 2 of LIST .* entry 1 of LIST says another model"):
        parse({**M, "vModelId": "v"}, {**other, "vModelId": "v"})
    one, two = parse_static_models(json.dumps([M]), "A"), parse({**M, "modelInfo": {"type": "u"}})
    with pytest.raises(ValueError, match=r"entry 1 of LIST .*: entry 1 of A says the same id"):
        joined(one, two)


def test_what_is_new_in_a_list_that_was_read_again() -> None:
    info = {"type": "t"}
    before = parse(M, {"modelId": "n", "modelInfo": info}, {**M, "vModelId": "v"})
    after = parse(
        {"modelId": "n2", "modelInfo": info, "vModelId": "v"},
        {"modelId": "o", "modelInfo": info},
        M,
    )
    found = changes(before, after)
    assert [each.model_id for each in found.wanted] == ["n2", "o"], "in order, v being changed"
    assert [each.model_id for each in found.removed] == ["n"]
    same = changes(after, parse_static_models(json.dumps([M]), "ANOTHER PLACE"))
    assert not same.wanted, "an entry that only moved is the same"
