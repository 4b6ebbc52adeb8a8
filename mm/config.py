"""One frozen ``Config``, read from the environment with the names of the Java mesh (around 3).

What an operator can set is here; limits that nobody needs to set are in ``mm.limits``, and how a
variable is read and refused in ``mm.environment``. The grammar of ``KV_STORE`` behind ``etcd:`` is
``mm.edge.kv_config``'s.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from mm import identity_settings, json_settings
from mm.access_settings import access_settings
from mm.connection_settings import ConnectionSettings, connection_settings
from mm.core.constraints import NO_CONSTRAINTS, TypeConstraints
from mm.core.dataplane import DataplaneConfig
from mm.core.ids import InstanceId
from mm.core.load_failures import FailureRules
from mm.core.static_models import StaticModel
from mm.core.versions import RELEASE_NUMBER
from mm.endpoints import (
    DEFAULT_RUNTIME_ENDPOINTS,
    Endpoint,
    runtime_endpoints,
    serving_endpoint,
)
from mm.environment import Environment
from mm.known_variables import ELSEWHERE, MEANINGLESS
from mm.limits import MIB, Limits
from mm.log_settings import LogSettings, log_settings
from mm.metrics_settings import MetricsSettings, metrics_settings
from mm.payload_settings import PayloadSettings, payload_settings
from mm.scaling_settings import ScalingSettings, copy_calls_max, scaling_settings
from mm.tls_settings import PLAIN_TEXT, TlsSettings, tls_settings

#: Threads of the wire: readers that a table has places for, with some to spare.
WIRE_THREADS_MAX: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(Limits):
    """Everything that one process is told from outside.

    ``Config(service_name=..., kv_store=..., instance_id=...)`` is enough for a test: every other
    field has the default that an unset variable stands for.
    """

    #: MM_SERVICE_NAME: the cluster's name and a part of every key, so no "/" and no space.
    service_name: str
    #: KV_STORE: "etcd:...", "embedded" or "memory". Not shown: it may hold a password.
    kv_store: str = field(repr=False)
    #: MM_INSTANCE_ID, or the end of WKUBE_POD_NAME, or made up. Never empty, no comma: ids travel
    #: in comma-separated lists; no "/": it ends a key.
    instance_id: InstanceId

    #: MM_KVSTORE_PREFIX: the first part of every key. Must never change in a live cluster.
    kv_prefix: str = "tas-runtime"
    #: MM_MAX_MODELS: no more are registered; 0 for no limit. Every instance holds all records, in
    #: at most 1,000 bytes each, and etcd's quota is 2 GiB by default: a million is what the design
    #: promises, and a loop that registers without end should hear of it before memory does.
    models_max: int = 1_000_000
    #: KV_READ_ONLY: no registration, no vmodel is written; for the migration of a store.
    kv_read_only: bool = False

    #: MM_DEFAULT_VMODEL_OWNER: of vmodels that are created without one.
    default_vmodel_owner: str = ""

    #: MM_BIND_HOST: the address that all listeners bind.
    bind_host: str = "0.0.0.0"
    #: MM_SVC_GRPC_PORT: clients. 0 chooses a free port and logs it.
    grpc_port: int = 8033
    #: MM_MANAGEMENT_PORT: those who manage models; None: at the port of the clients.
    management_port: int | None = None
    #: MM_PEER_PORT: other instances. 0 chooses a free port and logs it.
    peer_port: int = 8080
    #: MM_PROBE_PORT: `/live` and `/ready` over HTTP; None: nobody asks.
    probe_port: int | None = 8089
    #: MM_PRESTOP_WAIT_PORT: `/prestop` over HTTP, which keeps the runtime's containers running
    #: until this instance has ended; None: nobody asks.
    prestop_port: int | None = 8090
    #: MM_TLS_...: of both listeners, and of calls to other instances.
    tls: TlsSettings = PLAIN_TEXT
    #: MM_ADVERTISE_ADDRESS, WATSON_SERVICE_ADDRESS or WKUBE_POD_IPADDR: where peers reach this
    #: instance, as a port can follow it: that of the peer listener as really bound.
    advertise_host: str = "127.0.0.1"

    #: SERVICE_VERSION: the build that this instance is of, as a number; loads go to the newest.
    #: Unset: the day of the release of mm.
    version: int = RELEASE_NUMBER

    #: MM_LOCATION: the machine; copies of one model are spread over locations.
    location: str = "127.0.0.1"
    #: MM_ZONE: empty for none.
    zone: str = ""
    #: MM_LABELS: sorted, without repeats.
    labels: tuple[str, ...] = ()

    #: INTERNAL_GRPC_PORT or INTERNAL_GRPC_SOCKET_PATH: the runtime, to be tried in this order.
    runtime_endpoints: tuple[Endpoint, ...] = DEFAULT_RUNTIME_ENDPOINTS
    #: INTERNAL_SERVING_GRPC_...: where inferences go; None: where the runtime is managed.
    runtime_serving_endpoint: Endpoint | None = None

    #: MM_SVC_GRPC_MAX_MSG_SIZE: a request from a client, and a response of the runtime.
    message_bytes_max: int = 16 * MIB
    #: MM_SVC_GRPC_MAX_HEADERS_SIZE: a header list, as HTTP/2 counts it.
    headers_bytes_max: int = 8192
    connections: ConnectionSettings = field(default_factory=ConnectionSettings)
    #: MM_MULTI_PARALLELISM: concurrent calls for one multi-model call.
    multi_parallelism: int = 4

    #: MM_DATAPLANE: who moves the bytes, "wire" (docs/wire.md) or "python".
    dataplane: str = "wire"
    #: MM_LEGACY_ERRORS: failed calls to models have the codes and texts of the Java mesh. The wire
    #: passes on what runtimes say as it is, so the Python data plane serves then.
    legacy_errors: bool = False
    #: MM_WIRE_THREADS: of the wire.
    wire_threads: int = 1
    #: MM_DATAPLANE_CONFIG, or the content of MM_DATAPLANE_CONFIG_PATH as it is now.
    dataplane_config: DataplaneConfig = field(default_factory=DataplaneConfig)
    #: MM_DATAPLANE_CONFIG_PATH: a file that is read again whenever it changes.
    dataplane_config_path: str = ""

    #: MM_ACCESS_CONFIG_PATH: a file that is read again whenever it changes, of who may do what;
    #: empty: anybody may do anything.
    access_path: str = ""

    #: MM_TYPE_CONSTRAINTS, or the content of MM_TYPE_CONSTRAINTS_PATH at the start.
    type_constraints: TypeConstraints = NO_CONSTRAINTS
    #: MM_TYPE_CONSTRAINTS_PATH: a file that is read again whenever it changes.
    type_constraints_path: str = ""

    #: MM_AUTO_REGISTER_MODELS, and then those that the file names as well: what an instance
    #: registers when it starts.
    static_models: tuple[StaticModel, ...] = ()
    #: MM_AUTO_REGISTER_MODEL_PATH: a file that is read again whenever it changes.
    static_models_path: str = ""

    #: MM_LOAD_FAILURE_EXPIRY_TIME_MS: how long a failed load keeps an instance from trying again.
    load_failure_expiry_ms: int = 900_000

    #: BOOTSTRAP_CLEARANCE_PERIOD_MS: for so long after the start failed loads may show that this
    #: instance can load nothing. 0, also by MM_FAILFAST_UPGRADE_ENABLED=false: they never do.
    probation_ms: int = 180_000

    #: MM_MIN_CHURN_AGE_MS: refuse loads that would evict a model used less long ago. 0: never.
    min_churn_age_ms: int = 0

    #: MM_EVICTION: who goes when room is needed, whose loss costs least as long as that beats LRU
    #: ("cost", decision 13), or the least recently used ("lru").
    eviction: str = "cost"

    #: MM_MAX_INFLIGHT_PER_MODEL_COPY: calls that one copy has and keeps waiting, where the runtime
    #: asks for `limitModelConcurrency`. 0: by what each copy takes at a time; below 0: any number.
    copy_calls_max: int = 0

    scaling: ScalingSettings = field(default_factory=ScalingSettings)

    payloads: PayloadSettings = field(default_factory=PayloadSettings)

    #: SHUTDOWN_TIMEOUT_MS: from the signal to the exit.
    shutdown_timeout_s: float = 30.0
    logs: LogSettings = field(default_factory=LogSettings)

    metrics: MetricsSettings = field(default_factory=MetricsSettings)

    #: What was odd about the environment; `log_warnings` says it once.
    warnings: tuple[str, ...] = ()

    @property
    def prestop_wait_s(self) -> float:
        """The longest that `/prestop` is not answered: twice what a stop takes, as in Java."""
        return 2 * (self.shutdown_timeout_s + 1)

    @property
    def failure_rules(self) -> FailureRules:
        """How long failed loads count, and how many are enough."""
        return FailureRules(
            expiry_ms=self.load_failure_expiry_ms,
            pause_first_ms=round(self.load_pause_first_s * 1000),
            failures_max=self.load_failures_max,
        )

    def log_warnings(self, logger: logging.Logger) -> None:
        """Say once what was odd about the environment."""
        for warning in self.warnings:
            logger.warning("%s", warning)

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Self:
        """Read every setting, or raise ``ConfigError`` with all that is wrong."""
        env = Environment(variables)
        config = cls.read(env)
        env.check()
        return config

    @classmethod
    def read(cls, env: Environment) -> Self:
        """Read every setting; of what is wrong ``env`` knows, and here are defaults instead."""
        kv_store = identity_settings.kv_store(env)
        alone = kv_store in ("embedded", "memory")
        advertise_host, address_warnings = identity_settings.advertise_host(env, alone=alone)
        ports = identity_settings.ports(env)
        version, version_warnings = identity_settings.version(env)
        metrics = metrics_settings(env)
        connections = connection_settings(env)
        tls, tls_warnings = tls_settings(env)
        payloads = payload_settings(env)
        access_path, access_warnings = access_settings(env, tls)
        told = address_warnings + version_warnings + tls_warnings + access_warnings
        told += connections.warnings + metrics.warnings + payloads.warnings
        return cls(
            service_name=identity_settings.service_name(env, alone=alone),
            kv_store=kv_store,
            instance_id=identity_settings.instance_id(env),
            kv_prefix=identity_settings.key_part(env, "MM_KVSTORE_PREFIX") or "tas-runtime",
            models_max=env.integer("MM_MAX_MODELS", default=1_000_000, minimum=0, maximum=2**53),
            kv_read_only=env.boolean("KV_READ_ONLY", default=False),
            default_vmodel_owner=env.text_or_nothing("MM_DEFAULT_VMODEL_OWNER") or "",
            bind_host=env.text("MM_BIND_HOST") or "0.0.0.0",
            grpc_port=ports.grpc,
            management_port=ports.management,
            peer_port=ports.peer,
            probe_port=ports.probe,
            prestop_port=ports.prestop,
            tls=tls,
            advertise_host=advertise_host,
            version=version,
            location=env.text_or_nothing("MM_LOCATION") or advertise_host,
            zone=env.text_or_nothing("MM_ZONE") or "",
            labels=_labels(env),
            runtime_endpoints=runtime_endpoints(env),
            runtime_serving_endpoint=serving_endpoint(env),
            message_bytes_max=_bytes(env, "MM_SVC_GRPC_MAX_MSG_SIZE", 16 * MIB, 1, 2**31 - 1),
            headers_bytes_max=_bytes(env, "MM_SVC_GRPC_MAX_HEADERS_SIZE", 8192, 1024, 65_536),
            connections=connections,
            multi_parallelism=env.integer(
                "MM_MULTI_PARALLELISM", default=4, minimum=1, maximum=1000
            ),
            dataplane=env.choice("MM_DATAPLANE", default="wire", allowed=("wire", "python")),
            legacy_errors=env.boolean("MM_LEGACY_ERRORS", default=False),
            wire_threads=_wire_threads(env),
            dataplane_config=json_settings.dataplane_config(env),
            dataplane_config_path=json_settings.existing_file(env, "MM_DATAPLANE_CONFIG_PATH"),
            access_path=access_path,
            type_constraints=json_settings.type_constraints(env),
            type_constraints_path=json_settings.existing_file(env, "MM_TYPE_CONSTRAINTS_PATH"),
            static_models=json_settings.static_models(env),
            static_models_path=json_settings.existing_file(
                env, "MM_AUTO_REGISTER_MODEL_PATH", "MM_AUTO_REGISTER_MODELS_PATH"
            ),
            load_failure_expiry_ms=_milliseconds(
                env, "MM_LOAD_FAILURE_EXPIRY_TIME_MS", default=900_000, minimum=1
            ),
            probation_ms=_probation_ms(env),
            min_churn_age_ms=_milliseconds(env, "MM_MIN_CHURN_AGE_MS", default=0, minimum=0),
            eviction=env.choice("MM_EVICTION", default="cost", allowed=("lru", "cost")),
            copy_calls_max=copy_calls_max(env),
            scaling=scaling_settings(env),
            payloads=payloads,
            shutdown_timeout_s=_shutdown_timeout_s(env),
            logs=log_settings(env),
            metrics=metrics,
            warnings=told + _unused(env),
        )


def _wire_threads(env: Environment) -> int:
    # Two where there is room for them beside Python and the runtime (design section 5).
    default = 1 if len(os.sched_getaffinity(0)) <= 2 else 2
    return env.integer("MM_WIRE_THREADS", default=default, minimum=1, maximum=WIRE_THREADS_MAX)


def _probation_ms(env: Environment) -> int:
    name = "BOOTSTRAP_CLEARANCE_PERIOD_MS"
    period_ms = _milliseconds(env, name, default=180_000, minimum=0)
    return period_ms if env.boolean("MM_FAILFAST_UPGRADE_ENABLED", default=True) else 0


def _shutdown_timeout_s(env: Environment) -> float:
    name, day_ms = "SHUTDOWN_TIMEOUT_MS", 24 * 3600 * 1000
    limits = {"default": 30_000, "minimum": 1, "maximum": day_ms}
    return env.integer(name, **limits, meaning="milliseconds") / 1000


def _bytes(env: Environment, name: str, default: int, minimum: int, maximum: int) -> int:
    limits = {"default": default, "minimum": minimum, "maximum": maximum}
    return env.integer(name, **limits, meaning="bytes")


def _milliseconds(env: Environment, name: str, *, default: int, minimum: int) -> int:
    return env.integer(
        name, default=default, minimum=minimum, maximum=2**53, meaning="milliseconds"
    )


def _labels(env: Environment) -> tuple[str, ...]:
    labels = (label.strip() for label in (env.text_or_nothing("MM_LABELS") or "").split(","))
    return tuple(sorted({label for label in labels if label}))


def _unused_labels(env: Environment) -> tuple[str, ...]:
    names = ("MM_TYPE_CONSTRAINTS", "MM_TYPE_CONSTRAINTS_PATH")
    if not _labels(env) or any(env.is_set(name) for name in names):
        return ()
    return ("MM_LABELS is set, but no type constraints, so the labels decide nothing here",)


def _unused(env: Environment) -> tuple[str, ...]:
    for name in ELSEWHERE:
        env.find(name)
    meaningless = [name for name in MEANINGLESS if env.is_set(name)]
    unknown = env.unknown("MM_")
    warnings = []
    if meaningless:
        warnings.append(f"has no meaning here, and is ignored: {', '.join(meaningless)}")
    if unknown:
        warnings.append(f"unknown, and ignored (misspelt?): {', '.join(unknown)}")
    return (*_unused_labels(env), *warnings)
