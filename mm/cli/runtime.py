"""``mm runtime``: model runtimes as processes.

What the options mean belongs to the runtimes; what is heavy is imported when a command runs, so
that ``mm`` itself stays small.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from mm.cli.errors import MISUSED, CommandError
from mm.core.ids import UNIT_BYTES
from mm.errors import StartupError
from mm.runtime.address import Address
from mm.runtime.base import BYTES_MAX, COUNT_MAX, LOAD_TIMEOUT_S_MAX, capacity_bytes_min
from mm.runtime.model_files import ModelRoot
from mm.runtime.process import run
from mm.runtime.spi import RuntimeService
from mm.testing import example_runtime

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Run a model runtime.")

app.command("example", short_help="Serve fake models of any size, for tests.")(example_runtime.main)

_HOST = "127.0.0.1"
_PORT = 8085

_SIZE = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB|kB|MB|GB|)")
_SIZE_UNITS = {
    "": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9
}  # fmt: skip

#: Calls have a thread each; a pool inside each of them would only make them fight for cores.
#: Read by the libraries when they are loaded, so set before.
_NATIVE_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@app.callback()
def _runtime() -> None:
    """Run a model runtime."""


def parse_size_bytes(option: str, text: str) -> int:
    """Read ``64MiB``, ``1GB`` or a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        allowed = ", ".join(filter(None, _SIZE_UNITS))
        raise typer.BadParameter(f"{option} {text!r}; allowed are a number and one of {allowed}")
    # Twenty digits are too many already.
    size_bytes = int(match[1].lstrip("0")[:20] or "0") * _SIZE_UNITS[match[2]]
    if size_bytes > BYTES_MAX:
        raise typer.BadParameter(f"{option} {text!r}; at most {BYTES_MAX} bytes are allowed")
    return size_bytes


def _check_sizes(
    capacity: str, capacity_bytes: int, default_size: str, default_size_bytes: int
) -> None:
    """Say what the mesh would refuse, in the words of the options."""
    if default_size_bytes < UNIT_BYTES:
        raise typer.BadParameter(
            f"--default-size {default_size!r}; at least {UNIT_BYTES} bytes are needed"
        )
    needed_bytes = capacity_bytes_min(default_size_bytes)
    if capacity_bytes < needed_bytes:
        raise typer.BadParameter(
            f"--capacity {capacity!r}; with --default-size {default_size} at least"
            f" {needed_bytes} bytes are needed"
        )


def _address(host: str | None, port: int | None, unix_socket: Path | None) -> Address:
    if unix_socket is None:
        return Address.parse(f"{host or _HOST}:{_PORT if port is None else port}")
    for option, value in (("--port", port), ("--host", host)):
        if value is not None:
            raise CommandError(f"give --unix-socket or {option}, not both", exit_code=MISUSED)
    return Address.parse(f"unix://{unix_socket}")


@app.command("sklearn")
def run_sklearn(
    root: Annotated[
        Path, typer.Option(help="Directory of the model files; nothing outside of it is opened")
    ] = Path(),
    port: Annotated[
        int | None,
        typer.Option(help=f"Port to listen on; 0: any  [default: {_PORT}]", min=0, max=65535),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help=f"Address to listen on  [default: {_HOST}]")
    ] = None,
    unix_socket: Annotated[
        Path | None, typer.Option(help="Listen here instead of on a port")
    ] = None,
    capacity: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for models: bytes, or like 64MiB")
    ] = "1GiB",
    default_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Reserved for a model never seen before")
    ] = "1MiB",
    loading_concurrency: Annotated[
        int, typer.Option(help="Loads at a time", min=1, max=COUNT_MAX)
    ] = 2,
    load_timeout: Annotated[
        float, typer.Option(help="Seconds that a load may take", min=0.1, max=LOAD_TIMEOUT_S_MAX)
    ] = 60.0,
    threads: Annotated[
        int | None, typer.Option(help="Calls at a time  [default: CPU cores]", min=1, max=COUNT_MAX)
    ] = None,
    trust: Annotated[
        list[str] | None, typer.Option(help="A type that .skops files may hold; repeatable")
    ] = None,
    skops_only: Annotated[
        bool, typer.Option("--skops-only", help="Refuse joblib and pickle files")
    ] = False,
) -> None:
    """Serve scikit-learn models (Open Inference Protocol).

    Models are .joblib, .pkl, .pickle or .skops files below --root; `mm model register --path` is
    relative to it. A joblib or pickle file runs code of its maker's choice when it is loaded: load
    only what you trust, or use --skops-only.

    A model counts for the bytes of all its objects in memory, or for the size of its file if that
    is larger. SIZE is in bytes, or in B, KiB, MiB, GiB (1024) or kB, MB, GB (1000).

    \b
    Examples:
      mm runtime sklearn --capacity 64MiB --root /srv/models
      mm model register iris --path iris.joblib     # for /srv/models/iris.joblib
      mm runtime sklearn --unix-socket /tmp/mmesh/grpc.sock --skops-only --root /srv/models
    """
    address = _address(host, port, unix_socket)
    default_size_bytes = parse_size_bytes("--default-size", default_size)
    capacity_bytes = parse_size_bytes("--capacity", capacity)
    _check_sizes(capacity, capacity_bytes, default_size, default_size_bytes)
    model_root = ModelRoot(root)
    for variable in _NATIVE_THREADS:
        os.environ.setdefault(variable, "1")
    try:
        from mm.runtime.sklearn import SklearnRuntime
    except ModuleNotFoundError as exc:
        raise StartupError(f"{exc.name} is not installed; install mm[sklearn]") from exc
    runtime = SklearnRuntime(
        model_root, capacity_bytes=capacity_bytes, trusted_types=trust or (), skops_only=skops_only
    )
    runtime.default_model_size_bytes = default_size_bytes
    runtime.loading_concurrency_max = loading_concurrency
    runtime.load_timeout_s = load_timeout
    runtime.call_threads_max = threads or runtime.call_threads_max
    run([(address, RuntimeService(runtime).methods())])
