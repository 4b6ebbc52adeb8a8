"""What instances tell each other about a call, between equal and unequal versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.core.calls import Hop, NamedBy, Outcome, PeerRoute
from mm.core.headers import HeaderList
from mm.core.hop_headers import (
    INSTANCES_MAX,
    HopRequest,
    read_hop_request,
    read_load,
    read_outcome,
    write_hop_request,
)
from mm.core.ids import InstanceId, ModelId

_instances = st.frozensets(st.text(min_size=1, max_size=12).map(InstanceId), max_size=5)


@given(
    st.sampled_from([Hop.HIT_ONLY, Hop.LOAD_LOCAL]),
    _instances,
    _instances,
    st.integers(0, 9),
    st.integers(0, 2**40),
    st.none() | st.text(min_size=1, max_size=12).map(InstanceId),
    st.booleans(),
    st.booleans(),
    st.none() | st.builds(NamedBy, st.text(min_size=1, max_size=12), st.integers(1, 10**14)),
    st.booleans(),
)
def test_what_is_written_is_read(
    hop: Hop,
    tried: frozenset[InstanceId],
    excludes: frozenset[InstanceId],
    left: int,
    size: int,
    sender: InstanceId | None,
    may_redirect: bool,
    may_refuse: bool,
    named_by: NamedBy | None,
    is_kept: bool,
) -> None:
    route = PeerRoute(
        ModelId("m"),
        InstanceId("i"),
        "h:1",
        hop,
        tried=tried,
        excludes=excludes,
        hops_left=left,
        known_size_units=size,
        sender=sender,
        may_redirect=may_redirect,
        may_refuse=may_refuse,
        named_by=named_by,
    )
    read = read_hop_request(write_hop_request(route, is_kept=is_kept))
    asks = (may_redirect and is_kept, may_refuse and is_kept, named_by if is_kept else None)
    assert read == HopRequest(hop, left, tried, excludes, size, sender, *asks)
    call = read.to_call(ModelId("m"), "/p.S/M", 5.0)
    assert (call.hop, call.hops_left, call.tried, call.deadline_s) == (hop, left, tried, 5.0)
    asked = (call.may_redirect, call.may_refuse, call.named_by)
    assert (call.sender, *asked) == (sender, *asks)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ([], HopRequest()),
        ([(b"mm-hop-version", b"9")], HopRequest()),
        # A kind of a newer version: the harmless one. Unknown headers: nothing.
        (
            [(b"mm-hop-kind", b"teleport"), (b"mm-hop-colour", b"red"), (b"mm-hop-version", b"9")],
            HopRequest(Hop.HIT_ONLY, hops_left=0),
        ),
        # Unreadable numbers count as absent.
        (
            [
                (b"mm-hop-kind", b"load-local"),
                (b"mm-hop-left", b"many"),
                (b"mm-hop-size", b"-4"),
                (b"mm-hop-tried", b",,"),
            ],
            HopRequest(Hop.LOAD_LOCAL, hops_left=0),
        ),
    ],
)
def test_other_versions_are_understood_as_far_as_possible(
    mesh: HeaderList, expected: HopRequest
) -> None:
    assert read_hop_request(mesh) == expected


@pytest.mark.parametrize("value", [b"", b"v", b"v/", b"/x", b"/7", b"v/-1", b"v/" + b"1" * 16])
def test_a_vmodel_without_a_revision_is_none(value: bytes) -> None:
    mesh = [(b"mm-hop-kind", b"load-local"), (b"mm-hop-vmodel", value)]
    assert read_hop_request(mesh).named_by is None


def test_a_vmodel_that_is_too_long_is_left_out() -> None:
    for length, is_told in ((1000, True), (5000, False)):
        named_by = NamedBy("v" * length, 7)
        route = PeerRoute(ModelId("m"), InstanceId("i"), "h:1", Hop.LOAD_LOCAL, named_by=named_by)
        read = read_hop_request(write_hop_request(route, is_kept=True))
        assert read.named_by == (named_by if is_told else None)


def test_lists_are_bounded() -> None:
    many = ",".join(f"i{number}" for number in range(INSTANCES_MAX + 9)).encode()
    read = read_hop_request([(b"mm-hop-kind", b"hit-only"), (b"mm-hop-tried", many)])
    assert len(read.tried) == INSTANCES_MAX


def test_results_and_loads() -> None:
    assert read_outcome(None) is None
    assert read_outcome("not-here") is Outcome.NOT_HERE
    assert read_outcome("of a newer version") is Outcome.STALE
    assert read_load([(b"x", b"1"), (b"mm-hop-load", b"17")]) == 17
    assert read_load([(b"mm-hop-load", b"x")]) is None
    assert read_load([]) is None
