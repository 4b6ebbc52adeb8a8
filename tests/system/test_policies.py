"""Policies with real processes: a copy that is lost is replaced, a pinned one is not evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import grpc
import pytest

from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
MIB = 2**20
#: Room for ten models of 20 MiB, and a reserve of a tenth.
ROOM = 10
MODEL = f"SIZE_{20 * MIB}_5_20"
ARGS = ["--capacity", str(28_445 * 8192), "--default-size", str(20 * MIB)]


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all("one", "two", "three", runtime_args=ARGS)
        yield mesh


def set_policy(
    instance: Instance, model_id: str, min_copies: int | None = None, pinned: bool | None = None
) -> mmesh.ModelPolicyInfo:
    request = mmesh.SetModelPolicyRequest(model_id, min_copies=min_copies, pinned=pinned)
    reply = instance.call("/mmesh.ModelMesh/setModelPolicy", request, mmesh.ModelPolicyInfo)
    assert isinstance(reply, mmesh.ModelPolicyInfo)
    return reply


def holders(instance: Instance, model_id: str) -> set[str]:
    infos = instance.status(model_id).model_copy_infos
    return {info.location for info in infos if info.copy_status == Status.LOADED}


def test_a_copy_lost_with_its_instance_is_replaced_and_a_pinned_one_survives_a_sweep(
    mesh: Mesh, keys: Keys
) -> None:
    one = mesh[0]
    one.register("kept", MODEL)
    one.register("other", MODEL, load_now=True, sync=True)
    code, text = refusal(partial(set_policy, one, "kept", 4))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert text.startswith("min_copies is 4, but 3 instances may hold models of type example:")
    assert refusal(partial(set_policy, one, "unknown", 1))[0] is grpc.StatusCode.NOT_FOUND
    code, _ = refusal(partial(set_policy, one, "kept", -1))
    assert code is grpc.StatusCode.INVALID_ARGUMENT

    # Nobody calls it.
    set_policy(mesh[1], "kept", 2, True)
    eventually(lambda: len(holders(one, "kept")) == 2, what="two copies")
    lost = next(each for each in mesh.instances if each.instance_id in holders(one, "kept"))
    lost.kill()
    # What its lease would do by itself 20 s later.
    record = lost.prefix("instances") + lost.instance_id
    keys.revoke(keys.lease_of(record))
    left = [each for each in mesh.instances if each is not lost]
    there = {each.instance_id for each in left}
    eventually(lambda: holders(left[0], "kept") == there, what="the lost copy is replaced")
    met = mmesh.ModelPolicyInfo(min_copies=2, pinned=True, ready_copies=2)
    eventually(lambda: set_policy(left[1], "kept") == met, what="and that is told")

    # Twice what both have room for, each used later than "kept".
    before = {each.instance_id: each.statistics().loads for each in left}
    for number in range(4 * ROOM):
        path = MODEL.replace("_5_", "_1_")
        left[number % 2].register(f"sweep-{number}", path, load_now=True, sync=True)
    assert sum(each.statistics().evictions for each in left) >= 2 * ROOM
    assert holders(left[0], "other") == set()
    assert holders(left[0], "kept") == there
    # Not loaded anew: each copy has been here all the time.
    loads = sum(each.statistics().loads - before[each.instance_id] for each in left)
    assert loads == 4 * ROOM
    assert all(each.statistics().pinned_units >= 20 * MIB // 8192 for each in left)
    assert left[0].predict("kept").results[0].confidence == 1.0
