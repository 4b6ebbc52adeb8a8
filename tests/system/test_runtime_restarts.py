"""Runtimes with the habits of the adapters, which restart, fail and come back otherwise (issue 9
part 8; interop 0.22-0.28 and 4).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from tests.system.adapter_runtime import ADAPTERS, CAPACITY_BYTES, AdapterRuntime, Status
from tests.system.grpcio_runtime import MIB, WAIT_S
from tests.system.meshes import Instance, Mesh, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Code = grpc.StatusCode
LOADED = mmesh.ModelStatusInfoModelStatus.LOADED
UNIT_BYTES = 8192


def echo(instance: Instance, model_id: str) -> Any:
    stub: Any = instance.channel.unary_unary("/test.Runtime/echo")
    return stub(b"echo", metadata=(("mm-model-id", model_id),), timeout=WAIT_S)


def serves(instance: Instance, model_id: str) -> bool:
    """Whether a call is answered; while the runtime is away it is UNAVAILABLE, nothing else."""
    stub: Any = instance.channel.unary_unary("/test.Runtime/echo")
    call = stub.future(b"echo", metadata=(("mm-model-id", model_id),), timeout=WAIT_S)
    assert call.code() in (Code.OK, Code.UNAVAILABLE), call
    return bool(call.code() is Code.OK)


def beside(mesh: Mesh, path: str) -> Instance:
    return mesh.add_beside("only", None, {"INTERNAL_GRPC_SOCKET_PATH": path})


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_life_with_each_adapter(
    adapter: str, dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> None:
    """Start, load, call, a load that fails, a lost model, a crash; it comes back larger, and says
    FAILING at first. Its status, which is a reset, is asked for twice in all this.
    """
    habits = ADAPTERS[adapter]
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        path = mesh.socket_path(adapter)
        with AdapterRuntime(f"unix:{path}", habits).serving() as runtime:
            only = beside(mesh, path)
            assert runtime.statuses_count == 3, "until READY"
            assert only.register("m", load_now=True, sync=True).status == LOADED
            assert echo(only, "m") == b"echo"
            stub: Any = only.channel.unary_unary("/test.Runtime/hold")
            code, text = refusal(partial(stub, b"", metadata=(("mm-model-id", "m"),)))
            assert (code, "not found or not permitted" in text) == (Code.UNIMPLEMENTED, True)
            status = only.register("bad", "broken", load_now=True, sync=True)
            assert "Failed to load Model due to a test" in status.errors[0]
            eventually(lambda: "bad" in runtime.unloads, what="what failed is unloaded")
            runtime.lose("m")
            assert echo(only, "m") == b"echo"
            assert runtime.loads.count("m") == 2
            assert bool(runtime.measurements) == habits.measures
            assert (runtime.statuses_count, runtime.violations) == (3, [])
        eventually(lambda: only.statistics().models_loaded == 0, what="its copies are gone")
        code, text = refusal(partial(echo, only, "m"))
        assert code is Code.UNAVAILABLE
        assert "runtime" in text
        script = [Status.STARTING, Status.FAILING, Status.READY]
        larger = AdapterRuntime(f"unix:{path}", habits, script, 2 * CAPACITY_BYTES)
        with larger.serving() as runtime:
            eventually(partial(serves, only, "m"), what="the runtime is back")
            assert runtime.loads == ["m"]
            assert only.statistics().capacity_units == 2 * CAPACITY_BYTES // UNIT_BYTES
            assert only.register("n", load_now=True, sync=True).status == LOADED
            assert (runtime.statuses_count, runtime.violations) == (3, [])
            told = only.serve.output()
            assert "says status FAILING" in told
            assert f"capacity_bytes {CAPACITY_BYTES} -> {2 * CAPACITY_BYTES}" in told


def test_a_runtime_that_comes_back_smaller(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> None:
    """With less memory than was loaded: so much is loaded as fits, and never more."""
    habits = ADAPTERS["ovms"]
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        path = mesh.socket_path("smaller")
        with AdapterRuntime(f"unix:{path}", habits, capacity_bytes=64 * MIB).serving() as runtime:
            runtime.loaded_size_bytes = 4 * MIB
            only = beside(mesh, path)
            for number in range(12):
                assert only.register(f"m{number}", load_now=True, sync=True).status == LOADED
            assert only.statistics().models_loaded == 12
        eventually(lambda: only.statistics().models_loaded == 0, what="its copies are gone")
        smaller = AdapterRuntime(f"unix:{path}", habits, capacity_bytes=16 * MIB)
        with smaller.serving() as runtime:
            runtime.loaded_size_bytes = 4 * MIB
            eventually(partial(serves, only, "m0"), what="the runtime is back")
            for number in range(12):
                assert echo(only, f"m{number}") == b"echo"
                assert len(runtime._models) <= 4
            assert runtime.violations == []


def test_a_socket_that_vanishes(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> None:
    """Somebody cleans up: connections that are there carry calls and loads. A runtime that makes
    its socket anew is another one.
    """
    habits = ADAPTERS["mlserver"]
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        path = mesh.socket_path("vanishes")
        with AdapterRuntime(f"unix:{path}", habits).serving() as runtime:
            only = beside(mesh, path)
            assert only.register("m", load_now=True, sync=True).status == LOADED
            assert echo(only, "m") == b"echo"
            os.unlink(path)
            assert echo(only, "m") == b"echo"
            assert only.register("n", load_now=True, sync=True).status == LOADED
            assert runtime.statuses_count == 3
        eventually(lambda: only.statistics().models_loaded == 0, what="its copies are gone")
        assert not Path(path).exists()
        with AdapterRuntime(f"unix:{path}", habits).serving() as runtime:
            eventually(partial(serves, only, "m"), what="the runtime is back")
            assert (runtime.loads, runtime.statuses_count) == (["m"], 3)
