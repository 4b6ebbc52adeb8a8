"""What the keeper does by itself, without a mesh: how long it waits, and what it gathers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from mm.config import Config
from mm.core.absences import Absences
from mm.core.ids import ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.records import ModelRecord
from mm.mesh.keeper import BACK_S, Keeper
from mm.mesh.policy_index import PolicyIndex
from mm.testing.cluster import INFO
from tests.mesh.calls import A, B


def bare_keeper(index: PolicyIndex) -> Keeper:
    """Answer one that does not run."""
    return Keeper(
        config=Config(service_name="s", kv_store="memory", instance_id=A),
        registry=cast(Any, SimpleNamespace(policies=index)),
        members=cast(Any, SimpleNamespace(present=lambda: frozenset("a"))),
        leader=cast(Any, SimpleNamespace(is_leader=True)),
        policies=cast(Any, SimpleNamespace(unmet={})),
        preloader=cast(Any, None),
        clock=cast(Any, None),
    )


def test_no_wait_ends_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time that was slept may end a rounding before the moment that was meant: no rest of a wait
    is so short that the clock does not move for it.
    """
    now_s = 0.0
    monkeypatch.setattr(anyio, "current_time", lambda: now_s)
    keeper = bare_keeper(PolicyIndex())
    for number in range(3_000):
        now_s = number / 7
        absences = keeper._absences = Absences(A, BACK_S, 600.0)
        absences.look(frozenset((A, B)), frozenset(), now_s)
        absences.look(frozenset((A,)), frozenset(), now_s)
        while not absences.look(frozenset((A,)), frozenset(), now_s).lost:
            before_s = now_s
            now_s += keeper._wait_s(now_s)
            assert now_s > before_s
        assert now_s - number / 7 < 3


def test_who_does_not_lead_gathers_nothing() -> None:
    """It looks at all of them when it leads."""
    index = PolicyIndex()
    keeper = bare_keeper(index)
    policy = ModelPolicy(1).written({})
    for number in range(10):
        index.note(ModelId(f"m{number}"), ModelRecord(INFO, policy_details=policy))
    assert len(index) == 10
    assert not keeper._changed
