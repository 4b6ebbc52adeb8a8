"""Vmodels whose models were tampered with in etcd: gone, or with a count that cannot be (core 6).

What is wrong is put right by the next change of the vmodel, and said in the log of whoever makes
it; until then calls are served by what is there.
"""

from __future__ import annotations

import json
import re
from functools import partial

import pytest

from mm.pb import mmesh
from tests.system.conftest import Pair
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, record_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
VStatus = mmesh.VModelStatusInfoVModelStatus
QUICK = "SIZE_1000000_10_0"
#: Nobody waits for it.
ENDLESS = "SIZE_1000000_60000_0"


def set_vmodel(
    instance: Instance, name: str, target: str, path: str = QUICK, *, sync: bool = False
) -> mmesh.VModelStatusInfo:
    request = mmesh.SetVModelRequest(
        v_model_id=name,
        target_model_id=target,
        model_info=mmesh.ModelInfo(type="example", path=path),
        auto_delete_target_model=True,
        load_now=sync,
        sync=sync,
    )
    reply = instance.call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)
    assert isinstance(reply, mmesh.VModelStatusInfo)
    return reply


def status_of(instance: Instance, name: str) -> mmesh.VModelStatusInfo:
    request = mmesh.GetVModelStatusRequest(v_model_id=name)
    reply = instance.call("/mmesh.ModelMesh/getVModelStatus", request, mmesh.VModelStatusInfo)
    assert isinstance(reply, mmesh.VModelStatusInfo)
    return reply


def delete_vmodel(instance: Instance, name: str) -> None:
    request = mmesh.DeleteVModelRequest(v_model_id=name)
    instance.call("/mmesh.ModelMesh/deleteVModel", request, mmesh.DeleteVModelResponse)


def answers_by(instance: Instance, name: str, model_id: str) -> bool:
    reply = instance.predict("", metadata=[("mm-vmodel-id", name)])
    return reply.results[0].category.endswith(f"by model {model_id}")


def is_said(mesh: Mesh, pattern: str) -> bool:
    """Whether an instance's log has it: whoever made the change."""
    return any(re.search(pattern, line) for each in mesh.instances for line in each.serve.lines)


def set_count(keys: Keys, mesh: Mesh, model_id: str, count: int | None) -> None:
    """Have the record of a model, once it has a copy that is as it stays for now, say that so many
    refer to it; None: nothing of it.
    """
    registry = mesh.prefix("registry")
    state = "loading" if model_id.endswith("b") else "ready"
    keys.wait(registry, lambda records: f'"state":"{state}"' in records.get(model_id, ""))
    record = record_of(keys.table(registry), model_id)
    assert record.pop("refs") == 1
    if count is not None:
        record["refs"] = count
    keys.put(registry + model_id, json.dumps(record))
    for each in mesh.instances:
        eventually(lambda at=each: told_count(at, model_id) == max(0, count or 0))


def told_count(instance: Instance, model_id: str) -> int:
    request = mmesh.ListModelsRequest(id_prefix=model_id)
    reply = instance.call("/mmesh.ModelMesh/listModels", request, mmesh.ListModelsResponse)
    return int(reply.models[0].references)


def test_a_target_that_vanishes_in_mid_transition(pair: Pair, keys: Keys) -> None:
    """The one that served goes on; each instance says that the target is not there; set again, it
    takes over all the same.
    """
    mesh, both = pair.mesh, (pair.holder, pair.other)
    set_vmodel(pair.other, "robbed", "robbed-1", sync=True)
    status = set_vmodel(pair.holder, "robbed", "robbed-2", ENDLESS)
    assert status.status == VStatus.TRANSITIONING
    registry = mesh.prefix("registry")
    keys.wait(registry, lambda records: "instanceIds" in records["robbed-2"])
    keys.delete(registry + "robbed-2")
    for each in both:
        eventually(lambda at=each: status_of(at, "robbed").status == VStatus.TRANSITION_FAILED)
        status = status_of(each, "robbed")
        assert (status.active_model_id, status.target_model_id) == ("robbed-1", "robbed-2")
        assert status.target_model_status is not None
        assert status.target_model_status.status == Status.LOADING_FAILED
        assert status.target_model_status.errors == ["Target model robbed-2 not found"]
        assert answers_by(each, "robbed", "robbed-1")
    eventually(partial(is_said, mesh, "robbed stays with its model: model robbed-2 does not exist"))

    status = set_vmodel(pair.other, "robbed", "robbed-2", sync=True)
    assert (status.status, status.active_model_id) == (VStatus.DEFINED, "robbed-2")
    for each in both:
        eventually(partial(answers_by, each, "robbed", "robbed-2"))
    records = keys.table(registry)
    assert "robbed-1" not in records, "it went with its last reference"
    assert record_of(records, "robbed-2")["refs"] == 1
    delete_vmodel(pair.holder, "robbed")
    assert "robbed-2" not in keys.table(registry)


@pytest.mark.parametrize("count", [None, 0, -3])
def test_a_count_that_cannot_be(pair: Pair, keys: Keys, count: int | None) -> None:
    """Of the model that serves, then of the one that is to: nobody is refused or loses a model for
    it, and each is right once the vmodel was changed.
    """
    mesh, registry = pair.mesh, pair.mesh.prefix("registry")
    name = f"miscounted-{count}"
    first, second = f"{name}-a", f"{name}-b"
    # The leader counts, too, now and then: it may be the first to see it.
    said = f"had {count or 0} references, (at least 1 was right;|1 is right:) put right"
    set_vmodel(pair.other, name, first, sync=True)
    set_count(keys, mesh, first, count)
    set_vmodel(pair.holder, name, second, ENDLESS)
    assert record_of(keys.table(registry), first)["refs"] == 1
    eventually(partial(is_said, mesh, f"model {first} {said}"))
    for each in (pair.holder, pair.other):
        assert answers_by(each, name, first)

    set_count(keys, mesh, second, count)
    delete_vmodel(pair.other, name)
    records = keys.table(registry)
    assert first not in records, "its count was right again, and it went with its last reference"
    assert not json.loads(records.get(second, "{}")).get("refs")
    eventually(partial(is_said, mesh, f"model {second} {said}"))
    pair.holder.unregister(second)
    assert second not in keys.table(registry)
