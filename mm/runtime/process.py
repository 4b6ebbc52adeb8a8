"""A runtime as a process: bind, say so on stdout, serve until SIGTERM or SIGINT.

Shared by every runtime that has a command line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

from mm.errors import StartupError
from mm.runtime.base import ModelRuntime
from mm.runtime.call import Handler
from mm.runtime.server import Address, GrpcServer, ServerLimits, address_of
from mm.runtime.spi import RuntimeService

logger = logging.getLogger(__name__)


@asynccontextmanager
async def listening(
    services: Sequence[tuple[Address, Mapping[str, Handler]]], limits: ServerLimits | None = None
) -> AsyncIterator[list[Address]]:
    """Serve each set of methods at its address; yields the addresses as they really are."""
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
        for listener, (_, methods) in zip(listeners, services, strict=True):
            server = GrpcServer(methods, limits)
            await stack.enter_async_context(server.serving([listener]))
        yield addresses


async def serve_until_signal(
    services: Sequence[tuple[Address, Mapping[str, Handler]]], limits: ServerLimits | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight end.

    Prints one line ``listening on ADDRESS`` for each address, as soon as it takes connections:
    who starts the process waits for it.
    """
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with listening(services, limits) as addresses:
            for address in addresses:
                print(f"listening on {address}", flush=True)
            async for _ in signals:
                break
            _leave_after((limits or ServerLimits()), len(services))


def _leave_after(limits: ServerLimits, servers_count: int) -> None:
    """End the process soon even if code of a model does not return: threads cannot be stopped."""
    limit_s = servers_count * (limits.stop_grace_s + limits.close_timeout_s) + 1.0

    def leave() -> None:
        logger.warning("stopping with a load or call that has not ended after %.1f s", limit_s)
        os._exit(0)

    timer = threading.Timer(limit_s, leave)
    timer.daemon = True
    timer.start()


def run(
    services: Sequence[tuple[Address, Mapping[str, Handler]]], limits: ServerLimits | None = None
) -> None:
    """Be a runtime process until SIGTERM or SIGINT; raises ``StartupError``."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    anyio.run(serve_until_signal, services, limits, backend_options={"use_uvloop": True})


def run_runtime(runtime: ModelRuntime[Any], address: str) -> None:
    """Serve a runtime at ``PORT``, ``HOST:PORT`` or ``unix://PATH`` until SIGTERM or SIGINT.

    The last call of a program: if the runtime cannot start, it ends with the reason on stderr.
    """
    try:
        run([(Address.parse(address), RuntimeService(runtime).methods())])
    except StartupError as exc:
        raise SystemExit(str(exc)) from exc
