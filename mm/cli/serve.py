"""`mm serve`: one instance, from the environment to the exit code.

Owns the help, logging and the event loop; what runs in it is composed in ``mm.edge.app``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Final

import typer

app = typer.Typer(rich_markup_mode=None)

HELP: Final = """\
Serve models: one instance of the mesh, beside a model runtime.

Configured by environment variables alone, with the names of the Java model-mesh. An empty
value counts as unset where that makes sense. Logs go to stderr. SIGTERM or Ctrl-C stops it
in order: it leaves the mesh and lets calls in flight end; a second one stops it at once.
Exit code 0 after a stop, 2 if a setting is wrong, 1 if it cannot start or fails.

\b
Required:
  KV_STORE           etcd:HOST:PORT[,HOST:PORT...][;rootPrefix=P], etcd:FILE (JSON),
                     embedded (an etcd of its own) or memory (for one process)
  MM_SERVICE_NAME    the cluster's name, the same for all its instances
                     (not needed with embedded and memory)

\b
Who and where:
  MM_SVC_GRPC_PORT        port for clients; 0 picks a free one        [8033]
  MM_PEER_PORT            port for other instances; 0 picks one       [8080]
  MM_PROBE_PORT           port of /live and /ready, or NONE           [8089]
  MM_PRESTOP_WAIT_PORT    port of /prestop, or NONE                   [8090]
  MM_BIND_HOST            address that all of them listen on          [0.0.0.0]
  MM_ADVERTISE_ADDRESS    where other instances reach this one        [127.0.0.1]
  MM_INSTANCE_ID          its id; a restart may use it again          [made up]
  MM_LOCATION, MM_ZONE    the machine and the zone; copies are spread over them
  MM_LABELS               comma-separated labels
  SERVICE_VERSION         its build, NAME-YYYYMMDD-NUMBER; loads go to the newest
  MM_KVSTORE_PREFIX       first part of every key                     [tas-runtime]
  KV_READ_ONLY            true: nothing is registered or removed      [false]

\b
The runtime:
  INTERNAL_GRPC_PORT                   its port on this machine       [8085]
  INTERNAL_GRPC_SOCKET_PATH            or its Unix socket             [/tmp/mmesh/grpc.sock]
  INTERNAL_SERVING_GRPC_PORT           where inferences go, if not there
  INTERNAL_SERVING_GRPC_SOCKET_PATH    or that one's Unix socket

\b
Calls:
  MM_SVC_GRPC_MAX_MSG_SIZE        bytes of a message                  [16777216]
  MM_SVC_GRPC_MAX_HEADERS_SIZE    bytes of a call's headers           [8192]
  MM_MULTI_PARALLELISM            calls at once for a multi-model one [4]
  MM_DATAPLANE_CONFIG             JSON: which methods are served, where they carry ids
  MM_DATAPLANE_CONFIG_PATH        or a file with it
  MM_DATAPLANE                    who moves the bytes: python or wire [python]
  MM_WIRE_THREADS                 threads of the wire                 [1, or 2 if cores > 2]
  MM_LOG_EACH_INVOKE              true: a line for each call          [false]

\b
Behaviour:
  MM_LOAD_FAILURE_EXPIRY_TIME_MS  how long a failed load is not tried again     [900000]
  MM_TYPE_CONSTRAINTS             JSON: which instances, by their labels, load which types
  MM_TYPE_CONSTRAINTS_PATH        or a file with it, read again when it changes
  MM_AUTO_REGISTER_MODELS         JSON: models to register at the start
  MM_AUTO_REGISTER_MODEL_PATH, MM_AUTO_REGISTER_MODELS_PATH
                                  or a file with it, read again when it changes
  MM_DEFAULT_VMODEL_OWNER         owner of vmodels that are created without one
  MM_MAX_MODELS                   no more are registered; 0: no limit [1000000]
  MM_MIN_CHURN_AGE_MS             evict nothing used less long ago    [0]
  MM_EVICTION                     who goes: by cost of its loss, or lru [cost]
  MM_SCALEUP_RPM_THRESHOLD        calls a minute with which a copy is busy      [2000]
  MM_CONC_SCALEUP_BANDWIDTH_PCT   or per cent of its calls at a time, if limited  [90]
  MM_MIN_SECOND_COPY_AGE_SECS, MM_MAX_SECOND_COPY_AGE_SECS
                                  used now and so long ago: a second copy  [420, 2400]
  MM_MAX_INFLIGHT_PER_MODEL_COPY  calls that a copy has and keeps waiting, if limited   [0]
  BOOTSTRAP_CLEARANCE_PERIOD_MS   if its first loads fail so soon, it is not ready      [180000]
  MM_FAILFAST_UPGRADE_ENABLED     false: it is ready whatever its loads do              [true]
  SHUTDOWN_TIMEOUT_MS             from the signal to the exit         [30000]
  LL_TERMINATION_MSG_PATH         file for why it ended; in Kubernetes  [/dev/termination-log]
  MM_LOG_LEVEL                    debug, info, warning or error       [info]

\b
Examples:
  KV_STORE=embedded mm serve
  KV_STORE=etcd:localhost:2379 MM_SERVICE_NAME=models INTERNAL_GRPC_PORT=8085 mm serve
"""


@app.command(help=HELP)
def serve() -> None:
    """Run one instance until it is told to stop."""
    from mm.cli.termination import leave_message

    has_started: list[bool] = []
    try:
        _serve(lambda: has_started.append(True))
    except Exception as exc:
        leave_message(exc, os.environ, has_started=bool(has_started))
        raise


def _serve(on_started: Callable[[], None]) -> None:
    import logging

    import anyio

    from mm.cli.logs import log_to_stderr
    from mm.config import Config

    config = Config.from_environment(os.environ)
    log_to_stderr(config.log_level)
    config.log_warnings(logging.getLogger("mm.config"))
    # Process 1 of a container ignores what it has no handler for, and imports take a while.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # betterproto2 imports pydantic wherever it is installed, for generated code that asks for its
    # checks. Ours does not, and it is a third of the time to start and 10 MB: here it is absent.
    sys.modules.setdefault("pydantic", None)  # type: ignore[arg-type]
    # Only now: a wrong setting is told at once, the imports take a while.
    from mm.edge.app import serve as serve_instance

    anyio.run(serve_instance, config, on_started, backend_options={"use_uvloop": True})
