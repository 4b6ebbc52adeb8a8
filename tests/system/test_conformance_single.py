"""Conformance with the Java mesh, one instance (around 22.1): TCP, Unix socket, legacy names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from mm.pb import mmesh
from tests.system.meshes import Instance, mesh_of
from tests.system.processes import Program

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
LEGACY = "/com.ibm.watson.tas.proto.TasRuntime/"
MODERN = "/mmesh.ModelMesh/"

#: register, unregister, status: the modern names, those of the first generation, and the aliases.
SPELLINGS = {
    "modern": (MODERN + "registerModel", MODERN + "unregisterModel", MODERN + "getModelStatus"),
    "add-remove": (MODERN + "addModel", MODERN + "deleteModel", MODERN + "getModelStatus"),
    "tas": (LEGACY + "addModel", LEGACY + "deleteModel", LEGACY + "getModelStatus"),
}


@pytest.fixture(scope="module", params=["tcp", "unix", "legacy-runtime"])
def instance(
    request: pytest.FixtureRequest,
    dataplane: str,
    kv_store: str,
    new_service_name: Callable[[], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Instance]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        place = ["0"]
        if request.param == "unix":
            place = [f"unix://{tmp_path_factory.mktemp('runtime') / 'grpc.sock'}"]
        elif request.param == "legacy-runtime":
            place = ["0", "--legacy"]
        yield mesh.add("only", place)


@pytest.fixture(params=sorted(SPELLINGS))
def spelling(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    return SPELLINGS[request.param]


def assert_predicts(instance: Instance, model_id: str, text: str = "text") -> None:
    reply = instance.predict(model_id, text)
    assert reply.results[0].category == f"classification for {text} by model {model_id}"
    assert reply.results[0].confidence == 1.0


def test_grpc(instance: Instance, spelling: tuple[str, str, str]) -> None:
    register, unregister, status = spelling
    model_id = f"grpc-test-{register.rpartition('/')[2]}-{len(register)}"
    unknown = instance.call(
        status, mmesh.GetStatusRequest(model_id="unknown"), mmesh.ModelStatusInfo
    )
    assert isinstance(unknown, mmesh.ModelStatusInfo)
    assert (unknown.status, unknown.errors) == (Status.NOT_FOUND, [])

    instance.register(model_id, "SIZE_1000000_300_0", load_now=True, method=register)
    assert_predicts(instance, model_id)
    loaded = instance.status(model_id)
    assert (loaded.status, loaded.errors) == (Status.LOADED, [])

    # The runtime forgets every model: the next call loads it again, and nobody notices.
    assert_predicts(instance, model_id, "test:purge-models")
    assert_predicts(instance, model_id)
    assert_predicts(instance, model_id, "x" * 2_000_000)
    instance.unregister(model_id, method=unregister)
    assert instance.status(model_id).status == Status.NOT_FOUND


def test_load_failure(instance: Instance) -> None:
    text = "the disk is on fire"
    before_ms = time.time() * 1000
    answer = instance.register("load-failure", f"FAIL_{text}", load_now=True, sync=True)
    for status in (answer, instance.status("load-failure")):
        assert status.status == Status.LOADING_FAILED
        assert len(status.errors) == 1
        assert status.errors[0].endswith(text)
        (copy,) = status.model_copy_infos
        assert copy.copy_status == Status.LOADING_FAILED
        assert copy.location == "only"
        assert before_ms - 1000 <= copy.time <= time.time() * 1000 + 1000


def test_multi_model(instance: Instance) -> None:
    ids = [f"multi-{number}" for number in range(3)]
    for model_id in ids:
        instance.register(model_id, "SIZE_1000000_100_0", load_now=True)
    reply = instance.call(
        "/mmesh.ExamplePredictor/multiPredict",
        mmesh.PredictRequest(text="many"),
        mmesh.MultiPredictResponse,
        [("mm-model-id", model_id) for model_id in ids],
    )
    assert isinstance(reply, mmesh.MultiPredictResponse)
    assert sorted(reply.per_model_results) == ids
    for model_id, result in reply.per_model_results.items():
        assert len(result.results) == 2
        assert result.results[0].category == f"classification for many by model {model_id}"


def test_multi_model_with_missing_ones(instance: Instance) -> None:
    instance.register("multi-there", "SIZE_1000000_0_0")
    ids = [("mm-model-id", "multi-there"), ("mm-model-id", "multi-missing")]
    method, request = "/mmesh.ExamplePredictor/multiPredict", mmesh.PredictRequest(text="t")
    for metadata in (ids, [*ids, ("mm-required", "any")]):
        reply = instance.call(method, request, mmesh.MultiPredictResponse, metadata)
        assert isinstance(reply, mmesh.MultiPredictResponse)
        assert list(reply.per_model_results) == ["multi-there"]
    required = [*ids, ("mm-required", "All")]
    with pytest.raises(grpc.RpcError) as caught:
        instance.call(method, request, mmesh.MultiPredictResponse, required)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as caught:
        instance.call(
            method,
            request,
            mmesh.MultiPredictResponse,
            [("mm-model-id", "no-1"), ("mm-model-id", "no-2")],
        )
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "none of the requested models were found"


def test_zookeeper_is_refused(new_service_name: Callable[[], str]) -> None:
    program = Program.mm(
        "serve",
        "serve",
        settings={"KV_STORE": "zookeeper:localhost:2181", "MM_SERVICE_NAME": new_service_name()},
    )
    try:
        assert program.wait_end(60) == 2
        errors = [line for line in program.lines if line != "<end of output>"]
        assert len(errors) == 1
        assert "ZooKeeper is not supported" in errors[0]
    finally:
        program.close()


def test_separate_serving_port(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> None:
    """ModelMeshClusterSeparateServeTest: also for a call that comes from another instance."""
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all("separate-a", "separate-b", runtime_args=["0,0"])
        mesh[0].register("m", "SIZE_1000000_10_0", load_now=True, sync=True)
        for number in range(20):
            assert_predicts(mesh[number % 2], "m", f"text {number}")
        holders = [instance.statistics().models_loaded for instance in mesh.instances]
        assert sorted(holders) == [0, 1]
