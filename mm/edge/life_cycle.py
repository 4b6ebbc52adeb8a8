"""What Kubernetes asks of an instance over HTTP: `/live`, `/ready` and `/prestop` (around 20).

Owns which question has which answer, and when. Whether an instance is ready is
``mm.core.readiness``'s; how requests are read is ``http_server``'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

import anyio

from mm.config import Config
from mm.edge.binding import open_listener
from mm.edge.http_server import HttpServer, Request, Response

logger = logging.getLogger(__name__)

#: More requests than containers are no news: the rest is told to whoever debugs.
_HOOKS_LOGGED_MAX: Final = 9


class LifeCycle:
    """Two listeners, open from before the start until everything else has ended.

    1. `/live` is 200 for as long as the process answers at all: a store or a runtime that is away
       is no reason to restart what serves models.
    2. `/ready` is 200 while clients should be sent here, else 503.
    3. `/prestop` is answered when nothing needs the runtime any more. It stops nothing itself.
    """

    def __init__(self, config: Config, is_ready: Callable[[], bool]) -> None:
        self._config = config
        self._is_ready = is_ready
        self._ended = asyncio.Event()
        self._hooks_count = 0
        self._probes = HttpServer(self._probe, config)
        self._hooks = HttpServer(self._hook, config)

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Answer while inside; on the way out those that wait for the end hear of it."""
        config = self._config
        try:
            for server, port, variable in (
                (self._probes, config.probe_port, "MM_PROBE_PORT"),
                (self._hooks, config.prestop_port, "MM_PRESTOP_WAIT_PORT"),
            ):
                if port is not None:
                    await self._open(server, port, variable)
            yield
        finally:
            self._ended.set()
            with anyio.move_on_after(config.close_timeout_s, shield=True):
                await self._hooks.stop()
                await self._probes.stop()

    async def _open(self, server: HttpServer, port: int, variable: str) -> None:
        port = await open_listener(server, self._config.bind_host, port, variable)
        paths = "/live and /ready" if server is self._probes else "/prestop"
        logger.info("%s on port %d", paths, port)

    async def _probe(self, request: Request) -> Response:
        match request.path:
            case "/live":
                return Response(HTTPStatus.OK)
            case "/ready":
                ready = self._is_ready()
                return Response(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)
            case _:
                return Response(HTTPStatus.NOT_FOUND)

    async def _hook(self, request: Request) -> Response:
        if request.path != "/prestop":
            return Response(HTTPStatus.NOT_FOUND)
        self._hooks_count += 1
        level = logging.INFO if self._hooks_count <= _HOOKS_LOGGED_MAX else logging.DEBUG
        logger.log(level, "a container waits at /prestop for this instance to end")
        with anyio.move_on_after(self._config.prestop_wait_s) as scope:
            await self._ended.wait()
        if scope.cancelled_caught:
            logger.warning("a container waited at /prestop for longer than a stop can take")
        return Response(HTTPStatus.OK)
