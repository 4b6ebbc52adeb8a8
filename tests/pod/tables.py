"""What the modelmesh-serving controller puts into a pod, as data (interop 3, 4.2).

The tables of the controller's template and of its code, for the container ``mm`` and for what
stands beside it. ``pods`` makes pods of them, and nothing else there knows a variable or a path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

SERVICE_NAME: Final = "modelmesh-serving"
#: What the controller calls it by: the certificate of the pods is for this name (1.5).
AUTHORITY: Final = f"{SERVICE_NAME}.models"
GRPC_PORT: Final = 8033
PEER_PORT: Final = 8080
PROBE_PORT: Final = 8089
PRESTOP_PORT: Final = 8090
METRICS_PORT: Final = 2112
#: What the NetworkPolicy lets in from other pods of the mesh (3.8).
PEER_PORTS: Final = frozenset({GRPC_PORT, PEER_PORT})
GRACE_PERIOD_S: Final = 90
MEMORY_LIMIT_BYTES: Final = 448 * 2**20

CONFIG_DIRECTORY: Final = "/etc/watson/mmesh/config"
ETCD_DIRECTORY: Final = "/opt/kserve/mmesh/etcd"
TLS_DIRECTORY: Final = "/opt/kserve/mmesh/tls"
STOP_SCRIPT: Final = "/opt/kserve/mmesh/stop.sh"

#: 3.3, in the controller's order. Braces are what Kubernetes and the runtime put in; a row whose
#: value asks for what a pod has not is left out, as the controller leaves it out.
ENVIRONMENT: Final = (
    # internalModelMeshEnvVars: as the controller's own tests set them.
    ("BOOTSTRAP_CLEARANCE_PERIOD_MS", "0"),
    ("MM_SERVICE_NAME", SERVICE_NAME),
    ("MM_SVC_GRPC_PORT", str(GRPC_PORT)),
    ("WKUBE_POD_NAME", "{pod_name}"),
    ("WKUBE_POD_IPADDR", "{pod_ip}"),
    ("MM_LOCATION", "{host_ip}"),
    ("KV_STORE", "etcd:{etcd_directory}/etcd_connection"),
    ("MM_METRICS", f"prometheus:port={METRICS_PORT};scheme=https"),
    ("SHUTDOWN_TIMEOUT_MS", str(GRACE_PERIOD_S * 1000)),
    ("INTERNAL_SERVING_GRPC_PORT", "{data_port}"),
    ("INTERNAL_SERVING_GRPC_SOCKET_PATH", "{data_socket}"),
    ("INTERNAL_GRPC_PORT", "{management_port}"),
    ("INTERNAL_GRPC_SOCKET_PATH", "{management_socket}"),
    ("MM_SVC_GRPC_MAX_MSG_SIZE", "16777216"),
    ("MM_KVSTORE_PREFIX", "mm"),
    ("MM_DEFAULT_VMODEL_OWNER", "ksp"),
    ("MM_PAYLOAD_PROCESSORS", "{payload_processors}"),
    ("MM_LABELS", "{labels}"),
    ("MM_TYPE_CONSTRAINTS_PATH", "{config_directory}/type_constraints"),
    ("MM_DATAPLANE_CONFIG_PATH", "{config_directory}/dataplane_api_config"),
    ("MM_TLS_KEY_CERT_PATH", "{tls_directory}/tls.crt"),
    ("MM_TLS_PRIVATE_KEY_PATH", "{tls_directory}/tls.key"),
    ("MM_TLS_CLIENT_AUTH", "{tls_client_auth}"),
    ("MM_TLS_TRUST_CERT_PATH", "{tls_directory}/tls.crt"),
)
#: What kubelet adds to every container.
OF_KUBERNETES: Final = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}


@dataclass(frozen=True, slots=True)
class Probe:
    """An HTTP GET of kubelet's (3.6)."""

    path: str
    port: int
    timeout_s: float


READINESS: Final = Probe("/ready", PROBE_PORT, 1.0)
LIVENESS: Final = Probe("/live", PROBE_PORT, 5.0)
#: The hook of every container of the runtime; kubelet waits for it as long as the grace period.
PRESTOP: Final = Probe("/prestop", PRESTOP_PORT, GRACE_PERIOD_S)
#: The hook of ``mm`` itself.
STOP_COMMAND: Final = (STOP_SCRIPT, "wait")

#: 3.5: constant in the controller.
_INFER: Final = {"idExtractionPath": [1], "vModelId": True}
DATAPLANE_CONFIG: Final[dict[str, Any]] = {
    "rpcConfigs": {
        "inference.GRPCInferenceService/ModelInfer": _INFER,
        "inference.GRPCInferenceService/ModelMetadata": _INFER,
        "tensorflow.serving.PredictionService/Predict": {
            "idExtractionPath": [1, 1],
            "vModelId": True,
        },
        "org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions": _INFER,
    },
    "allowOtherRpcs": True,
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """A serving runtime: what its labels and its adapter's READY say (3.5, 4.2)."""

    name: str
    formats: Sequence[str]
    protocols: Sequence[str]
    #: Full name of a method -> where the id stands.
    methods: Mapping[str, Sequence[int]]
    #: Says sizes when they are asked for, and 0 when it loads.
    measures_sizes: bool = False

    @property
    def labels(self) -> list[str]:
        """MM_LABELS."""
        kinds = [f"mt:{each}" for each in self.formats]
        return sorted([*kinds, *(f"pv:{each}" for each in self.protocols), f"rt:{self.name}"])

    def constraints(self) -> dict[str, Any]:
        """Its rows of ``type_constraints``."""
        rows = {f"rt:{self.name}": [f"rt:{self.name}"]}
        for each in self.formats:
            rows[f"mt:{each}"] = [f"mt:{each}"]
            rows |= {f"mt:{each}|pv:{pv}": [f"mt:{each}", f"pv:{pv}"] for pv in self.protocols}
        return {name: {"required": labels} for name, labels in rows.items()}


_KSERVE: Final = {
    "inference.GRPCInferenceService/ModelInfer": [1],
    "inference.GRPCInferenceService/ModelMetadata": [1],
}
MLSERVER: Final = Runtime("mlserver-1.x", ("sklearn", "sklearn:0"), ("grpc-v2", "v2"), _KSERVE)
TRITON: Final = Runtime("triton-2.x", ("onnx", "onnx:1"), ("grpc-v2", "v2"), _KSERVE)
TORCHSERVE: Final = Runtime(
    "torchserve-0.x",
    ("pytorch-mar", "pytorch-mar:0"),
    ("grpc-v2",),
    {
        **_KSERVE,
        "tensorflow.serving.PredictionService/Predict": [1, 1],
        "org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions": [1],
    },
    measures_sizes=True,
)
#: Of READY, the same in all adapters but for the capacity: 1 GiB less 128 MiB.
CAPACITY_BYTES: Final = 939_524_096
DEFAULT_MODEL_BYTES: Final = 1_000_000
LOAD_TIMEOUT_MS: Final = 90_000


def type_constraints(runtimes: Sequence[Runtime]) -> dict[str, Any]:
    """``type_constraints`` of a namespace with these runtimes."""
    rows: dict[str, Any] = {"_default": {"required": ["_no_runtime"]}}
    for each in runtimes:
        rows |= each.constraints()
    return rows


def etcd_secret(endpoint: str, root_prefix: str) -> str:
    """The value of ``etcd_connection`` as the quick start has it (2.3)."""
    return json.dumps({"endpoints": f"http://{endpoint}", "root_prefix": root_prefix})


def environment(values: Mapping[str, str]) -> dict[str, str]:
    """Answer the environment of ``mm`` in a pod with these values."""
    made = dict(OF_KUBERNETES)
    for name, template in ENVIRONMENT:
        try:
            made[name] = template.format_map(dict(values))
        except KeyError:
            continue
    return made
