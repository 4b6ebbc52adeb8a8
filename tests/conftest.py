"""Fixtures that every layer's tests share.

Which event loop an async test runs on is told by where it lives (the clocks in this file are the
only ones that pytest knows of): ``tests/mesh`` runs on asyncio and on trio, whose clock jumps over
every wait; everything else runs on asyncio, as production does. ``virtual_time`` marks a test that
needs the jumping clock and so runs on trio only.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from grpc._cython import cygrpc  # type: ignore[attr-defined]
from hypothesis import HealthCheck, settings
from trio.testing import MockClock

# grpc.aio joins its polling thread when its last object is freed. The garbage collector does so at
# any moment, also in the midst of a module of mm, which would then seem to block: keep one alive.
cygrpc.init_grpc_aio()

# How fast the machine is today says nothing of what is tested. Examples are other ones in each run:
# half as many as usual each time find as much in two, and all of them took 20 s of CPU.
settings.register_profile(
    "any-machine",
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any-machine")

# Several processes share the tests: pools of threads in each, which wait for each other in busy
# loops, took three times the CPU. Read by numpy's libraries when they are loaded.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

# Simulated clusters make many small objects among the very many that thousands of collected tests
# keep: looking for cycles as often as is usual took a fifth of their CPU.
gc.set_threshold(20_000, 20, 20)

_TESTS = Path(__file__).parent
_MESH_TESTS = _TESTS / "mesh"
#: Files that take longest, and folders by what their tests mostly do (wait for processes, or
#: compute): begun in this order, so that no worker is left with a long file when others are done.
_LONGEST_FIRST = (
    "sim/test_seeds.py",
    "system/test_demo.py",
    "system/test_etcd_loss.py",
    "sim/test_scenarios.py",
    "sim/test_breaks.py",
    "system/test_upgrade.py",
    "system/test_transitions.py",
    "system/test_readme.py",
    "pod",
    "system",
    "sim",
    "table",
    "runtime",
    "mesh",
)

#: Every test that can runs on every data plane: ``make test-matrix``.
ALL_DATAPLANES = "--all-dataplanes"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(ALL_DATAPLANES, action="store_true", help="every system test on each of them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)


def pytest_collection_finish() -> None:
    # Thousands of tests stay to the end: nobody need look at them again. A simulated run ends with
    # a collection of everything, which took a tenth of its CPU.
    gc.collect()
    gc.freeze()


def _turn(item: pytest.Item) -> int:
    file = item.path.relative_to(_TESTS) if item.path.is_relative_to(_TESTS) else item.path
    for turn, name in enumerate(_LONGEST_FIRST):
        if name in (file.as_posix(), file.parts[0]):
            return turn
    return len(_LONGEST_FIRST)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "anyio_backend" not in metafunc.fixturenames:
        return
    definition = metafunc.definition
    if definition.get_closest_marker("virtual_time"):
        backends = ["trio"]
    elif definition.path.is_relative_to(_MESH_TESTS):
        backends = ["asyncio", "trio"]
    else:
        backends = ["asyncio"]
    metafunc.parametrize("anyio_backend", backends, indirect=True)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    if request.param == "trio":
        # A fresh clock each test: virtual time starts at nought and never waits.
        return "trio", {"clock": MockClock(autojump_threshold=0)}
    return "asyncio", {}


@pytest.fixture(autouse=True)
def no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail an async test in which a module of mm blocks the event loop."""
    if "anyio_backend" not in request.fixturenames:
        yield
        return
    with blockbuster_ctx("mm"):
        yield
