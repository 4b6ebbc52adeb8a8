"""`mm model …`: the management API of a mesh from a terminal or a script.

Owns options, output and exit codes; what the calls mean is spec around 5.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, TypeVar

import typer

from mm.cli.errors import CommandError
from mm.pb.mmesh import (
    EnsureLoadedRequest,
    GetStatusRequest,
    ModelInfo,
    ModelMeshStub,
    ModelStatusInfo,
    ModelStatusInfoModelStatus,
    RegisterModelRequest,
    UnregisterModelRequest,
)

DEFAULT_ADDRESS: Final = "localhost:8033"
DEFAULT_PORT: Final = 8033
DEFAULT_TYPE: Final = "sklearn"

T = TypeVar("T")

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Register, unregister, load and look at models of a mesh.\n\n"
    "Every command asks one instance, which may be any of the mesh: --address, or the "
    f"environment variable MM_ADDRESS, or {DEFAULT_ADDRESS}. Exit code 0 if it worked, 1 if it "
    "failed or the model cannot be loaded, 2 if the call is wrong.\n\n"
    "\b\n"
    "Examples:\n"
    "  mm model register iris --path iris.joblib --wait\n"
    "  mm model status iris --json\n"
    "  MM_ADDRESS=mesh.example:8033 mm model ensure-loaded iris\n"
    "  mm model unregister iris",
)

Id = Annotated[str, typer.Argument(metavar="ID", help="The model's id.")]
Address = Annotated[
    str,
    typer.Option(envvar="MM_ADDRESS", metavar="HOST:PORT", help="An instance of the mesh."),
]
Timeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=0.001, help="How long to wait for the answer."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


@app.command()
def register(
    model_id: Id,
    path: Annotated[
        str, typer.Option(help="Where the runtime finds the model: for it to understand.")
    ] = "",
    model_type: Annotated[
        str, typer.Option("--type", help="The model's type: for the runtime to understand.")
    ] = DEFAULT_TYPE,
    key: Annotated[str, typer.Option(help="Anything else that the runtime needs to know.")] = "",
    load: Annotated[bool, typer.Option("--load", help="Load it now, not at its first call.")] = (
        False
    ),
    wait: Annotated[bool, typer.Option("--wait", help="Load it now and wait until it is.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 120.0,
    as_json: Json = False,
) -> None:
    """Register a model, so that it can be called. Registering it again the same way is no error.

    \b
    Examples:
      mm model register iris --path iris.joblib
      mm model register iris --path iris.joblib --type sklearn --wait --json
    """
    request = RegisterModelRequest(
        model_id=model_id,
        model_info=ModelInfo(type=model_type, path=path, key=key),
        load_now=load or wait,
        sync=wait,
    )
    status = _call(address, timeout, lambda stub: stub.register_model(request, timeout=timeout))
    _show(model_id, status, as_json=as_json)


@app.command()
def unregister(
    model_id: Id,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Remove a model and its copies from the mesh. Its files stay; an unknown id is no error.

    \b
    Example:
      mm model unregister iris
    """
    request = UnregisterModelRequest(model_id=model_id)
    _call(address, timeout, lambda stub: stub.unregister_model(request, timeout=timeout))
    typer.echo(json.dumps({"id": model_id}) if as_json else f"{model_id}: unregistered")


@app.command()
def status(
    model_id: Id,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    as_json: Json = False,
) -> None:
    """Tell where a model stands, without loading it. Exit code 1 if it is unknown or failed.

    \b
    Examples:
      mm model status iris
      mm model status iris --json
    """
    request = GetStatusRequest(model_id=model_id)
    status = _call(address, timeout, lambda stub: stub.get_model_status(request, timeout=timeout))
    _show(model_id, status, as_json=as_json)


@app.command("ensure-loaded")
def ensure_loaded(
    model_id: Id,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the load has ended.")
    ] = True,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 120.0,
    as_json: Json = False,
) -> None:
    """Load a model somewhere in the mesh, unless it is loaded. Exit code 1 if that failed.

    \b
    Example:
      mm model ensure-loaded iris
    """
    request = EnsureLoadedRequest(model_id=model_id, sync=wait)
    status = _call(address, timeout, lambda stub: stub.ensure_loaded(request, timeout=timeout))
    _show(model_id, status, as_json=as_json)


# --- calling --------------------------------------------------------------------------------------


def parse_address(address: str) -> tuple[str, int]:
    """Read ``host``, ``host:port``, ``[v6]:port`` or ``:port``; raises ``CommandError``."""
    text = address.strip()
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port_text = rest.removeprefix(":")
        well_formed = bool(bracket) and (not rest or rest.startswith(":"))
    elif text.count(":") > 1:
        host, port_text, well_formed = text, "", True
    else:
        host, _, port_text = text.partition(":")
        well_formed = bool(text)
    port = int(port_text) if port_text.isascii() and port_text.isdigit() else None
    if not port_text:
        port = DEFAULT_PORT
    if not well_formed or port is None or not 0 < port < 65536 or "/" in host or " " in host:
        raise CommandError(
            f"{address!r} is no address; allowed: host[:port], port 1 to 65535", exit_code=2
        )
    return host or "localhost", port


def _call(address: str, timeout_s: float, make: Callable[[ModelMeshStub], Awaitable[T]]) -> T:
    host, port = parse_address(address)
    return asyncio.run(_answer(address, host, port, timeout_s, make))


async def _answer(
    address: str,
    host: str,
    port: int,
    timeout_s: float,
    make: Callable[[ModelMeshStub], Awaitable[T]],
) -> T:
    from grpclib.client import Channel
    from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

    channel = Channel(host, port)
    try:
        # Beside the call's own deadline, this one also covers connecting.
        async with asyncio.timeout(timeout_s):
            return await make(ModelMeshStub(channel))
    except GRPCError as exc:
        raise CommandError(f"{exc.status.name}: {exc.message or 'no message'}") from exc
    except TimeoutError as exc:
        raise CommandError(f"no answer from {address} within {timeout_s:g} s") from exc
    except (StreamTerminatedError, ProtocolError) as exc:
        raise CommandError(f"the connection to {address} broke: {exc}") from exc
    except OSError as exc:
        raise CommandError(
            f"cannot connect to {address}: {_reason(exc)} (is `mm serve` running there?)"
        ) from exc
    finally:
        channel.close()


def _reason(exc: OSError) -> str:
    if exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno).lower()
    # A name with several addresses: asyncio tells what became of each in one text.
    return "connection refused" if f"Errno {errno.ECONNREFUSED}" in str(exc) else str(exc)


# --- output ---------------------------------------------------------------------------------------


def _show(model_id: str, info: ModelStatusInfo, *, as_json: bool) -> None:
    name = _name_of(info.status)
    typer.echo(_as_json(model_id, info) if as_json else _as_text(model_id, info))
    if name in ("LOADING_FAILED", "NOT_FOUND"):
        raise typer.Exit(1)


def _name_of(status: int) -> str:
    try:
        return ModelStatusInfoModelStatus(status).name or str(int(status))
    except ValueError:
        # A newer mesh may know more.
        return str(int(status))


def _as_json(model_id: str, info: ModelStatusInfo) -> str:
    copies = [
        {
            "instance": copy.location,
            "status": _name_of(copy.copy_status),
            "time_ms": copy.time,
        }
        for copy in info.model_copy_infos
    ]
    return json.dumps(
        {
            "id": model_id,
            "status": _name_of(info.status),
            "errors": list(info.errors),
            "copies": copies,
        }
    )


def _as_text(model_id: str, info: ModelStatusInfo) -> str:
    lines = [f"{model_id}: {_name_of(info.status)}"]
    for copy in info.model_copy_infos:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(copy.time / 1000))
        # Of a Java mesh, whose records do not tell loading from loaded: it would only alarm people.
        is_told = copy.copy_status != ModelStatusInfoModelStatus.UNKNOWN
        state = f": {_name_of(copy.copy_status)}" if is_told else ""
        lines.append(f"  copy on {copy.location}{state} since {since}")
    lines.extend(f"  error: {error}" for error in info.errors)
    return "\n".join(lines)
