"""Interop 0, points 22 to 28: a pod's runtime, whose adapter has the habits of real ones.

Each test is named after its number. What else runtimes do and say is in ``tests/system``.
"""

from __future__ import annotations

from functools import partial

import grpc
import pytest

from tests.pod.controller_calls import Service, Status
from tests.pod.pods import Cluster
from tests.pod.tables import MLSERVER, TORCHSERVE, TRITON
from tests.system.meshes import refusal
from tests.system.processes import eventually

pytestmark = [pytest.mark.system, pytest.mark.etcd]

Code = grpc.StatusCode
SERVER = "inference.GRPCInferenceService"


def test_interop_22_a_runtime_is_asked_for_its_status_once(cluster: Cluster) -> None:
    """The question empties it: after READY nobody asks again, whatever happens."""
    service = Service.of(cluster, "kept")
    service.bring_up()
    for pod in cluster.pods:
        service.infer(pod)
        refusal(partial(service.infer, pod, "test:unavailable"))
    for pod in cluster.pods:
        methods = [method for method, _ in pod.adapter.calls]
        assert methods[0] == "runtimeStatus"
        assert methods.count("runtimeStatus") == 1
    assert service.model_id in cluster.pod_of(MLSERVER).adapter.models


def test_interop_23_what_adapters_do_not_have_is_not_needed(cluster: Cluster) -> None:
    for runtime in cluster.runtimes:
        for number in range(2):
            name = f"unsized-{runtime.name[:2]}-{number}"
            Service.of(cluster, name, kind=runtime.formats[1]).bring_up()
        adapter = cluster.pod_of(runtime).adapter
        # Once it was told so, it is not asked again.
        assert adapter.count("predictModelSize") <= 1
        if runtime is not TORCHSERVE:
            assert adapter.count("modelSize") == 0


def test_interop_24_a_size_of_nothing_means_ask(cluster: Cluster) -> None:
    adapter = cluster.pod_of(TORCHSERVE).adapter
    service = Service.of(cluster, "measured-later", kind="pytorch-mar:0")
    service.bring_up()
    eventually(lambda: adapter.count("modelSize", service.model_id) == 1, what="it is measured")
    # It served before that already.
    service.infer()


def test_interop_25_what_failed_to_load_is_unloaded(cluster: Cluster) -> None:
    """UNKNOWN is what adapters answer to nearly all, and memory may be taken all the same."""
    adapter = cluster.pod_of(MLSERVER).adapter
    for path, text in (
        ("missing-25", "Failed to pull model from storage due to error: no such object"),
        ("broken-25", "builtins.ValueError: bad archive"),
    ):
        service = Service.of(cluster, path, path)
        service.set()
        active = service.wait(Status.LOADING_FAILED)
        assert text in active.errors[0]
        eventually(partial(adapter.count, "unloadModel", service.model_id), what="it is unloaded")
        calls = [method for method, model_id in adapter.calls if model_id == service.model_id]
        assert calls[-2:] == ["loadModel", "unloadModel"]


def test_interop_26_a_load_that_is_given_up_is_unloaded(cluster: Cluster) -> None:
    adapter = cluster.pod_of(MLSERVER).adapter
    service = Service.of(cluster, "given-up", "held-26")
    service.set()
    eventually(lambda: adapter.count("loadModel", service.model_id) == 1)
    service.delete()
    eventually(partial(adapter.count, "unloadModel", service.model_id), what="it is unloaded")
    eventually(lambda: service.model_id in adapter.cancelled, what="the load is cancelled")
    assert service.record() is None
    # NOT_FOUND is as good as done: it is said once and not tried again.
    absent = Service.of(cluster, "absent")
    absent.bring_up()
    adapter.unload_code = Code.NOT_FOUND
    try:
        absent.delete()
        eventually(partial(adapter.count, "unloadModel", absent.model_id))
        again = Service.of(cluster, "absent")
        again.bring_up()
    finally:
        adapter.unload_code = None
    assert adapter.count("unloadModel", absent.model_id) == 1


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (f"{SERVER}/ModelInfer", b"\x0a%c%b"),
        ("tensorflow.serving.PredictionService/Predict", b"\x0a%c\x0a%c%b"),
        ("org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions", b"\x0a%c%b"),
    ],
)
def test_interop_27_ids_are_injected_and_other_methods_refused(
    cluster: Cluster, method: str, field: bytes
) -> None:
    service = Service.of(cluster, "injected", kind="pytorch-mar:0")
    service.bring_up()
    name = service.name.encode()
    request = field % (
        (len(name), name) if field.count(b"%c") == 1 else (len(name) + 2, len(name), name)
    )
    for pod in cluster.pods:
        answer = pod.call(f"/{method}", request)
        # What the server found at the path that it gave: the model, not the vmodel.
        assert answer.partition(b"\n")[0].decode() == service.model_id
        headers = [("mm-vmodel-id", service.name)]
        for other in ("ModelReady", "RepositoryIndex"):
            code, text = refusal(partial(pod.call, f"/{SERVER}/{other}", request, metadata=headers))
            assert (code, text) == (
                Code.UNIMPLEMENTED,
                f"Method not found or not permitted: {SERVER}/{other}",
            )
        code, _ = refusal(
            partial(pod.call, "/mmesh.ModelRuntime/unloadModel", b"", metadata=headers)
        )
        assert code is Code.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("runtime", "code", "text"),
    [
        (MLSERVER, Code.NOT_FOUND, "Model {} with version  not found"),
        (MLSERVER, Code.INVALID_ARGUMENT, "Model {} with version 1 not found"),
        (TRITON, Code.UNAVAILABLE, "Request for unknown model: '{}' is not found"),
    ],
    ids=["MLServer", "old MLServer", "Triton"],
)
def test_interop_28_a_model_that_the_runtime_lost_is_loaded_again(
    cluster: Cluster, runtime: object, code: Code, text: str
) -> None:
    pod = next(pod for pod in cluster.pods if pod.runtime is runtime)
    kind = pod.runtime.formats[1]
    # A model of its own each: two losses within a minute are taken for the model's own answer.
    services = [
        Service.of(cluster, f"lost-{code.value[0]}-at-{number}", kind=kind)
        for number in range(len(cluster.pods))
    ]
    for service in services:
        service.set()
    for service in services:
        service.wait(Status.LOADED)
    before = pod.adapter.unknown
    pod.adapter.unknown = lambda model_id: (code, text.format(model_id))
    try:
        for service, caller in zip(services, cluster.pods, strict=True):
            pod.adapter.models.discard(service.model_id)
            assert service.infer(caller)[0] == service.model_id
            assert pod.adapter.count("loadModel", service.model_id) == 2
    finally:
        pod.adapter.unknown = before
