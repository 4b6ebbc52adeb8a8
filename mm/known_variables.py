"""Environment variables of the Java mesh that are known here but not read (around 3).

``mm.config`` says once which of them were set. A variable leaves its list when it gets a meaning.
"""

from __future__ import annotations

from typing import Final

#: Set in deployments of the Java mesh for things that this one does not have.
MEANINGLESS: Final = (
    "CUSTOM_JVM_ARGS",
    "GC_DIAG",
    "HEAP_SIZE_MB",
    "LL_PRIVATE_ENDPOINT",
    "LL_REGISTRY",
    "MAX_DIRECT_BUFS_MB",
    "MAX_GC_PAUSE",
    "MEM_LIMIT_MB",
    "MESOS_TASK_ID",
    "MM_INSTALL_PATH",
    "MM_METRICS_PROMETHEUS_PORT",
    "MM_METRICS_STATSD_PORT",
    "MM_SEND_DEST_ID",
    "MM_SERVICE_CLASS",
    "NETTY_BUFFER_CHECKS",
    "WKUBE_NODE_IP",
    "WKUBE_NODE_NAME",
    "WKUBE_SERVICE_NAME",
    "WKUBE_SERVICE_PORT_NAME",
)

#: Read by other parts: the end of `mm serve`, `mm model`, the build, the table's import.
ELSEWHERE: Final = (
    "LL_TERMINATION_MSG_PATH",
    "MM_ADDRESS",
    "MM_ADDRESS_CA_PATH",
    "MM_ADDRESS_CERT_PATH",
    "MM_ADDRESS_KEY_PATH",
    "MM_ADDRESS_NAME",
    "MM_ADDRESS_TOKEN_PATH",
    "MM_BUILD_DEBUG",
    "MM_TABLE",
)

#: Names that other parts read, or that say where we are.
OTHERS: Final = {
    "KUBERNETES_SERVICE_HOST": "set by Kubernetes in every pod: there, a pod's name and address are"
    " required, and the termination message has a place",
    "MM_ADDRESS": "where `mm model` and `mm vmodel` call, if not told by `--address`",
    "MM_ADDRESS_CA_PATH": "for them: the authorities (PEM) whose certificates are trusted, the"
    " system's if not set; with it, an address without a scheme means TLS",
    "MM_ADDRESS_CERT_PATH": "for them, where the instance asks for one: their own certificate, and"
    " its key unless that is elsewhere",
    "MM_ADDRESS_KEY_PATH": "for them: the key of that certificate, without a passphrase",
    "MM_ADDRESS_NAME": "for them: the name that the instance's certificate has, if that is not the"
    " host of the address",
    "MM_ADDRESS_TOKEN_PATH": "for them, where the mesh asks who calls: a file with their bearer"
    " token, if not told by `--token-file`",
    "MM_BUILD_DEBUG": "how the extension is built",
    "MM_TABLE": "`python`: the table without the extension, for debugging",
    "ZOOKEEPER": "refused with an explanation: ZooKeeper is not supported and will not be",
}
