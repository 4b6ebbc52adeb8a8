"""Fixtures of the system tests: one etcd for all, meshes of their own for each test or module.

``dataplane`` is the parameter of the conformance suite: what holds for one data plane has to hold
for every other, unchanged. ``make test`` runs all of it on the wire, the default, and the modules
about calls on the Python data plane too; ``make test-matrix`` runs everything on both. Behind a
``+`` stands how instances are secured: "wire+mtls" (``Mesh``).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest

from mm.edge.embedded_etcd import EmbeddedEtcd, embedded_etcd
from mm.pb import mmesh
from tests.conftest import ALL_DATAPLANES
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, mesh_of
from tests.system.processes import START_TIMEOUT_S, eventually

#: Modules that every run has on Python as well: how calls are routed, bounded, streamed, cancelled
#: and answered. What others are about goes on behind either, in the same code.
_ON_BOTH = frozenset(
    f"test_{name}"
    for name in (
        "access",
        "bad_input",
        "balancing",
        "conformance_cluster",
        "conformance_dataplane",
        "conformance_injection",
        "conformance_missing_model",
        "conformance_single",
        "conformance_vmodel_calls",
        "foreign_calls",
        "foreign_services",
        "management_port",
        "metrics",
        "mounted_files",
        "payloads",
        "refusals",
        "tls",
    )
)

#: Modules that call instances in no other way than ``Instance`` does, so that they can have TLS: in
#: the matrix all of them, on each data plane, with and without certificates of clients,
_IN_TLS = frozenset(
    f"test_conformance_{name}"
    for name in (
        *("cluster", "copies", "constraints", "dataplane", "evictions", "failures", "injection"),
        *("management", "missing_model", "priority", "refusals", "runtime", "single"),
        *("vmodel_calls", "vmodels"),
    )
)
#: and this one in every run.
_IN_TLS_ALWAYS = {"test_conformance_single": "wire+mtls"}

_numbers = itertools.count(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dataplane" in metafunc.fixturenames:
        module = metafunc.definition.path.stem
        is_matrix = metafunc.config.getoption(ALL_DATAPLANES)
        dataplanes = ["wire", "python"] if is_matrix or module in _ON_BOTH else ["wire"]
        if is_matrix and module in _IN_TLS:
            dataplanes += [f"{each}+{how}" for each in dataplanes for how in ("tls", "mtls")]
        elif module in _IN_TLS_ALWAYS:
            dataplanes.append(_IN_TLS_ALWAYS[module])
        metafunc.parametrize("dataplane", dataplanes, indirect=True, scope="session")


@pytest.fixture(scope="session")
def dataplane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def running_etcd() -> Iterator[EmbeddedEtcd]:
    """An etcd."""
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
    assert started.wait(START_TIMEOUT_S), "etcd did not start"
    yield found[0]
    stop.set()
    thread.join(START_TIMEOUT_S)


@pytest.fixture(scope="session")
def etcd() -> Iterator[EmbeddedEtcd]:
    """An etcd for the session; each mesh has a service name of its own in it."""
    with running_etcd() as server:
        yield server


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


@dataclass(frozen=True, slots=True)
class Pair:
    """Two instances, and the model ``echo`` with its one copy at ``holder``."""

    mesh: Mesh
    holder: Instance
    other: Instance

    def targets(self) -> dict[str, str]:
        """Answer where a client can call: 0, 1 or 2 hops before the runtime."""
        return {
            "runtime": f"unix:{self.mesh.socket_path(self.holder.instance_id)}",
            "holder": f"127.0.0.1:{self.holder.port}",
            "other": f"127.0.0.1:{self.other.port}",
        }


def _is_loaded(instance: Instance, model_id: str) -> bool:
    return instance.status(model_id).status == mmesh.ModelStatusInfoModelStatus.LOADED


@pytest.fixture(scope="session")
def pair(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Pair]:
    """A mesh for tests that leave it as it was: one copy, however much and long it is called."""
    settings = {
        "MM_DATAPLANE": dataplane,
        "MM_TYPE_CONSTRAINTS": json.dumps({"held": {"required": ["holder"]}}),
    }
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        holder = mesh.add("pair-a", settings={"MM_LABELS": "holder"})
        other = mesh.add("pair-b")
        holder.register("echo", "SIZE_1000000_10_0", load_now=True, sync=True, model_type="held")
        eventually(partial(_is_loaded, other, "echo"), what="both know where it is")
        yield Pair(mesh, holder, other)
        # Whatever was called, nobody moved the model: the tests saw the hops that they name.
        assert [c.location for c in other.status("echo").model_copy_infos] == [holder.instance_id]
