"""A runtime as a process: bind, say so on stdout, serve until SIGTERM or SIGINT.

Shared by every runtime that has a command line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import anyio

from mm.edge.h2 import GrpcServer, Handler, TransportLimits
from mm.errors import StartupError
from mm.runtime.address import Address, address_of
from mm.runtime.base import ModelRuntime
from mm.runtime.spi import RuntimeService

logger = logging.getLogger(__name__)

#: What to serve where.
Services = Sequence[tuple[Address, Handler]]

#: The mesh sends the calls of all its clients, and their cancellations, over one connection.
LIMITS: Final = TransportLimits(
    message_bytes_max=64 * 2**20,
    header_list_bytes_max=64 * 1024,
    streams_max=20_000,
    stream_window_bytes=1 * 2**20,
    resets_per_s=1e6,
    held_bytes_max=1 * 2**30,  # sixteen of the largest messages arriving at a time
)
#: How long calls in flight may take to end once the server stops.
STOP_GRACE_S: Final = 5.0
#: How long a server takes after that to end them and close its connections, with some to spare.
_CLOSE_TIMEOUT_S: Final = 4.0


@asynccontextmanager
async def listening(
    services: Services, limits: TransportLimits = LIMITS, stop_grace_s: float = STOP_GRACE_S
) -> AsyncIterator[list[Address]]:
    """Serve each handler at its address; yields the addresses as they really are."""
    listeners = []
    try:
        for address, _ in services:
            listeners.append(address.bind())
    except StartupError:
        for listener in listeners:
            listener.close()
        raise
    addresses = [address_of(listener) for listener in listeners]
    async with AsyncExitStack() as stack:
        for listener, (_, handler) in zip(listeners, services, strict=True):
            server = GrpcServer(handler, limits=limits, external=True)
            await server.start_on(listener)
            stack.push_async_callback(server.stop, stop_grace_s)
        yield addresses


async def serve_until_signal(services: Services, stop_grace_s: float = STOP_GRACE_S) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight end.

    Prints one line ``listening on ADDRESS`` for each address, as soon as it takes connections:
    who starts the process waits for it. A runtime that cannot say it serves all the same.
    """
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with listening(services, stop_grace_s=stop_grace_s) as addresses:
            for address in addresses:
                _say(f"listening on {address}")
            async for _ in signals:
                break
            _leave_after(len(services) * (stop_grace_s + _CLOSE_TIMEOUT_S))


def _say(line: str) -> None:
    if sys.stdout is None:  # closed by whoever started this
        return
    try:
        # Past its buffer, which would be written once more at the end.
        os.write(sys.stdout.fileno(), f"{line}\n".encode())
    except OSError as exc:
        logger.warning("%s; standard output cannot be written: %s", line, exc.strerror)


def _leave_after(limit_s: float) -> None:
    """End the process soon even if code of a model does not return: threads cannot be stopped."""

    def leave() -> None:
        logger.warning("stopping with a load or call that has not ended after %.1f s", limit_s)
        os._exit(0)

    timer = threading.Timer(limit_s, leave)
    timer.daemon = True
    timer.start()


def run(services: Services, stop_grace_s: float = STOP_GRACE_S) -> None:
    """Be a runtime process until SIGTERM or SIGINT; raises ``StartupError``."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    anyio.run(serve_until_signal, services, stop_grace_s, backend_options={"use_uvloop": True})


def run_runtime(runtime: ModelRuntime[Any], address: str) -> None:
    """Serve a runtime at ``PORT``, ``HOST:PORT`` or ``unix://PATH`` until SIGTERM or SIGINT.

    The last call of a program: if the runtime cannot start, it ends with the reason on stderr.
    """
    try:
        run([(Address.parse(address), RuntimeService(runtime).methods())])
    except StartupError as exc:
        raise SystemExit(str(exc)) from exc
