"""Conformance with the Java mesh: vmodels (around 22.6), and what its tests leave out (23).

VModelsTest.vModelsTest is ``test_vmodels``, vModelOwnerTest ``test_owner``; ZookeeperVModelsTest is
the same two over a store that is not supported. Section 23's gaps that have to do with vmodels:

    default owner                          test_default_owner
    force                                  test_force
    TRANSITION_FAILED, and recovery        test_failed_and_recovered,
                                           test_a_target_that_failed_and_is_set_again
    delete with autoDelete                 test_failed_and_recovered
    odd ids, empty ids                     test_any_text_may_be_an_id,
                                           test_ids_that_nothing_can_have
    several vmodels in one call,           test_several_vmodels_in_one_call,
    ids as -bin, both kinds of id at once  test_conformance_vmodel_calls
    ids in messages                        test_conformance_injection.TestVModelExtraction
    mm-balanced                            test_conformance_cluster
    every refusal; read-only mode          test_conformance_refusals
    leader failover                        test_transitions
    static registration                    test_static_models
    etcd lost in a transaction             tests/edge/test_vmodel_nodes.py

Beyond it: streams (``test_vmodel_switches``), corrupt records (``test_corrupt_records``), wrong
counts and missing models (``test_vmodel_repairs``), watches (``test_command_line``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.grpcio_runtime import Held, grpcio_runtime
from tests.system.meshes import Instance, Mesh, mesh_of, record_of
from tests.system.processes import eventually
from tests.system.yardstick import yardstick_of

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
VStatus = mmesh.VModelStatusInfoVModelStatus
MODERN = "/mmesh.ModelMesh/"
LEGACY = "/com.ibm.watson.tas.proto.TasRuntime/"
SIZE = "SIZE_1000000_10_0"
#: Without sync an answer takes no longer, beside what the machine takes for itself.
ASYNC_S_MAX = 0.1
#: What an unknown vmodel is: every field empty, and no message inside.
NOTHING = mmesh.VModelStatusInfo()


def set_vmodel(
    instance: Instance,
    vmodel_id: str,
    target: str,
    path: str | None = SIZE,
    *,
    service: str = MODERN,
    timeout_s: float = 60.0,
    **wishes: Any,
) -> mmesh.VModelStatusInfo:
    info = None if path is None else mmesh.ModelInfo(type="example", path=path)
    request = mmesh.SetVModelRequest(
        v_model_id=vmodel_id, target_model_id=target, model_info=info, **wishes
    )
    reply = instance.call(
        service + "setVModel", request, mmesh.VModelStatusInfo, timeout_s=timeout_s
    )
    assert isinstance(reply, mmesh.VModelStatusInfo)
    return reply


def status_of(
    instance: Instance, vmodel_id: str, owner: str = "", service: str = MODERN
) -> mmesh.VModelStatusInfo:
    request = mmesh.GetVModelStatusRequest(v_model_id=vmodel_id, owner=owner)
    reply = instance.call(service + "getVModelStatus", request, mmesh.VModelStatusInfo)
    assert isinstance(reply, mmesh.VModelStatusInfo)
    return reply


def delete_vmodel(
    instance: Instance, vmodel_id: str, owner: str = "", service: str = MODERN
) -> None:
    request = mmesh.DeleteVModelRequest(v_model_id=vmodel_id, owner=owner)
    instance.call(service + "deleteVModel", request, mmesh.DeleteVModelResponse)


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code(), error.details()


@pytest.fixture(scope="module")
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all("a", "b")
        yield mesh


@pytest.mark.parametrize("service", [MODERN, LEGACY])
def test_owner(mesh: Mesh, service: str) -> None:
    """VModelsTest.vModelOwnerTest."""
    a, b = mesh.instances
    name, model = f"owned-{len(service)}", f"model-{len(service)}"

    def set_as(owner: str, instance: Instance = a) -> mmesh.VModelStatusInfo:
        return set_vmodel(instance, name, model, service=service, owner=owner)

    assert set_vmodel(a, f"{name}-free", model, service=service).owner == ""
    assert set_as("me").owner == "me"
    for instance in (a, b):
        assert status_of(instance, name, "", service) == status_of(instance, name, "me", service)
        for owner in ("me", ""):
            assert set_as(owner, instance).owner == "me"
            status = status_of(instance, name, owner, service)
            assert (status.status, status.owner) == (VStatus.DEFINED, "me")
            assert (status.active_model_id, status.target_model_id) == (model, model)
        assert status_of(instance, name, "you", service) == NOTHING
        assert refusal(partial(set_as, "you", instance)) == (
            grpc.StatusCode.ALREADY_EXISTS,
            f'vmodel {name} already exists with different owner "me"',
        )
        delete_vmodel(instance, name, "you", service)
        assert status_of(instance, name, service=service).status == VStatus.DEFINED
    delete_vmodel(b, name, "me", service)
    assert status_of(b, name, service=service) == NOTHING
    delete_vmodel(b, name, service=service)
    delete_vmodel(b, f"{name}-free", service=service)
    assert a.status(model).status == Status.NOT_LOADED


def test_default_owner(mesh: Mesh) -> None:
    third = mesh.add("third", settings={"MM_DEFAULT_VMODEL_OWNER": "everybody"})
    assert set_vmodel(third, "defaulted", "m").owner == "everybody"
    assert set_vmodel(third, "chosen", "m", owner="one").owner == "one"
    assert status_of(mesh[0], "defaulted", "one") == NOTHING


def test_force(mesh: Mesh) -> None:
    """What serves is exchanged at once, and the new one loaded by the calls that come."""
    a, b = mesh.instances[:2]
    set_vmodel(a, "forced", "old", load_now=True, sync=True, auto_delete_target_model=True)
    header = [("mm-vmodel-id", "forced")]
    assert b.predict("", metadata=header).results[0].category.endswith("by model old")
    status = set_vmodel(b, "forced", "new", force=True)
    assert (status.status, status.active_model_id) == (VStatus.DEFINED, "new")
    assert status.active_model_status is not None
    assert status.active_model_status.status in (Status.LOADING, Status.LOADED)
    assert b.predict("", metadata=header).results[0].category.endswith("by model new")
    assert b.status("old").status == Status.NOT_FOUND


def test_vmodels(mesh: Mesh) -> None:
    """VModelsTest.vModelsTest."""
    a, b = mesh.instances[:2]
    header = [("mm-vmodel-id", "vm")]
    delete_vmodel(a, "vm")
    a.register("first", SIZE)
    status = set_vmodel(a, "vm", "first", None)
    assert (status.status, status.active_model_id) == (VStatus.DEFINED, "first")
    assert refusal(lambda: a.unregister("first")) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "Model first has referents",
    )
    assert b.predict("", metadata=header).results[0].category.endswith("by model first")

    second = {"expected_target_model_id": "first", "update_only": True, "sync": True}
    for _ in range(2):  # once more changes nothing
        status = set_vmodel(b, "vm", "second", auto_delete_target_model=True, **second)
        assert status.status == VStatus.DEFINED
        assert (status.active_model_id, status.target_model_id) == ("second", "second")
        assert status.active_model_status is not None
        assert status.active_model_status.status == Status.LOADED
        assert status.target_model_status is None
    eventually(
        lambda: a.predict("", metadata=header).results[0].category.endswith("by model second")
    )
    assert a.status("first").status != Status.NOT_FOUND
    b.unregister("first")
    for name in ("vm", "none"):
        wrong = partial(set_vmodel, a, name, "x", expected_target_model_id="y")
        code, _ = refusal(wrong)
        assert code == grpc.StatusCode.FAILED_PRECONDITION

    # A load of three seconds leaves time to look.
    status = set_vmodel(a, "vm", "third", "SIZE_1000000_3000_0")
    assert without_target_copies(status_of(b, "vm")) == without_target_copies(status)
    assert (status.status, status.target_model_id) == (VStatus.TRANSITIONING, "third")
    assert status.active_model_status is not None
    assert (status.active_model_id, status.active_model_status.status) == ("second", Status.LOADED)
    assert status.target_model_status is not None
    assert status.target_model_status.status == Status.LOADING
    status = set_vmodel(b, "vm", "third", "SIZE_1000000_3000_0", sync=True)
    assert (status.status, status.active_model_id) == (VStatus.DEFINED, "third")
    # It went with its last reference; of the two tables one watch may be ahead.
    eventually(lambda: b.status("second").status == Status.NOT_FOUND)

    delete_vmodel(b, "vm")
    assert status_of(b, "vm") == NOTHING
    assert b.status("third").status == Status.LOADED
    b.unregister("third")


def test_any_text_may_be_an_id(mesh: Mesh, keys: Keys) -> None:
    a, b = mesh.instances[:2]
    set_vmodel(a, "plain", "of-odd", load_now=True, sync=True)
    for name in ("/", "a/b", "..", "../registry/of-odd", "mø日本 🙂", "x" * 4096, "ø" * 2048):
        set_vmodel(a, name, "of-odd", None)
        key = mesh.prefix("vmodels") + name
        assert keys.get(key) == '{"amid":"of-odd","tmid":"of-odd"}', "the key is the id as it is"
        assert status_of(b, name).status == VStatus.DEFINED
        reply = b.predict("", metadata=[("mm-vmodel-id-bin", name.encode())])
        assert reply.results[0].category.endswith("by model of-odd")
        delete_vmodel(b, name)
        assert keys.get(key) is None
    delete_vmodel(a, "plain")
    a.unregister("of-odd")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "must provide non-empty vModelId"),
        ("x" * 4097, "an id has at most 4096 bytes, this one 4097"),
        ("ø" * 2049, "an id has at most 4096 bytes, this one 4098"),
    ],
)
def test_ids_that_nothing_can_have(mesh: Mesh, keys: Keys, name: str, text: str) -> None:
    before = {table: keys.versions(mesh.prefix(table)) for table in ("registry", "vmodels")}
    for instance in mesh.instances[:2]:
        for call in (
            partial(set_vmodel, instance, name, "m"),
            partial(delete_vmodel, instance, name),
            partial(status_of, instance, name),
        ):
            code, found = refusal(call)
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert found.startswith(text)
    assert before == {table: keys.versions(mesh.prefix(table)) for table in before}


def without_target_copies(status: mmesh.VModelStatusInfo) -> mmesh.VModelStatusInfo:
    """Answer it without what goes on changing while the target is loaded."""
    assert status.target_model_status is not None
    return replace(
        status, target_model_status=replace(status.target_model_status, model_copy_infos=[])
    )


def test_without_sync_no_answer_waits_for_a_load(mesh: Mesh, keys: Keys) -> None:
    """However long the load takes: to create, to exchange, to repeat, to force, and to look."""
    slow = "SIZE_1000000_5000_0"
    calls = {
        "create": partial(set_vmodel, mesh[0], "hasty", "slow-1", slow, load_now=True),
        "repeat": partial(set_vmodel, mesh[1], "hasty", "slow-1", slow, load_now=True),
        "exchange": partial(set_vmodel, mesh[0], "hasty", "slow-2", slow, load_now=True),
        "look": partial(status_of, mesh[1], "hasty"),
        "force": partial(set_vmodel, mesh[1], "hasty", "slow-3", slow, force=True),
        "delete": partial(delete_vmodel, mesh[0], "hasty"),
    }
    with yardstick_of(keys) as yardstick:
        for what, call in calls.items():
            began_s = time.monotonic()
            call()
            yardstick.check(began_s, time.monotonic(), ASYNC_S_MAX, what)
    for name in ("slow-1", "slow-2", "slow-3"):
        mesh[0].unregister(name)


def test_failed_and_recovered(mesh: Mesh) -> None:
    """A target that cannot be loaded is told as such; the old one serves on, and another target
    ends it. What was to go with its last reference goes.
    """
    a, b = mesh.instances[:2]
    header = [("mm-vmodel-id", "broken")]
    set_vmodel(a, "broken", "good", load_now=True, sync=True, auto_delete_target_model=True)
    for instance in (a, b):
        status = set_vmodel(
            instance, "broken", "bad", "FAIL_no such file", sync=True, auto_delete_target_model=True
        )
        assert (status.status, status.active_model_id) == (VStatus.TRANSITION_FAILED, "good")
        assert status.target_model_status is not None
        assert status.target_model_status.status == Status.LOADING_FAILED
        assert status.target_model_status.errors[0].endswith("no such file")
        (copy, *_) = status.target_model_status.model_copy_infos
        assert copy.copy_status == Status.LOADING_FAILED
    assert b.predict("", metadata=header).results[0].category.endswith("by model good")
    status = set_vmodel(b, "broken", "better", sync=True, auto_delete_target_model=True)
    assert (status.status, status.active_model_id) == (VStatus.DEFINED, "better")
    assert [b.status(name).status for name in ("bad", "good")] == [Status.NOT_FOUND] * 2
    delete_vmodel(b, "broken")
    assert b.status("better").status == Status.NOT_FOUND
    eventually(lambda: a.status("better").status == Status.NOT_FOUND)


def test_a_target_that_failed_and_is_set_again(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str], keys: Keys
) -> None:
    """That alone changes nothing; once it can be loaded, it takes over without another word."""
    damaged = threading.Event()
    damaged.set()

    def load(held: Held) -> None:
        if held.path == "archive" and damaged.is_set():
            held.context.abort(grpc.StatusCode.INTERNAL, "the archive is damaged")

    with ExitStack() as stack:
        settings = {"MM_DATAPLANE": dataplane}
        mesh = stack.enter_context(mesh_of(kv_store, settings, new_service_name()))
        mesh.limits = {"load_pause_first_s": 0.5}
        path = mesh.socket_path("alone")
        stack.enter_context(grpcio_runtime(f"unix:{path}")).before_load = load
        alone = mesh.add_beside("alone", None, {"INTERNAL_GRPC_SOCKET_PATH": path})
        set_vmodel(alone, "v", "old", "ok", sync=True, auto_delete_target_model=True, load_now=True)
        set_new = partial(set_vmodel, alone, "v", "new", "archive", auto_delete_target_model=True)
        set_new(sync=True)
        versions = keys.versions(mesh.prefix("vmodels"))
        for sync in (False, True):
            status = set_new(sync=sync)
            assert (status.status, status.active_model_id) == (VStatus.TRANSITION_FAILED, "old")
            assert status.target_model_status is not None
            assert status.target_model_status.errors[0].endswith("the archive is damaged")
        assert keys.versions(mesh.prefix("vmodels")) == versions
        damaged.clear()
        set_new()
        records = keys.wait(mesh.prefix("vmodels"), lambda r: '"amid":"new"' in r["v"])
        assert records == {"v": '{"amid":"new","tmid":"new"}'}, "and it is no longer said to fail"
        models = keys.table(mesh.prefix("registry"))
        assert set(models) == {"new"}
        assert record_of(models, "new")["refs"] == 1
        assert status_of(alone, "v").status == VStatus.DEFINED


def test_several_vmodels_in_one_call(mesh: Mesh) -> None:
    a, b = mesh.instances[:2]
    for name in ("one", "two"):
        set_vmodel(a, f"multi-{name}", f"multi-model-{name}", auto_delete_target_model=True)
    ids = [("mm-vmodel-id", f"multi-{name}") for name in ("one", "none", "two")]
    reply = b.call(
        "/mmesh.ExamplePredictor/multiPredict",
        mmesh.PredictRequest(text="t"),
        mmesh.MultiPredictResponse,
        ids,
    )
    assert isinstance(reply, mmesh.MultiPredictResponse)
    assert sorted(reply.per_model_results) == ["multi-model-one", "multi-model-two"]


def test_sync_ends_with_the_deadline(mesh: Mesh) -> None:
    a = mesh[0]
    set_vmodel(a, "slow", "quick", load_now=True, sync=True)
    code, text = refusal(
        lambda: set_vmodel(a, "slow", "slower", "SIZE_1000000_60000_0", sync=True, timeout_s=2.0)
    )
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert text.endswith("for vmodel slow to switch to model slower")
    assert set_vmodel(a, "slow", "quick").status == VStatus.DEFINED
    a.unregister("slower")
    assert a.status("slower").status == Status.NOT_FOUND
