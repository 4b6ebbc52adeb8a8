"""The two tables under one fixture; what is particular to one is in the test that says so."""

from __future__ import annotations

import pytest

from mm import _lru, _lru_py


@pytest.fixture(params=["extension", "python"])
def table_type(request: pytest.FixtureRequest) -> type[_lru.Table]:
    """Answer the class under test."""
    return _lru.Table if request.param == "extension" else _lru_py.Table  # type: ignore[return-value]
