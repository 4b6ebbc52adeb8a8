"""Interop 0, points 14 to 20 and 29: files, hooks, probes, ports and metrics of a pod.

Each test is named after its number, and looks at real pods from where kubelet, Prometheus and the
rest of a cluster stand. That a pod ends in order while calls come is shown with more in
``tests/system/test_life_cycle.py``; the image itself by ``make test-image``.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import ssl
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest

from tests.identities import make
from tests.pod import tables
from tests.pod.controller_calls import Service, Status, infer
from tests.pod.pods import (
    ROOT,
    UID,
    Cluster,
    Pod,
    called_places,
    channel_to,
    listening_ports,
)
from tests.pod.tables import MLSERVER, TORCHSERVE, TRITON
from tests.system.meshes import refusal
from tests.system.processes import eventually

pytestmark = [pytest.mark.system, pytest.mark.etcd]

Code = grpc.StatusCode


def process_status(pod: Pod) -> dict[str, str]:
    text = Path(f"/proc/{pod.pid}/status").read_text(encoding="ascii")
    return {name: value.strip() for name, _, value in (s.partition(":") for s in text.splitlines())}


def test_interop_14_the_secret_says_where_etcd_is(cluster: Cluster) -> None:
    """Every pod has nothing else to know it by: the file, through the links of a Secret."""
    for pod in cluster.pods:
        path = pod.directory / "etcd" / "etcd_connection"
        assert path.is_symlink()
        said = json.loads(path.read_text(encoding="utf-8"))
        assert said.keys() == {"endpoints", "root_prefix"}
        key = f"{said['root_prefix']}/mm/modelmesh-serving/instances/{pod.instance_id}"
        assert cluster.keys.get(key) is not None


@pytest.mark.without_sanitizers("resident memory: a sanitizer takes as much again")
def test_interop_15_the_container_needs_no_rights_and_little_memory(cluster: Cluster) -> None:
    """stop.sh is where deployments call it; whoever runs is nobody, without a capability."""
    script = ROOT / "config/image/stop.sh"
    assert os.access(script, os.X_OK)
    steps = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"COPY config/image/stop.sh {tables.STOP_SCRIPT}\n" in steps
    assert re.search(r'^ENTRYPOINT \["/opt/mm/bin/mm", "serve"\]$', steps, re.MULTILINE)
    for pod in cluster.pods:
        status = process_status(pod)
        assert set(status["Uid"].split()) == {str(UID if os.getuid() == 0 else os.getuid())}
        if os.getuid() == 0:
            capabilities = [value for name, value in status.items() if name.startswith("Cap")]
            assert (len(capabilities), set(capabilities)) == (5, {"0" * 16})
        used_kib = int(status["VmHWM"].split()[0])
        assert used_kib * 1024 < tables.MEMORY_LIMIT_BYTES / 2


def test_interop_16_probes_answer_in_time(cluster: Cluster) -> None:
    """While calls are served; from the first second on is shown in tests/system."""
    service = Service.of(cluster, "probed")
    service.bring_up()
    for pod in cluster.pods:
        service.infer(pod)
        assert pod.probe(tables.READINESS) == 200
        assert pod.probe(tables.LIVENESS) == 200


def test_interop_17_every_container_of_the_pod_ends_with_mm(
    new_cluster: Callable[[], Cluster],
) -> None:
    """Kubelet's order: all hooks at a time; the pod that is left has the model."""
    cluster = new_cluster()
    cluster.runtimes = [MLSERVER]
    goes = cluster.add(MLSERVER)
    goes.program.wait_line("ready: instance ")
    service = Service.of(cluster, "moves")
    service.bring_up()
    stays = cluster.add(MLSERVER)
    cluster.wait_ready()
    service.infer()
    ending = goes.delete()
    # Neither hook is answered as long as mm runs.
    eventually(lambda: goes.probe(tables.READINESS) != 200, what="no clients are sent there")
    assert ending.wait() == 0
    assert infer(stays, "moves")[0] == service.model_id
    assert service.model_id in stays.adapter.models
    # It was told to: there is nothing to explain.
    assert goes.termination_log.read_text(encoding="utf-8") == ""
    assert goes.instance_id not in cluster.keys.table(cluster.prefix("instances"))


def test_interop_17_a_start_that_fails_is_explained_to_kubernetes(
    new_cluster: Callable[[], Cluster],
) -> None:
    pod = new_cluster().add(MLSERVER, {"MM_SVC_GRPC_MAX_MSG_SIZE": "a lot"})
    assert pod.program.wait_end(60) == 2
    message = pod.termination_log.read_text(encoding="utf-8")
    assert message.startswith("Service startup failed: ")
    assert "MM_SVC_GRPC_MAX_MSG_SIZE" in message


def test_interop_18_pods_talk_on_8033_and_8080_alone(cluster: Cluster) -> None:
    for runtime in cluster.runtimes:
        service = Service.of(cluster, f"between-{runtime.name[:2]}", kind=runtime.formats[0])
        service.set()
        for pod in cluster.pods:
            service.infer(pod)
    ips = {pod.ip for pod in cluster.pods}
    ports = set()
    for pod in cluster.pods:
        assert listening_ports(pod.pid) == {
            tables.GRPC_PORT,
            tables.PEER_PORT,
            tables.PROBE_PORT,
            tables.PRESTOP_PORT,
            tables.METRICS_PORT,
        }
        called = called_places(pod.pid)
        ports |= {port for ip, port in called if ip in ips - {pod.ip}}
    assert ports
    assert ports <= tables.PEER_PORTS


def test_interop_18_all_addresses_of_the_pod_are_listened_on() -> None:
    """The rest-proxy calls by the loopback address, kubelet and peers by the pod's."""
    from mm.config import Config

    values = {"pod_name": "p-5d8f7b9c64-q7x2k", "pod_ip": "192.0.2.7", "etcd_directory": "/e"}
    config = Config.from_environment(tables.environment(values))
    assert config.bind_host == "0.0.0.0"
    assert (config.grpc_port, config.peer_port) == (8033, 8080)
    assert (config.probe_port, config.prestop_port) == (8089, 8090)
    assert config.advertise_host == "192.0.2.7"


def test_interop_19_config_maps_change_while_pods_run(cluster: Cluster) -> None:
    """Kubelet exchanges the directory behind the links: both files hold without a restart."""
    pod = cluster.pod_of(TRITON)
    service = Service.of(cluster, "other-rpcs", kind="onnx:1")
    service.bring_up()
    method = "/inference.GRPCInferenceService/ModelMetadata"
    request = b"\x0a\x0aother-rpcs"
    assert pod.call(method, request).startswith(service.model_id.encode())
    changed = json.loads(json.dumps(tables.DATAPLANE_CONFIG))
    del changed["rpcConfigs"][method[1:]]
    changed["allowOtherRpcs"] = False
    files = cluster.config_map()
    pod.mount("config", {**files, "dataplane_api_config": json.dumps(changed)})
    call = partial(pod.call, method, request)

    def is_refused() -> bool:
        try:
            call()
        except grpc.RpcError as exc:
            error: grpc.Call = exc
            return error.code() is Code.UNIMPLEMENTED
        return False

    eventually(is_refused, what="the new file holds")
    # The last good one is kept.
    pod.mount("config", {**files, "dataplane_api_config": "{"})
    pod.program.wait_line("dataplane_api_config: .*what it said before still holds")
    assert is_refused()
    pod.mount("config", files)
    eventually(lambda: not is_refused(), what="the first one holds again")
    later = Service.of(cluster, "comes-later", kind="lightgbm:1")
    later.set()
    rows = json.loads(files["type_constraints"])
    rows["mt:lightgbm:1"] = {"required": ["mt:onnx:1"]}
    for each in cluster.pods:
        each.mount("config", {**files, "type_constraints": json.dumps(rows)})

    def is_loaded() -> bool:
        active = later.set().active_model_status
        assert active is not None
        return active.status == Status.LOADED

    eventually(is_loaded, what="the type has a pod now")
    assert later.model_id in pod.adapter.models


#: The names that the dashboard of modelmesh-serving asks for (3.7), by what they are.
PROMISED = {
    "histogram": """invoke_model_milliseconds api_request_milliseconds request_size_bytes
        response_size_bytes cache_miss_milliseconds loadmodel_milliseconds unloadmodel_milliseconds
        req_queue_delay_milliseconds loading_queue_delay_milliseconds model_sizing_milliseconds
        age_at_eviction_milliseconds loaded_model_size_bytes""",
    "counter": "loadmodel_failure unloadmodel_failure unloadmodel_attempt_failure",
    "gauge": """instance_lru_seconds instance_lru_age_seconds instance_capacity_bytes
        instance_used_bytes instance_used_bps instance_models_total""",
}
OF_THE_LEADER = "models_loaded_total models_with_failure_total models_managed_total"


def scrape(pod: Pod) -> tuple[str, str]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    url = f"https://{pod.ip}:{tables.METRICS_PORT}/metrics"
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        body = answer.read()
        if answer.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        return answer.headers["Content-Type"], body.decode()


def test_interop_20_metrics_over_https_under_the_old_names(cluster: Cluster) -> None:
    service = Service.of(cluster, "measured")
    service.bring_up()
    service.infer()
    leaders = 0
    for pod in cluster.pods:
        content_type, page = scrape(pod)
        assert content_type.startswith("text/plain; version=0.0.4")
        types = dict(re.findall(r"^# TYPE modelmesh_(\S+) (\w+)$", page, re.MULTILINE))
        for kind, names in PROMISED.items():
            for name in names.split():
                assert types[name] == kind
        is_leader = [name in types for name in OF_THE_LEADER.split()]
        assert len(set(is_leader)) == 1
        leaders += is_leader[0]
    assert leaders == 1
    _, page = scrape(cluster.pods[0])
    calls = r'^modelmesh_api_request_milliseconds_count\{method="ModelInfer",code="OK",?\} [1-9]'
    assert re.search(calls, page, re.MULTILINE), page


def test_interop_21_the_servers_own_certificate_is_that_of_its_client(
    new_cluster: Callable[[], Cluster],
) -> None:
    """With ``require``: the controller shows it, the pods show it to each other, and nobody else
    gets in, by a certificate of another one or in plain text.
    """
    cluster = new_cluster()
    cluster.runtimes = [MLSERVER, TRITON]
    own = make(tables.AUTHORITY)
    pods = [cluster.add(runtime, tls=own) for runtime in cluster.runtimes]
    cluster.wait_ready()
    service = Service.of(cluster, "secret")
    service.bring_up()
    for pod in pods:
        # From the one that has no such runtime it goes on to the other, in TLS too.
        assert service.infer(pod)[0] == service.model_id
        stranger = make(tables.AUTHORITY)
        theirs = grpc.ssl_channel_credentials(
            own.certificate_pem, stranger.key_pem(), stranger.certificate_pem
        )
        nothing = grpc.ssl_channel_credentials(own.certificate_pem)
        for credentials in (theirs, nothing, None):
            with channel_to(f"{pod.ip}:{tables.GRPC_PORT}", credentials) as channel:
                call = channel.unary_unary("/mmesh.ModelMesh/getVModelStatus")
                assert refusal(partial(call, b"", timeout=60))[0] is Code.UNAVAILABLE
        with channel_to(f"{pod.ip}:{tables.PEER_PORT}") as channel:
            call = channel.unary_unary("/mm.peer.Peer/statistics")
            assert refusal(partial(call, b"", timeout=60))[0] is Code.UNAVAILABLE
        # Kubelet knows nothing of all this.
        assert pod.probe(tables.READINESS) == pod.probe(tables.LIVENESS) == 200


@pytest.mark.parametrize("runtime", [MLSERVER, TORCHSERVE], ids=["by socket", "by port"])
def test_interop_29_runtimes_are_called_in_plain_text_with_large_messages(
    cluster: Cluster, runtime: tables.Runtime
) -> None:
    service = Service.of(cluster, f"large-{runtime.name[:2]}", kind=runtime.formats[1])
    service.bring_up()
    pod = cluster.pod_of(runtime)
    by_socket = "INTERNAL_SERVING_GRPC_SOCKET_PATH" in pod.settings
    assert by_socket is (runtime is MLSERVER)
    assert ("INTERNAL_GRPC_PORT" in pod.settings) is not by_socket
    text = "large" * 2**21
    model_id, seen = service.infer(pod, text)
    assert (model_id, text.encode() in seen) == (service.model_id, True)
    # More than grpc's own 4 MiB, and less than what the controller allows.
    answer = pod.call(
        "/inference.GRPCInferenceService/ModelInfer",
        b"\x0a" + bytes([len(service.name)]) + service.name.encode() + b"\x12\x0canswer-large",
    )
    assert len(answer) == 8 * 2**20
    code, _ = refusal(partial(service.infer, pod, "x" * (16 * 2**20)))
    assert code is Code.RESOURCE_EXHAUSTED
