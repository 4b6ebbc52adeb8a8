"""The text of failure records, and what a status code of a failed load says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.load_errors import TEXT_BYTES_MAX, failure_message
from mm.errors import StatusCode

S = StatusCode


@pytest.mark.parametrize(
    ("code", "description", "message"),
    [
        (S.INTERNAL, "no such file", "INTERNAL: no such file"),
        (S.UNKNOWN, "no such file", "no such file"),
        (S.UNKNOWN, "", "UNKNOWN"),
        (S.FAILED_PRECONDITION, "", "FAILED_PRECONDITION"),
        (S.UNAVAILABLE, "  \n", "UNAVAILABLE"),
        (S.INTERNAL, " padded\n", "INTERNAL: padded"),
        (7, "by number", "PERMISSION_DENIED: by number"),
        (99, "a code that nobody defined", "a code that nobody defined"),
        (-1, "", "UNKNOWN"),
    ],
)
def test_failure_message(code: int, description: str, message: str) -> None:
    assert failure_message(code, description) == message


@pytest.mark.parametrize("letter", ["x", "é", "\u2603"])
def test_a_long_text_keeps_its_ends(letter: str) -> None:
    """A record, a call's trailers and a log line hold it; a runtime may say up to 16 MiB."""
    text = failure_message(S.INTERNAL, "begin" + letter * 200_000 + "end")
    assert text.startswith(f"INTERNAL: begin{letter}")
    assert text.endswith(f"{letter}end")
    assert "[... of " in text
    assert TEXT_BYTES_MAX - 10 <= len(text.encode()) <= TEXT_BYTES_MAX + 50
    exact = letter * (TEXT_BYTES_MAX // len(letter.encode()))
    assert failure_message(S.UNKNOWN, exact) == exact


@settings(deadline=None)
@given(code=st.integers(-(2**40), 2**40), description=st.text())
def test_any_answer_of_a_runtime_has_a_text_and_a_kind(code: int, description: str) -> None:
    assert failure_message(code, description).strip()
