"""The two tables under one fixture: what is said of one holds for the other.

Each table that ``make_table`` made is walked by ``check_invariants`` when its test ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mm import _lru, _lru_py

MakeTable = Callable[..., _lru.Table]


#: To type checkers both are the one interface that `mm/_lru.pyi` tells.
TABLES: dict[str, Any] = {"extension": _lru.Table, "python": _lru_py.Table}


@pytest.fixture(params=TABLES)
def table_type(request: pytest.FixtureRequest) -> type[_lru.Table]:
    """Answer the class under test."""
    table: type[_lru.Table] = TABLES[request.param]
    return table


@pytest.fixture
def make_table(table_type: type[_lru.Table]) -> Iterator[MakeTable]:
    made: list[_lru.Table] = []

    def make(capacity_units: int = 100) -> _lru.Table:
        made.append(table_type(capacity_units))
        return made[-1]

    yield make
    for each in made:
        each.check_invariants()


@pytest.fixture
def table(make_table: MakeTable) -> _lru.Table:
    return make_table()
