"""`mm serve`: one instance, from the environment to the exit code.

Owns the help, logging and the event loop; what runs in it is composed in ``mm.edge.app``.
"""

from __future__ import annotations

import os
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
Exit code 0 after a stop, 2 if settings are wrong, 1 if it cannot start or fails.

\b
Required:
  KV_STORE           etcd:HOST:PORT[,HOST:PORT...][;rootPrefix=P], etcd:FILE (JSON),
                     embedded (an etcd of its own) or memory (for one process)
  MM_SERVICE_NAME    the cluster's name, the same for all its instances
                     (not needed with embedded and memory)

\b
Most used:
  MM_SVC_GRPC_PORT        port for clients; 0 picks a free one        [8033]
  MM_PEER_PORT            port for other instances; 0 picks one       [8080]
  MM_PROBE_PORT           port of /live and /ready, or NONE           [8089]
  MM_PRESTOP_WAIT_PORT    port of /prestop, or NONE                   [8090]
  MM_ADVERTISE_ADDRESS    where other instances reach this one        [127.0.0.1]
  INTERNAL_GRPC_PORT      port of the runtime on this machine         [8085]
  SHUTDOWN_TIMEOUT_MS     from the signal to the exit                 [30000]
  MM_LOG_LEVEL            debug, info, warning or error               [info]

All of them: `mm config --doc`. What they come to here: `mm config`.

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

    from mm.cli.config import read_config
    from mm.cli.logs import log_to_stderr

    config = read_config(os.environ)
    log_to_stderr(config.logs.level, is_json=config.logs.is_json)
    config.log_warnings(logging.getLogger("mm.config"))
    # betterproto2 imports pydantic wherever it is installed, for generated code that asks for its
    # checks. Ours does not, and it is a third of the time to start and 10 MB: here it is absent.
    sys.modules.setdefault("pydantic", None)  # type: ignore[arg-type]
    # Only now: a wrong setting is told at once, the imports take a while.
    from mm.edge.app import serve as serve_instance

    anyio.run(serve_instance, config, on_started, backend_options={"use_uvloop": True})
