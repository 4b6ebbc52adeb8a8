"""The same tests run in the same order of events each time."""

from __future__ import annotations

import pytest
from trio._core import _run as trio_run


@pytest.fixture(autouse=True)
def same_schedule(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Have trio's scheduler decide by the name of the test: a failure can be had again.

    Trio shuffles tasks that could run; this is the switch that it has for hypothesis.
    """
    monkeypatch.setattr(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    trio_run._r.seed(request.node.name)
