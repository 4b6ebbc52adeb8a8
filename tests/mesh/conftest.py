"""The same tests run in the same order of events each time."""

from __future__ import annotations

import math

import anyio
import pytest
from trio._core import _run as trio_run

from mm.testing import cluster

#: What is tested here and is about copies that follow the load.
_ABOUT_DEMAND = ("test_scaler.py", "test_scale_down.py")


@pytest.fixture(autouse=True)
def same_schedule(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Have trio's scheduler decide by the name of the test: a failure can be had again.

    Trio shuffles tasks that could run; this is the switch that it has for hypothesis.
    """
    monkeypatch.setattr(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    trio_run._r.seed(request.node.name)


@pytest.fixture(autouse=True)
def demand_is_seldom_looked_at(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Look each five seconds in place of 0.4: half of all that woke in virtual time was this look,
    most of the time at nothing.
    """
    if request.path.name not in _ABOUT_DEMAND:
        monkeypatch.setitem(cluster.DEFAULT_LIMITS, "demand_interval_s", 5.0)


@pytest.fixture
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load nothing that nobody calls: a copy that a test takes away would come back by itself."""
    monkeypatch.setattr("mm.mesh.filler.USED_WITHIN_MS", -(2**60))
    monkeypatch.setattr("mm.mesh.filler.LOST_AFTER_S", math.inf)


async def _rest(_service: object) -> None:
    await anyio.sleep_forever()


@pytest.fixture
def no_transitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no leader carry out transitions: the test says how they end."""
    monkeypatch.setattr("mm.mesh.transitions.Transitions.run", _rest)
