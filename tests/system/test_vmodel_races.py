"""Sets and deletions of a few vmodels with a few models, at two instances at once, while a third
one is killed: whatever comes between a set and the load that it asked for, the answer is true.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from mm.core.records import ModelRecord, VModelRecord
from mm.core.vmodel_changes import references
from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, mesh_of

pytestmark = pytest.mark.system

SETS = 100
#: Sets of one setter before the third instance goes.
KILLED_AT = SETS // 2


class Setter:
    """One client that sets and deletes at random, and all that it was told."""

    def __init__(self, instance: Instance, seed: int) -> None:
        self._instance = instance
        self._rng = random.Random(seed)
        self.is_half_done = threading.Event()
        self.refusals: list[grpc.RpcError] = []

    def run(self) -> None:
        for number in range(SETS):
            if number == KILLED_AT:
                self.is_half_done.set()
            try:
                self._change()
            except grpc.RpcError as exc:
                self.refusals.append(exc)

    def _change(self) -> None:
        name = f"v{self._rng.randrange(3)}"
        if self._rng.random() < 0.2:
            request = mmesh.DeleteVModelRequest(v_model_id=name)
            method = "/mmesh.ModelMesh/deleteVModel"
            self._instance.call(method, request, mmesh.DeleteVModelResponse)
            return
        target = f"m{self._rng.randrange(5)}"
        reply = self._instance.call(
            "/mmesh.ModelMesh/setVModel",
            mmesh.SetVModelRequest(
                v_model_id=name,
                target_model_id=target,
                model_info=mmesh.ModelInfo(type="example", path="SIZE_1000000_20_0"),
                auto_delete_target_model=True,
                load_now=self._rng.random() < 0.6,
                force=self._rng.random() < 0.4,
            ),
            mmesh.VModelStatusInfo,
        )
        assert target in (reply.active_model_id, reply.target_model_id), reply


def check_references(mesh: Mesh, keys: Keys) -> None:
    """The counts are those of the vmodels, and what nobody refers to is gone."""
    vmodels = [VModelRecord.decode(v.encode()) for v in keys.table(mesh.prefix("vmodels")).values()]
    models = {
        name: ModelRecord.decode(value.encode())
        for name, value in keys.table(mesh.prefix("registry")).items()
    }
    expected = Counter(str(model_id) for each in vmodels for model_id in references(each))
    assert {name: record.references for name, record in models.items()} == expected


def test_no_set_is_told_of_what_became_of_its_model(
    dataplane: str, kv_store: str, keys: Keys, new_service_name: Callable[[], str]
) -> None:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all("dies", "one", "two")
        dying, one, two = mesh.instances
        setters = [Setter(one, 1), Setter(two, 2), Setter(one, 3)]
        with ThreadPoolExecutor(len(setters)) as pool:
            running = [pool.submit(each.run) for each in setters]
            for each in setters:
                each.is_half_done.wait()
            dying.kill()
            for each in running:
                each.result()
        refusals = [refusal for each in setters for refusal in each.refusals]
        # Of the one that dies, and of others having been first time and again.
        wrong = [each for each in refusals if each.code() is not grpc.StatusCode.UNAVAILABLE]
        assert not wrong, wrong[:3]
        check_references(mesh, keys)
