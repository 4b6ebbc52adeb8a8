"""Interop 0, points 1 to 13 and 30: what the controller asks, is answered, and reads in etcd.

Each test is named after its number. Three pods with different runtimes; how the controller lives
with them for longer is ``tests/system/test_controller.py``'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from tests.pod.controller_calls import MANAGEMENT, Service, Status, VStatus, infer
from tests.pod.pods import Cluster, Pod, following
from tests.pod.tables import MLSERVER, TORCHSERVE, TRITON
from tests.system.meshes import refusal
from tests.system.processes import eventually

pytestmark = [pytest.mark.system, pytest.mark.etcd]

Code = grpc.StatusCode
#: The controller's own limit of a call.
CONTROLLER_TIMEOUT_S = 10.0


def test_interop_01_three_methods_with_small_first_letters(cluster: Cluster) -> None:
    service = Service.of(cluster, "three-methods")
    assert service.set().status == VStatus.DEFINED
    assert service.status().target_model_id == service.model_id
    service.delete()
    for name in ("SetVModel", "DeleteVModel", "GetVModelStatus"):
        code, _ = refusal(partial(cluster.pods[0].call, MANAGEMENT + name, b""))
        assert code in (Code.UNIMPLEMENTED, Code.INVALID_ARGUMENT)


def test_interop_02_set_vmodel_never_waits_for_a_load(cluster: Cluster) -> None:
    """Neither the first one nor a second one, at any pod: each answers while the load hangs."""
    service = Service.of(cluster, "slow-to-load", "held-slow")
    adapter = cluster.pod_of(MLSERVER).adapter
    for pod in cluster.pods:
        began_s = time.monotonic()
        answer = service.set(pod)
        # The bound of the controller; that the load goes on says that it was not waited for.
        assert time.monotonic() - began_s < CONTROLLER_TIMEOUT_S
        assert answer.active_model_status is not None
        assert answer.active_model_status.status in (Status.LOADING, Status.NOT_LOADED)
    service.wait(Status.LOADING)
    eventually(lambda: adapter.count("loadModel", service.model_id) == 1)
    adapter.release("held-slow")
    service.wait(Status.LOADED)
    assert adapter.count("loadModel", service.model_id) == 1


def test_interop_03_the_same_again_writes_nothing(cluster: Cluster) -> None:
    service = Service.of(cluster, "said-again")
    service.bring_up()
    key = cluster.key("registry", service.model_id)
    eventually(lambda: '"state":"ready"' in (service.record() or ""), what="it is written down")

    def revisions() -> list[int]:
        keys = (key, cluster.key("vmodels", service.name))
        return [cluster.keys.revision_of(each) for each in keys]

    before = revisions()
    for pod in cluster.pods * 5:
        service.set(pod, load_now=False)
        service.set(pod, load_now=True)
    assert revisions() == before


def test_interop_04_an_update_is_in_transition_until_the_record_says_otherwise(
    cluster: Cluster,
) -> None:
    first = Service.of(cluster, "updated")
    first.bring_up()
    second = first.with_path("held-update")
    answer = second.set()
    assert answer.status == VStatus.TRANSITIONING
    assert (answer.active_model_id, answer.target_model_id) == (first.model_id, second.model_id)
    assert answer.active_model_status is not None
    assert answer.active_model_status.status == Status.LOADED
    assert answer.target_model_status is not None
    assert answer.target_model_status.status == Status.LOADING
    table = cluster.prefix("vmodels")
    revision = cluster.keys.revision_of(table + first.name)
    cluster.pod_of(MLSERVER).adapter.release("held-update")
    records = cluster.keys.wait(
        table, lambda records: json.loads(records[first.name])["amid"] == second.model_id
    )
    said = {"o": "isvc", "amid": second.model_id, "tmid": second.model_id}
    assert json.loads(records[first.name]) == said
    assert cluster.keys.revision_of(table + first.name) > revision
    assert second.status().status == VStatus.DEFINED


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        # Not in the table: so the default, whose label nobody has.
        ("nosuch:7|pv:v2", "_no_runtime"),
        # In the table since its runtime was made, and no pod of it is up yet.
        ("openvino_ir:1|pv:v2", "mt:openvino_ir:1, pv:v2"),
    ],
)
def test_interop_05_no_running_instances_to_the_letter(
    cluster: Cluster, kind: str, labels: str
) -> None:
    rows = json.loads(cluster.config_map()["type_constraints"])
    # Out of order and twice: the text has each once, in order.
    rows["mt:openvino_ir:1|pv:v2"] = {"required": ["pv:v2", "mt:openvino_ir:1", "pv:v2"]}
    files = {**cluster.config_map(), "type_constraints": json.dumps(rows)}
    for pod in cluster.pods:
        pod.mount("config", files)
    service = Service.of(cluster, f"nowhere-{len(labels)}", kind=kind)
    expected = (
        "There are no running instances that meet the label requirements of type"
        f" mt:{kind}: [{labels}]"
    )
    # Until the file has been read everywhere.
    eventually(lambda: service.set().active_model_status.errors == [expected], what="the text")
    for pod in cluster.pods:

        def is_said(at: Pod = pod) -> bool:
            active = service.set(at).active_model_status
            assert active is not None
            # No copy has failed: nobody tried.
            assert active.model_copy_infos == []
            return (active.status, active.errors) == (Status.LOADING_FAILED, [expected])

        eventually(is_said, what=f"the text at {pod.name}")
    record = json.loads(service.record() or "")
    assert "failedIn" not in record
    service.delete()


def test_interop_06_what_is_not_there(cluster: Cluster) -> None:
    nothing = Service.of(cluster, "never-made")
    for pod in cluster.pods:
        nothing.delete(pod)
        request = mmesh.GetVModelStatusRequest(v_model_id="never-made", owner="isvc")
        answer = pod.call(MANAGEMENT + "getVModelStatus", request)
        assert answer == b""
        parsed = mmesh.VModelStatusInfo.parse(answer)
        assert parsed.active_model_status is None


def test_interop_07_another_owner(cluster: Cluster) -> None:
    mine = Service.of(cluster, "owned")
    mine.set()
    request = mmesh.SetVModelRequest(
        v_model_id="owned",
        owner="ksp",
        target_model_id="owned__ksp-0123456789",
        model_info=mmesh.ModelInfo(type="mt:sklearn:0", path="ok", key="{}"),
    )
    for pod in cluster.pods:
        code, _ = refusal(partial(pod.call, MANAGEMENT + "setVModel", request))
        assert code is Code.ALREADY_EXISTS
    assert mine.status().owner == "isvc"


def test_interop_08_failed_copies_say_where_and_when(cluster: Cluster) -> None:
    service = Service.of(cluster, "failed-copy", "broken-8")
    began_ms = time.time() * 1000
    service.set()
    active = service.wait(Status.LOADING_FAILED)
    pod = cluster.pod_of(MLSERVER)
    assert [(each.copy_status, each.location) for each in active.model_copy_infos] == [
        (Status.LOADING_FAILED, pod.instance_id)
    ]
    # Milliseconds; the clock of this machine is the only one.
    assert began_ms - 1000 <= active.model_copy_infos[0].time <= time.time() * 1000 + 1000
    assert "builtins.ValueError: bad archive" in active.errors[0]


def test_interop_09_instances_are_the_ends_of_their_pods_names(cluster: Cluster) -> None:
    names = set(cluster.keys.table(cluster.prefix("instances")))
    assert {pod.instance_id for pod in cluster.pods} <= names
    assert all(len(pod.instance_id) == 12 for pod in cluster.pods)


@pytest.mark.parametrize(
    ("text", "code", "description"),
    [
        ("bad-input", Code.INTERNAL, "builtins.ValueError: cannot reshape array"),
        ("bad-shape", Code.INVALID_ARGUMENT, "Invalid number of shape dimensions"),
    ],
)
def test_interop_10_errors_of_the_model_come_through(
    cluster: Cluster, text: str, code: Code, description: str
) -> None:
    service = Service.of(cluster, "errs")
    service.bring_up()
    for pod in cluster.pods:
        assert refusal(partial(service.infer, pod, text)) == (code, description)


def test_interop_10_with_method_and_code_before_it_for_those_who_parse_it(
    new_cluster: Callable[[], Cluster],
) -> None:
    """``internalModelMeshEnvVars`` sets it; at the pod with the model and at one that passes on."""
    cluster = new_cluster()
    cluster.runtimes = [MLSERVER, TRITON]
    for runtime in cluster.runtimes:
        cluster.add(runtime, {"MM_LEGACY_ERRORS": "true"})
    cluster.wait_ready()
    good, broken = Service.of(cluster, "legacy"), Service.of(cluster, "legacy-broken", "broken-10")
    good.bring_up()
    broken.set()
    broken.wait(Status.LOADING_FAILED)
    method = "inference.GRPCInferenceService/ModelInfer"
    expected = {
        "bad-input": (Code.INTERNAL, f"{method}: INTERNAL: builtins.ValueError: cannot reshape"),
        "bad-shape": (
            Code.INVALID_ARGUMENT,
            f"{method}: INVALID_ARGUMENT: Invalid number of shape dimensions",
        ),
        "test:unavailable": (
            Code.INTERNAL,
            f"ModelRuntime UNAVAILABLE: {method}: UNAVAILABLE: out of order",
        ),
    }
    for pod in cluster.pods:
        for text, (code, description) in expected.items():
            found = refusal(partial(good.infer, pod, text))
            assert (found[0], found[1][: len(description)]) == (code, description)
        code, description = refusal(partial(broken.infer, pod))
        assert code is Code.INTERNAL
        assert "builtins.ValueError: bad archive" in description


def test_interop_11_keys_are_plain_concatenation(cluster: Cluster) -> None:
    service = Service.of(cluster, "where-it-stands")
    service.bring_up()
    root = f"{cluster.root_prefix}/mm/modelmesh-serving"
    assert cluster.keys.get(f"{root}/registry/{service.model_id}") is not None
    assert cluster.keys.get(f"{root}/vmodels/where-it-stands") is not None
    # And nothing else of it anywhere: no buckets, no slash before it.
    starts = (cluster.root_prefix, "/")
    found = [start + name for start in starts for name in cluster.keys.table(start)]
    mine = [key for key in found if service.model_id in key]
    assert mine == [f"{root}/registry/{service.model_id}"]


def test_interop_12_vmodels_are_json_in_every_version(cluster: Cluster) -> None:
    seen: list[dict[str, Any]] = []
    watch = cluster.keys.follow(cluster.prefix("vmodels") + "versioned")

    def follow() -> None:
        for _, value, _ in watch:
            if value is None:
                return
            seen.append(json.loads(value))

    followed = following(follow)
    first = Service.of(cluster, "versioned")
    first.bring_up()
    broken = first.with_path("broken-12")
    broken.set()
    eventually(lambda: broken.status().status == VStatus.TRANSITION_FAILED)
    third = first.with_path("ok-3")
    third.set()
    eventually(lambda: third.status().status == VStatus.DEFINED)
    third.delete()
    followed.result(60)
    assert all(record["o"] == "isvc" for record in seen), seen
    assert {record["tmid"] for record in seen} == {each.model_id for each in (first, broken, third)}
    assert any(record.get("failed") for record in seen), seen
    assert all(record.keys() <= {"o", "amid", "tmid", "failed"} for record in seen)


def test_interop_13_what_users_should_see_touches_a_key(cluster: Cluster) -> None:
    """A load begun, a failure, a switch, a failed one, a copy gone: each an event for the watch."""
    events: list[tuple[str, str | None]] = []
    watches = [cluster.keys.follow(cluster.prefix(each)) for each in ("registry", "vmodels")]

    def follow(watch: Any) -> None:
        try:
            for name, value, is_new in watch:
                if is_new and name.startswith("watched"):
                    events.append((name, value))
        except grpc.RpcError:
            return

    followed = [following(partial(follow, each)) for each in watches]

    def count(name: str) -> int:
        return sum(1 for event in events if event[0] == name)

    loading = Service.of(cluster, "watched", "held-13")
    loading.set()
    loading.wait(Status.LOADING)
    # Created, and the load begun.
    eventually(lambda: count(loading.model_id) >= 2 and count("watched") >= 1)
    before = count(loading.model_id)
    cluster.pod_of(MLSERVER).adapter.release("held-13")
    loading.wait(Status.LOADED)
    broken = loading.with_path("broken-13")
    broken.set()
    # The failure, and the transition that it blocks.
    eventually(lambda: any('"failedIn"' in (v or "") for n, v in events if n == broken.model_id))
    eventually(lambda: any('"failed":true' in (v or "") for n, v in events if n == "watched"))
    loading.set()
    eventually(lambda: (broken.model_id, None) in events, what="the broken one is gone")
    assert json.loads(next(v for n, v in reversed(events) if n == "watched") or "") == {
        "o": "isvc",
        "amid": loading.model_id,
        "tmid": loading.model_id,
    }
    # The runtime loses it: the copy is taken out, and another one begins.
    cluster.pod_of(MLSERVER).adapter.models.discard(loading.model_id)
    loading.infer()
    eventually(lambda: count(loading.model_id) > before)
    loading.delete()
    eventually(lambda: ("watched", None) in events and (loading.model_id, None) in events)
    for watch in watches:
        watch.cancel()
    for each in followed:
        each.result(60)
    # Nobody is called into being by use: a call writes nothing.
    versions = [json.loads(value) for name, value in events if name == "watched" and value]
    assert all(a != b for a, b in pairwise(versions)), versions


def test_interop_30_any_pod_takes_any_call(cluster: Cluster) -> None:
    services = [
        Service.of(cluster, f"anywhere-{runtime.name[:3]}", kind=runtime.formats[1])
        for runtime in (MLSERVER, TRITON, TORCHSERVE)
    ]
    for service in services:
        service.set(cluster.pods[-1])
    for service, runtime in zip(services, cluster.runtimes, strict=True):
        for pod in cluster.pods:
            model_id, _ = infer(pod, service.name)
            assert model_id == service.model_id
        copies = service.wait(Status.LOADED).model_copy_infos
        # Only where its runtime is.
        assert [each.location for each in copies] == [cluster.pod_of(runtime).instance_id]
