"""Fixtures that need the outside world: one etcd for all tests of this layer that want one."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mm.edge.etcd_process import EtcdProcess, find_binary
from mm.edge.memory_store import MemoryStore
from tests.edge.store_world import MEMORY_TIMEOUT_S, World, etcd_world, memory_world, slow_store


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


@pytest.fixture(params=["memory", "simulated", pytest.param("etcd", marks=pytest.mark.etcd)])
def store_kind(request: pytest.FixtureRequest) -> str | EtcdProcess:
    """What stands behind the store; an etcd is asked for here because starting it blocks."""
    kind: str = request.param
    return request.getfixturevalue("shared_etcd") if kind == "etcd" else kind


@pytest.fixture
async def world(store_kind: str | EtcdProcess) -> AsyncIterator[World]:
    """Each kind of store in turn: what holds here holds for all of them."""
    match store_kind:
        case "memory":
            yield memory_world(MemoryStore(timeout_s=MEMORY_TIMEOUT_S))
        case "simulated":
            yield memory_world(slow_store(timeout_s=MEMORY_TIMEOUT_S))
        case etcd:
            assert isinstance(etcd, EtcdProcess)
            async with etcd_world(etcd) as world:
                yield world
