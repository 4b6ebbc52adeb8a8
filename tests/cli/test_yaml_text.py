"""YAML: what is plain, what is quoted, and how blocks lie in each other."""

from __future__ import annotations

import json

import pytest

from mm.cli.yaml_text import to_yaml


@pytest.mark.parametrize("text", ["a", "iris-1", "a/b.joblib", "LOADED", "x_1"])
def test_plain_text(text: str) -> None:
    assert to_yaml(text) == f"{text}\n"


@pytest.mark.parametrize(
    "text",
    ["", "null", "Yes", "NO", "y", "on", "1", "1.0", "0x1", ".inf", "~", "2020-01-01", "12:30",
     "- a", "a: b", "a #b", "#", "&a", "*a", "!a", "|", ">", "%", "@", "`", "'", "[", "{", " a",
     "a ", "a b", "é", "---"],
)  # fmt: skip
def test_text_that_something_else_could_be_meant_by(text: str) -> None:
    assert to_yaml(text) == json.dumps(text, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('a"b', '"a\\"b"'),
        ("a\\b", '"a\\\\b"'),
        ("a\nb\tc\rd", '"a\\nb\\tc\\rd"'),
        ("\x00\x7f\x85", '"\\x00\\x7f\\x85"'),
        ("\u2028\ufeff", '"\\u2028\\ufeff"'),
        ("\U000e0001", '"\\U000e0001"'),
    ],
)
def test_escapes(text: str, told: str) -> None:
    assert to_yaml(text) == told + "\n"


def test_blocks() -> None:
    value = {
        "id": "m",
        "none": None,
        "flag": True,
        "count": -3,
        "empty": [],
        "nothing": {},
        "list": ["a", ["b", 1], {"x": 1, "y": [2]}],
        "map": {"a b": {"c": "d"}},
    }
    assert to_yaml(value).splitlines() == [
        "id: m", "none: null", "flag: true", "count: -3", "empty: []", "nothing: {}",
        "list:", "  - a", "  - - b", "    - 1", "  - x: 1", '    "y":', "      - 2",
        "map:", '  "a b":', "    c: d",
    ]  # fmt: skip
