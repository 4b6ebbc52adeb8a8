"""Instances that are told to stop hand over what they have: ``testModelMigration`` (around 22.3).

With clients that never stop calling, which the Java test has not: no call may fail.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import cycle

import grpc
import pytest

from mm.pb import mmesh
from tests.system.meshes import Instance, Mesh, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
MODELS = [f"migrate-{number}" for number in range(10)]
LEAVING = ("one", "two", "three")
#: Far above what it takes, below the time limit of the stop and the kill after it.
STOP_S = 60.0


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all(*LEAVING, "four", "five")
        yield mesh


class Caller(threading.Thread):
    """Calls one model after the other at one instance, until told otherwise."""

    def __init__(self, instance: Instance) -> None:
        super().__init__()
        self._instance = instance
        self._ended = threading.Event()
        self.count = 0
        self.failures: list[str] = []

    def run(self) -> None:
        for model_id in cycle(MODELS):
            if self._ended.is_set():
                return
            try:
                self._instance.predict(model_id)
            except grpc.RpcError as exc:
                self.failures.append(f"{model_id}: {exc}")
            self.count += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


def test_model_migration(mesh: Mesh) -> None:
    stays = mesh.instances[-1]
    for number, model_id in enumerate(MODELS):
        mesh[number % 3].register(model_id, "SIZE_1000000_300_0")
        mesh[number % 3].load_here(model_id)
    caller = Caller(stays)
    caller.start()
    try:
        eventually(lambda: caller.count >= 2 * len(MODELS), what="calls")
        for leaver in mesh.instances[:3]:
            leaver.serve.process.send_signal(signal.SIGTERM)
            assert leaver.serve.wait_end(STOP_S) == 0
            told = re.search(r"(\d+) of (\d+) models have moved", leaver.serve.output())
            assert told is not None, leaver.serve.output()
            assert told[1] == told[2], told[0]
        count = caller.count
        eventually(lambda: caller.count >= count + 2 * len(MODELS), what="more calls")
    finally:
        caller.end()
    assert caller.failures == []
    for model_id in MODELS:
        info = stays.status(model_id)
        assert info.status == Status.LOADED
        assert {copy.location for copy in info.model_copy_infos} <= {"four", "five"}
