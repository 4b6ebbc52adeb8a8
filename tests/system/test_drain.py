"""Instances that are told to stop hand over what they have: ``testModelMigration`` (around 22.3).

With clients that never stop calling, which the Java test has not: at an instance that stays, and at
each that stops, as long as it listens. Those have a second address, as clients in a cluster have,
and no retries of their own: no call may fail, and none may wait for a load.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import grpc
import pytest

from mm.limits import Limits
from mm.pb import mmesh
from tests.system.meshes import CALL_TIMEOUT_S, Instance, Mesh, channel_to, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
MODELS = [f"migrate-{number}" for number in range(10)]
#: Many calls come in the time of a load: if they had to wait for it, some would.
PATH = "SIZE_1000000_500_0"
LEAVING = ("one", "two", "three")
STAYING = ("four", "five")
#: Far above what it takes, below the time limit of the stop and the kill after it.
STOP_S = 60.0
#: However soon all have moved, new connections are taken for so long.
LISTENS_S = Limits().stop_listens_s
PAUSE_S = 0.02


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    # Copies come by the drain alone.
    settings = {"MM_DATAPLANE": dataplane, "MM_SCALEUP_RPM_THRESHOLD": "1000000"}
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        mesh.add_all(*LEAVING, *STAYING)
        yield mesh


class Caller(threading.Thread):
    """Calls one model after the other at the first instance that listens, until told otherwise."""

    def __init__(self, *instances: Instance) -> None:
        super().__init__()
        self._channel = channel_to(*(each.port for each in instances))
        self._ended = threading.Event()
        self.count = 0
        self.failures: list[str] = []

    def run(self) -> None:
        stub: Any = self._channel.unary_unary(
            "/mmesh.ExamplePredictor/predict",
            request_serializer=bytes,
            response_deserializer=mmesh.PredictResponse.parse,
        )
        request = mmesh.PredictRequest(text="hello")
        for model_id in cycle(MODELS):
            if self._ended.wait(PAUSE_S):
                return
            try:
                stub(request, metadata=(("mm-model-id", model_id),), timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as exc:
                self.failures.append(f"{model_id}: {exc}")
            self.count += 1

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._channel.close()


def check_none_waited(mesh: Mesh, instance: Instance) -> None:
    """No call waited for a load; a machine that stood still for seconds proves nothing."""
    is_excused = any("does not answer" in each.serve.output() for each in mesh.instances)
    assert is_excused or instance.statistics().misses == 0


def stop(mesh: Mesh, leaver: Instance) -> None:
    """SIGTERM; all models that it has move."""
    check_none_waited(mesh, leaver)
    signalled_s = time.monotonic()
    leaver.serve.process.send_signal(signal.SIGTERM)
    assert leaver.serve.wait_end(STOP_S) == 0
    assert leaver.serve.ended_s - signalled_s >= LISTENS_S
    told = re.search(r"(\d+) of (\d+) models have moved", leaver.serve.output())
    assert told is not None, leaver.serve.output()
    assert told[1] == told[2], told[0]


def test_model_migration(mesh: Mesh) -> None:
    stays = mesh.instances[-1]
    for number, model_id in enumerate(MODELS):
        mesh[number % 3].register(model_id, PATH)
        mesh[number % 3].load_here(model_id)
    callers = [Caller(stays), *(Caller(leaver, stays) for leaver in mesh.instances[:3])]
    with ExitStack() as stack:
        for caller in callers:
            caller.start()
            stack.callback(caller.end)
        wait_calls(callers)
        for leaver in mesh.instances[:3]:
            stop(mesh, leaver)
        wait_calls(callers)
    assert [caller.failures for caller in callers] == [[]] * len(callers)
    for instance in mesh.instances[3:]:
        check_none_waited(mesh, instance)
    for model_id in MODELS:
        info = stays.status(model_id)
        assert info.status == Status.LOADED
        assert {copy.location for copy in info.model_copy_infos} <= set(STAYING)


def wait_calls(callers: list[Caller]) -> None:
    """Return when each has called every model twice more."""
    wanted = [caller.count + 2 * len(MODELS) for caller in callers]
    eventually(
        lambda: all(c.count >= count for c, count in zip(callers, wanted, strict=True)),
        what="calls",
    )
