"""A runtime as a process: bind, say so on stdout, serve until SIGTERM or SIGINT.

Shared by every runtime that has a command line.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

from mm.errors import StartupError
from mm.runtime.call import Handler
from mm.runtime.server import Address, GrpcServer, ServerLimits, address_of


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


def run(
    services: Sequence[tuple[Address, Mapping[str, Handler]]], limits: ServerLimits | None = None
) -> int:
    """Run a runtime process; answers the exit code. What prevents the start goes to stderr."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        anyio.run(serve_until_signal, services, limits, backend_options={"use_uvloop": True})
    except StartupError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0
