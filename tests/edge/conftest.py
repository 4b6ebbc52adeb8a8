"""Fixtures that need the outside world: one etcd for all tests of this layer that want one."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mm.edge.etcd_process import EtcdProcess, find_binary
from tests.edge.store_world import World, etcd_world, memory_world


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[EtcdProcess]:
    """A running etcd. Tests share it: each keeps to a root prefix of its own and leaves it up."""
    with tempfile.TemporaryDirectory(prefix="mm-test-etcd-") as directory:
        etcd = EtcdProcess(find_binary(), Path(directory))
        try:
            etcd.start()
            yield etcd
        finally:
            etcd.stop()


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
def etcd_or_none(request: pytest.FixtureRequest) -> EtcdProcess | None:
    """What stands behind the store; asked for here because starting it blocks."""
    return request.getfixturevalue("shared_etcd") if request.param == "etcd" else None


@pytest.fixture
async def world(etcd_or_none: EtcdProcess | None) -> AsyncIterator[World]:
    """Each kind of store in turn: what holds here holds for all of them."""
    if etcd_or_none is None:
        yield memory_world()
        return
    async with etcd_world(etcd_or_none) as world:
        yield world
