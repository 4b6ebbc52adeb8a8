"""What each environment variable is for, and what it comes to: for `mm config` and its reference.

Owns the words. Names, order and defaults are held true to what ``Config.read`` asks for by
``tests/cli/test_config.py``; what is wrong with a value, the readers say.
"""

from __future__ import annotations

from typing import Final

from mm.observing_reference import OBSERVING
from mm.setting import Setting
from mm.setting import setting as _setting
from mm.tls_reference import TLS_AND_ACCESS


def _of_files(count: int, what: str, path: str) -> str:
    """Of JSON a list says how much it is: it is long, and may hold credentials."""
    return path or (f"{what}: {count}" if count else "")


SECTIONS: Final[tuple[tuple[str, tuple[Setting, ...]], ...]] = (
    (
        "The store and the cluster",
        (
            _setting(
                "KV_STORE",
                lambda c: c.kv_store,
                "Where the registry is. `embedded` is an etcd of its own, for development; `memory`"
                " lives and dies with one process. TLS, user and password stand in the JSON file,"
                " which may change while instances run.",
                "required",
                "`etcd:[https://]host:port[,host:port…][;rootPrefix=…]`, `etcd:/path/to/file.json`,"
                " `embedded` or `memory`",
            ),
            _setting(
                "MM_SERVICE_NAME TAS_SERVICE_NAME",
                lambda c: c.service_name,
                "The cluster's name, the same in all its instances, and a part of every key.",
                "required with etcd",
                'without "/" and spaces',
            ),
            _setting(
                "MM_KVSTORE_PREFIX",
                lambda c: c.kv_prefix,
                "The first part of every key. Never change it in a live cluster.",
                "tas-runtime",
                'without "/" and spaces',
            ),
            _setting(
                "KV_READ_ONLY",
                lambda c: c.kv_read_only,
                "Write no registration and no vmodel: for the migration of a store.",
            ),
            _setting(
                "MM_MAX_MODELS",
                lambda c: c.models_max,
                "No more models are registered, and no more vmodels than that made; 0 for no"
                " limit. Existing ones stay.",
            ),
            _setting(
                "MM_DEFAULT_VMODEL_OWNER",
                lambda c: c.default_vmodel_owner,
                "The owner of vmodels that are created without one.",
                "none",
            ),
        ),
    ),
    (
        "This instance",
        (
            _setting(
                "MM_INSTANCE_ID WKUBE_POD_NAME",
                lambda c: c.instance_id,
                "Its id; a restart may use it again. Of a pod's name the last 12 characters.",
                "made up; in Kubernetes one of the two is required",
                'without ",", "/" and spaces',
            ),
            _setting(
                "MM_ADVERTISE_ADDRESS WATSON_SERVICE_ADDRESS WKUBE_POD_IPADDR",
                lambda c: c.advertise_host,
                "Where other instances reach this one.",
                "`127.0.0.1`; in Kubernetes one of them is required",
                "a host name or an address, without a port",
            ),
            _setting(
                "MM_LOCATION",
                lambda c: c.location,
                "The machine: copies of a model are spread over locations.",
                "the advertised address",
            ),
            _setting("MM_ZONE", lambda c: c.zone, "The zone: copies are spread.", "none"),
            _setting(
                "MM_LABELS",
                lambda c: c.labels,
                "What type constraints ask for, separated by commas.",
                "none",
            ),
            _setting(
                "SERVICE_VERSION",
                lambda c: c.version,
                "The build that this instance is of; loads go to the newest. It is shown as the"
                " number that builds are compared by.",
                "the day of the release of mm",
                "`NAME-YYYYMMDD-NUMBER` or `YYYYMMDD-HHMM[-NUMBER]`; others count as unset",
            ),
        ),
    ),
    (
        "Listeners",
        (
            _setting(
                "MM_SVC_GRPC_PORT TAS_SVC_GRPC_PORT",
                lambda c: c.grpc_port,
                "Clients call here. The Java mesh served none without it.",
            ),
            _setting(
                "MM_MANAGEMENT_PORT",
                lambda c: c.management_port,
                "Who registers, lists or watches models calls here, and here alone"
                " ([more](security.md#who-may-do-what)).",
                "none: at the clients' port",
                "a TCP port; 0 chooses a free one, NONE does without",
            ),
            _setting("MM_PEER_PORT", lambda c: c.peer_port, "Other instances call here."),
            _setting(
                "MM_PROBE_PORT",
                lambda c: c.probe_port,
                "`/live` and `/ready` over HTTP ([in a pod](operating.md#in-a-pod)).",
            ),
            _setting(
                "MM_PRESTOP_WAIT_PORT",
                lambda c: c.prestop_port,
                "`/prestop` over HTTP, the pre-stop hook of the runtime's containers.",
            ),
            _setting(
                "MM_BIND_HOST",
                lambda c: c.bind_host,
                "The address that all of them bind; `::` for IPv4 and IPv6.",
                "0.0.0.0",
            ),
        ),
    ),
    TLS_AND_ACCESS,
    (
        "The runtime",
        (
            _setting(
                "INTERNAL_GRPC_PORT",
                lambda c: ", ".join(map(str, c.runtime_endpoints)),
                "Where the runtime is managed, on this machine. Set this or the socket.",
                "both `/tmp/mmesh/grpc.sock` and 8085 are tried",
                "a TCP port",
            ),
            _setting(
                "INTERNAL_GRPC_SOCKET_PATH",
                lambda c: ", ".join(map(str, c.runtime_endpoints)),
                "Or its Unix socket.",
                "see the port",
            ),
            _setting(
                "INTERNAL_SERVING_GRPC_PORT",
                lambda c: c.runtime_serving_endpoint or "",
                "Where it answers inferences, if elsewhere. Set this or the socket.",
                "where it is managed",
                "a TCP port",
            ),
            _setting(
                "INTERNAL_SERVING_GRPC_SOCKET_PATH",
                lambda c: c.runtime_serving_endpoint or "",
                "Or that one's Unix socket.",
                "see the port",
            ),
        ),
    ),
    (
        "Calls",
        (
            _setting(
                "MM_SVC_GRPC_MAX_MSG_SIZE",
                lambda c: c.message_bytes_max,
                "The largest request of a client, and response of the runtime.",
            ),
            _setting(
                "MM_SVC_GRPC_MAX_HEADERS_SIZE",
                lambda c: c.headers_bytes_max,
                "The largest header list of a client's call.",
            ),
            _setting(
                "MM_SVC_GRPC_MAX_CONNECTIONS",
                lambda c: c.connections.connections_max,
                "Connections of clients at a time, and at most three quarters of the files that"
                " the process may open. Instances do not count ([security](security.md)).",
            ),
            _setting(
                "MM_SVC_GRPC_MAX_CONNECTIONS_PER_ADDRESS",
                lambda c: c.connections.per_address_max,
                "Of these, of one IPv4 address or IPv6 /64, such as a load balancer's.",
                "three quarters of `MM_SVC_GRPC_MAX_CONNECTIONS`",
            ),
            _setting(
                "MM_SVC_GRPC_MAX_CONNECTION_IDLE_SECS",
                lambda c: c.connections.idle_s,
                "A client that has made no call for so long is told to connect anew; 0: never.",
            ),
            _setting(
                "MM_SVC_GRPC_MAX_CONNECTION_AGE_SECS",
                lambda c: c.connections.age_s,
                "A client that has been connected for so long, a tenth more or less, is told to"
                " connect anew, so that clients spread over new instances; 0: never.",
            ),
            _setting(
                "MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS",
                lambda c: c.connections.age_grace_s,
                "How long its calls may then run; 0: as long as they like.",
            ),
            _setting(
                "MM_WIRE_BUFFER_BYTES_MAX",
                lambda c: c.connections.buffer_bytes_max,
                "What the calls of each thread of the wire take, with their requests;"
                " one connection has at most half of it.",
            ),
            _setting(
                "MM_MULTI_PARALLELISM",
                lambda c: c.multi_parallelism,
                "Calls at once for one call that names several models.",
            ),
            _setting(
                "MM_DATAPLANE_CONFIG",
                lambda c: _of_files(
                    len(c.dataplane_config.rpcs or ()), "methods", c.dataplane_config_path
                ),
                "Which methods are served, and where in a request the id stands"
                " ([how to write it](data-plane.md)). Set this or the file.",
                "everything is served, ids come from headers",
                "JSON",
            ),
            _setting(
                "MM_DATAPLANE_CONFIG_PATH",
                lambda c: c.dataplane_config_path,
                "A file of it, read again when it changes.",
                "none",
                "a file that exists",
            ),
            _setting(
                "MM_DATAPLANE",
                lambda c: c.dataplane,
                "What moves the bytes: threads that serve calls for loaded models without Python"
                " ([how](wire.md)), or Python, the reference for them, without libnghttp2.",
            ),
            _setting(
                "MM_LEGACY_ERRORS",
                lambda c: c.legacy_errors,
                "Failed calls to models have the codes and texts of the Java mesh, for clients that"
                " parse them: `<package.Service/Method>: <CODE>: ` before the runtime's own text,"
                " and INTERNAL where a runtime is away or a load failed. What refuses a call before"
                " its model is known, and the management API, are as without. The Python data"
                " plane serves then, whatever `MM_DATAPLANE` says.",
            ),
            _setting(
                "MM_WIRE_THREADS",
                lambda c: c.wire_threads,
                "Threads of the wire.",
                "1, or 2 on more than two cores",
            ),
        ),
    ),
    (
        "Models and copies",
        (
            _setting(
                "MM_TYPE_CONSTRAINTS",
                lambda c: _of_files(len(c.type_constraints), "types", c.type_constraints_path),
                "Which instances may load which types"
                " ([how to write it](type-constraints.md)). Set this or the file.",
                "none",
                "JSON",
            ),
            _setting(
                "MM_TYPE_CONSTRAINTS_PATH",
                lambda c: c.type_constraints_path,
                "A file of them, read again when it changes.",
                "none",
                "a file that exists",
            ),
            _setting(
                "MM_AUTO_REGISTER_MODELS MM_AUTO_REGISTER_MODEL",
                lambda c: _of_files(len(c.static_models), "models", ""),
                "Models that an instance registers when it starts"
                " ([more](operating.md#models-that-the-deployment-names)). Their keys are never"
                " shown.",
                "none",
                "JSON",
            ),
            _setting(
                "MM_AUTO_REGISTER_MODEL_PATH MM_AUTO_REGISTER_MODELS_PATH",
                lambda c: c.static_models_path,
                "A file of more, read again when it changes.",
                "none",
                "a file that exists",
            ),
            _setting(
                "MM_LOAD_FAILURE_EXPIRY_TIME_MS",
                lambda c: c.load_failure_expiry_ms,
                "The longest that a failed load keeps an instance from trying again: at once half"
                " of it if the model is at fault and is asked for, else 10 s at first, and twice as"
                " long after each further failure.",
            ),
            _setting(
                "MM_MIN_CHURN_AGE_MS",
                lambda c: c.min_churn_age_ms,
                "Refuse loads that would evict a model used less long ago; 0 for never.",
            ),
            _setting(
                "MM_EVICTION",
                lambda c: c.eviction,
                "Who goes when room is needed: `cost`, the one whose loss costs least, as long as"
                " that beats LRU; or `lru`, the least recently used.",
            ),
            _setting(
                "MM_SCALEUP_RPM_THRESHOLD",
                lambda c: c.scaling.rpm_threshold,
                "What one copy bears; with more, copies are added. Without effect where the runtime"
                " asks for `limitModelConcurrency`.",
            ),
            _setting(
                "MM_CONC_SCALEUP_BANDWIDTH_PCT",
                lambda c: c.scaling.bandwidth_pct,
                "The part of the calls at a time, as the runtime tells them for a copy, that may be"
                " in flight all the time; with more, copies are added.",
            ),
            _setting(
                "MM_MIN_SECOND_COPY_AGE_SECS",
                lambda c: c.scaling.second_copy_age_min_s,
                "A model that is used, and was used so long ago at least,",
            ),
            _setting(
                "MM_MAX_SECOND_COPY_AGE_SECS",
                lambda c: c.scaling.second_copy_age_max_s,
                "and so long ago at most, gets a second copy if there is room.",
            ),
            _setting(
                "MM_MAX_INFLIGHT_PER_MODEL_COPY",
                lambda c: c.copy_calls_max,
                "Where the runtime asks for `limitModelConcurrency`: calls that a copy has and"
                " keeps waiting; 0 for eight for each that it takes at a time (16 at least), below"
                " 0 for any number.",
            ),
        ),
    ),
    (
        "Metrics",
        (
            _setting(
                "MM_METRICS",
                lambda c: c.metrics,
                "How [metrics](metrics.md) are told: a page for Prometheus, packets for StatsD, or"
                " nothing.",
                "statsd:port=8126",
                "`disabled`, `prometheus` or `statsd`, with `:NAME=VALUE[;NAME=VALUE…]`",
            ),
            _setting(
                "MM_METRICS_CERTIFICATE",
                lambda c: "serving" if c.metrics.shows_serving_certificate else "own",
                "Which certificate the page for Prometheus shows over https: one made at the start"
                " that nobody signed, or that of `MM_TLS_KEY_CERT_PATH`, exchanged with it.",
                "own",
                "`own` or `serving`",
            ),
            _setting(
                "MM_INFO_METRICS",
                lambda c: c.metrics.info.name if c.metrics.info else "",
                "One more gauge that is always 1, with labels from the environment; of Prometheus.",
                "none",
                "`NAME;LABEL=VARIABLE[,LABEL=VARIABLE…]`, four labels at most",
            ),
            _setting(
                "MM_LOG_PROMETHEUS_REQS",
                lambda c: c.metrics.logs_requests,
                "One line in the log for each scrape.",
            ),
        ),
    ),
    (
        "Life cycle",
        (
            _setting(
                "BOOTSTRAP_CLEARANCE_PERIOD_MS",
                lambda c: c.probation_ms,
                "For so long after the start, loads that fail may show that this instance can load"
                " nothing; then it takes no calls of clients until it can. 0 for never.",
            ),
            _setting(
                "MM_FAILFAST_UPGRADE_ENABLED",
                lambda c: c.probation_ms > 0,
                "`false`: it is ready whatever its loads do.",
            ),
            _setting(
                "SHUTDOWN_TIMEOUT_MS",
                lambda c: round(1000 * c.shutdown_timeout_s),
                "From the signal to the exit. It may be the pod's grace period.",
            ),
            _setting(
                "LL_TERMINATION_MSG_PATH",
                None,
                "A file that is told, in one line, why the instance ended by itself.",
                "`/dev/termination-log` in Kubernetes",
            ),
        ),
    ),
    OBSERVING,
)

SETTINGS: Final[tuple[Setting, ...]] = tuple(each for _, section in SECTIONS for each in section)
