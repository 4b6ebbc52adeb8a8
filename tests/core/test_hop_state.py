"""What a refusal tells of the instance that refuses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.hop_state import HopState
from mm.core.ids import NEVER_MS
from mm.core.records import InstanceRecord

NUMBERS = st.integers(0, NEVER_MS)
COUNTS = st.integers(0, 2**29)


@settings(deadline=None)
@given(st.builds(HopState, NUMBERS, NUMBERS, NUMBERS, COUNTS, COUNTS))
def test_what_is_written_is_read(state: HopState) -> None:
    assert HopState.read(state.write()) == state


def test_it_replaces_what_a_record_said() -> None:
    record = InstanceRecord(zone="z", capacity_units=1, loads_in_progress=5, address="a:1")
    state = HopState.read("1000/900/17/3/2")
    assert state == HopState(1000, 900, 17, 3, 2)
    after = state.update(record)
    assert (after.zone, after.address) == ("z", "a:1")
    assert HopState.of(after) == state


def test_nothing_negative_is_told() -> None:
    assert HopState.of(InstanceRecord(capacity_units=-1, used_units=-2)).write().startswith("0/0/")


@pytest.mark.parametrize(
    "text", [None, "", "1/2/3/4", "1/2/3/4/x", "-1/2/3/4/5", "1/2/3/4/٣", "1" * 20 + "/2/3/4/5"]
)
def test_what_cannot_be_read_was_not_said(text: str | None) -> None:
    assert HopState.read(text) is None


def test_a_later_version_may_say_more() -> None:
    assert HopState.read("1/2/3/4/5/more/6") == HopState(1, 2, 3, 4, 5)
