"""Which instance this is, of which cluster, and where: the settings that say so (around 3.1).

Owns their reading, as a part of ``Config``. What ``KV_STORE`` means behind ``etcd:`` is
``mm.edge.kv_config``'s.
"""

from __future__ import annotations

import uuid
from itertools import combinations
from typing import Final, NamedTuple

from mm.core.ids import InstanceId
from mm.core.versions import RELEASE_NUMBER, RELEASE_VERSION, version_number
from mm.environment import Environment, wrong
from mm.errors import ConfigError

#: Characters of a pod's name that make its instance id: the replica set's hash and the pod's own
#: suffix. Short, because the id stands in many registry records (around 1.2).
POD_ID_LENGTH: Final = 12
#: What is gone on with when a setting is wrong, so that the others are looked at.
_WRONG: Final = "wrong"


def kv_store(env: Environment) -> str:
    """Answer what ``KV_STORE`` says, of a kind that there is."""
    allowed = "etcd:<JSON file or host:port[,host:port...]>, embedded or memory"
    zookeeper = "ZooKeeper is not supported; allowed: " + allowed
    found = env.find("KV_STORE")
    value = "" if found is None else found[1].strip()
    kind, _, rest = value.partition(":")
    if value in ("embedded", "memory") or (kind == "etcd" and rest.strip()):
        return value
    if kind == "zookeeper":
        env.refuse(ConfigError(f'KV_STORE="zookeeper:..." is not valid: {zookeeper}'))
    elif found is not None:
        # Only the kind is repeated: what follows may be a secret.
        env.refuse(wrong("KV_STORE", f"{kind}:..." if rest else value, allowed))
    elif env.is_set("ZOOKEEPER"):
        env.refuse(ConfigError(f"KV_STORE is not set and ZOOKEEPER is: {zookeeper}"))
    else:
        env.refuse(ConfigError(f"KV_STORE is not set; allowed: {allowed}"))
    # Nothing else is asked for that only a cluster needs.
    return "memory"


def key_part(env: Environment, *names: str) -> str | None:
    """Answer the first of ``names`` that is set, as a part of keys; None: none is."""
    value = env.text(*names)
    if value is not None and ("/" in value or any(c.isspace() for c in value)):
        allowed = 'a name without "/" and without spaces: it is part of a key'
        env.refuse(wrong(next(n for n in names if env.is_set(n)), value, allowed))
    return value


def service_name(env: Environment, *, alone: bool) -> str:
    """Answer the cluster's name."""
    name = key_part(env, "MM_SERVICE_NAME", "TAS_SERVICE_NAME")
    if name is not None:
        return name
    if alone:
        return "modelmesh"
    env.refuse(
        ConfigError(
            "MM_SERVICE_NAME is not set; it names the cluster and every instance of one cluster"
            " must have the same (only KV_STORE=embedded and KV_STORE=memory do without)"
        )
    )
    return _WRONG


def instance_id(env: Environment) -> InstanceId:
    """Answer this instance's id."""
    chosen = env.text("MM_INSTANCE_ID")
    pod_name = env.text("WKUBE_POD_NAME")
    if chosen is not None:
        name, instance_id = "MM_INSTANCE_ID", chosen
    elif pod_name is not None:
        name, instance_id = "WKUBE_POD_NAME", pod_name[-POD_ID_LENGTH:]
    elif env.is_set("KUBERNETES_SERVICE_HOST"):
        env.refuse(
            ConfigError(
                "WKUBE_POD_NAME is not set; in Kubernetes set it to the pod's name "
                "(fieldRef metadata.name), or set MM_INSTANCE_ID"
            )
        )
        return InstanceId(_WRONG)
    else:
        return InstanceId(uuid.uuid4().hex[:POD_ID_LENGTH])
    if any(c in ",/" or c.isspace() for c in instance_id):
        env.refuse(wrong(name, instance_id, 'an instance id without ",", "/" and spaces'))
    return InstanceId(instance_id)


def advertise_host(env: Environment, *, alone: bool) -> tuple[str, tuple[str, ...]]:
    """Answer where peers reach this instance, and what is odd about it."""
    names = ("MM_ADVERTISE_ADDRESS", "WATSON_SERVICE_ADDRESS", "WKUBE_POD_IPADDR")
    host = env.text(*names)
    if host is not None:
        if any(c in "/," or c.isspace() for c in host) or host.count(":") == 1:
            name = next(name for name in names if env.is_set(name))
            env.refuse(wrong(name, host, "a host name or an IP address, without a port"))
        host = host.removeprefix("[").removesuffix("]")
        # An address of IPv6 in brackets, so that ":port" can follow.
        return f"[{host}]" if ":" in host else host, ()
    if env.is_set("KUBERNETES_SERVICE_HOST"):
        env.refuse(
            ConfigError(
                "WKUBE_POD_IPADDR is not set; in Kubernetes set it to the pod's address "
                "(fieldRef status.podIP), or set MM_ADVERTISE_ADDRESS"
            )
        )
        return _WRONG, ()
    if alone:
        return "127.0.0.1", ()
    return "127.0.0.1", (
        "MM_ADVERTISE_ADDRESS is not set: other instances are told 127.0.0.1, which only those "
        "on this machine can reach",
    )


def version(env: Environment) -> tuple[int, tuple[str, ...]]:
    """Answer this instance's build as a number, and what is odd about it."""
    text = env.text_or_nothing("SERVICE_VERSION")
    number = RELEASE_NUMBER if text is None else version_number(text)
    if number is not None:
        return number, ()
    # As Java does: a version is no reason not to start. But without any, all loads would go to
    # instances that say theirs.
    return RELEASE_NUMBER, (
        f'SERVICE_VERSION="{text}" has not the form <name>-YYYYMMDD-<number> or'
        f" YYYYMMDD-HHMM[-<number>]: this instance counts as {RELEASE_VERSION}",
    )


class PortSettings(NamedTuple):
    """The listeners; None: there is none."""

    grpc: int
    management: int | None
    peer: int
    probe: int | None
    prestop: int | None


def ports(env: Environment) -> PortSettings:
    """Answer the ports to listen on."""
    names = (
        "MM_SVC_GRPC_PORT",
        "MM_MANAGEMENT_PORT",
        "MM_PEER_PORT",
        "MM_PROBE_PORT",
        "MM_PRESTOP_WAIT_PORT",
    )
    found = PortSettings(
        env.port(names[0], "TAS_SVC_GRPC_PORT", default=8033, free_allowed=True),
        env.port_or_none(names[1], default=None),
        env.port(names[2], default=8080, free_allowed=True),
        env.port_or_none(names[3], default=8089),
        env.port_or_none(names[4], default=8090),
    )
    for (first, port), (second, other) in combinations(zip(names, found, strict=True), 2):
        if port == other and port:
            env.refuse(ConfigError(f"{first} and {second} are both {port}; they must differ"))
    return found
