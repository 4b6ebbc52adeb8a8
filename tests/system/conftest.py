"""Fixtures of the system tests: one etcd for all, meshes of their own for each test or module.

``dataplane`` is the parameter of the conformance suite: what holds for one data plane has to hold
for every other, unchanged.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from mm.edge.embedded_etcd import EmbeddedEtcd, embedded_etcd
from tests.system.etcd import Keys

_numbers = itertools.count(1)


@pytest.fixture(scope="session", params=["python"])
def dataplane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def etcd() -> Iterator[EmbeddedEtcd]:
    """An etcd for the session; each mesh has a service name of its own in it."""
    started, stop = threading.Event(), threading.Event()
    found: list[EmbeddedEtcd] = []

    async def keep() -> None:
        async with embedded_etcd() as server:
            found.append(server)
            started.set()
            await asyncio.to_thread(stop.wait)

    # The thread lives as long as the etcd, which dies with the thread that started it.
    thread = threading.Thread(target=lambda: asyncio.run(keep()), daemon=True)
    thread.start()
    assert started.wait(20), "etcd did not start"
    yield found[0]
    stop.set()
    thread.join(20)


@pytest.fixture(scope="session")
def kv_store(etcd: EmbeddedEtcd) -> str:
    return f"etcd:http://{etcd.endpoint}"


@pytest.fixture(scope="session")
def new_service_name() -> Callable[[], str]:
    """Answer service names that no other mesh of this session has."""
    return lambda: f"test-{next(_numbers)}"


@pytest.fixture(scope="session")
def keys(etcd: EmbeddedEtcd) -> Iterator[Keys]:
    """The records in the session's etcd."""
    keys = Keys(str(etcd.endpoint))
    yield keys
    keys.close()
