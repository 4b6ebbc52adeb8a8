"""When an instance is ready (spec core 7.1, 7.5)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from mm.core.readiness import ReadinessFacts, Unready, unready_because

STARTED = ReadinessFacts(has_started=True)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (ReadinessFacts(), Unready.STARTING),
        (STARTED, None),
        (replace(STARTED, able_count=5), None),
        (replace(STARTED, is_stopping=True), Unready.STOPPING),
        (replace(STARTED, is_stopping=True, has_been_ready=True), Unready.STOPPING),
        (replace(STARTED, stopping_count=1), Unready.OTHERS_STOP),
        (replace(STARTED, stopping_count=1, able_count=5), Unready.OTHERS_STOP),
        # Only before it was ready once: else one that stops would take all others along.
        (replace(STARTED, stopping_count=1, has_been_ready=True), None),
        (replace(STARTED, stopping_count=1, has_waited_enough=True), None),
        (replace(STARTED, loads_fail=True, able_count=1), Unready.LOADS_FAIL),
        (replace(STARTED, loads_fail=True, able_count=1, has_been_ready=True), Unready.LOADS_FAIL),
        # Nobody else would serve either.
        (replace(STARTED, loads_fail=True), None),
        (replace(STARTED, loads_fail=True, stopping_count=1), Unready.OTHERS_STOP),
    ],
)
def test_what_keeps_an_instance_from_being_ready(
    facts: ReadinessFacts, expected: Unready | None
) -> None:
    assert unready_because(facts) is expected


def test_an_instance_is_ready_at_last_whatever_others_do() -> None:
    for able_count, stopping_count in itertools.product(range(3), repeat=2):
        facts = replace(
            STARTED,
            able_count=able_count,
            stopping_count=stopping_count,
            has_waited_enough=True,
        )
        assert unready_because(facts) is None


def test_the_reason_is_a_text_for_people() -> None:
    assert str(Unready.STARTING) == "it is starting"
