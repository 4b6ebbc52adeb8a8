"""Metrics of one instance: what is told, and to whom (around 19).

Owns the choice that ``MM_METRICS`` makes: a page for Prometheus, packets for StatsD, or nothing.
What the series are is ``java_series``' and ``own_series``'.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

from mm.config import Config
from mm.core.call_meter import CallMeter, CallSource
from mm.core.metric_families import CONTENT_TYPE, Family, Sample, write_text
from mm.edge.binding import open_listener
from mm.edge.http_server import HttpServer, Request, Response
from mm.edge.java_series import JavaSeries
from mm.edge.own_series import own_families
from mm.edge.statsd import Statsd
from mm.mesh.node import Node

logger = logging.getLogger(__name__)

#: Where the page is, as in Java.
PATHS: Final = frozenset(("/", "/metrics"))


def _tls(host: str) -> ssl.SSLContext:
    # Takes a tenth of a second to import, which most instances have no use for.
    from mm.edge.self_signed import self_signed_context

    return self_signed_context(host)


def call_meter(config: Config) -> CallMeter | None:
    """Answer what measures the calls of the data plane in Python; None if nobody wants to know."""
    if config.metrics.kind == "disabled":
        return None
    return CallMeter(
        methods_max=config.metric_methods_max, models_max=config.metrics.models_max(config)
    )


class Metrics:
    """Told from ``shown`` on, as long as that lasts.

    ``sources`` are the data planes; ``wire_statistics`` answers those of the wire, if there is one,
    ``tls_statistics`` those of TLS, if there is any.
    """

    def __init__(
        self,
        config: Config,
        node: Node,
        sources: tuple[CallSource, ...],
        wire_statistics: Callable[[], object] | None = None,
        tls_statistics: Callable[[], object | None] = lambda: None,
    ) -> None:
        self._config = config
        self._settings = config.metrics
        self._node = node
        self._wire_statistics = wire_statistics
        self._tls_statistics = tls_statistics
        self._java = JavaSeries(node, config.metrics, sources)

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Tell of the instance; raises ``StartupError`` if the port cannot be had."""
        match self._settings.kind:
            case "prometheus":
                async with self._listening():
                    yield
            case "statsd":
                async with self._sending():
                    yield
            case _:
                yield

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        config, settings = self._config, self._settings
        tls = None
        if settings.is_https:
            tls = await asyncio.to_thread(_tls, config.advertise_host)
        server = HttpServer(self._answer, config, tls)
        port = await open_listener(server, config.bind_host, settings.port, "MM_METRICS")
        scheme = "https" if settings.is_https else "http"
        logger.info("metrics for Prometheus: %s, port %d, path /metrics", scheme, port)
        try:
            yield
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(config.close_timeout_s):
                    await server.stop()

    @asynccontextmanager
    async def _sending(self) -> AsyncIterator[None]:
        settings = self._settings
        statsd = Statsd(self._java.families, port=settings.port, is_legacy=settings.is_legacy)
        logger.info("metrics for StatsD: to port %d by UDP", settings.port)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(statsd.run())
            try:
                yield
            finally:
                task.cancel()

    def families(self) -> Iterator[Family]:
        """Answer all series that the page shows."""
        yield from self._java.families()
        wire = None if self._wire_statistics is None else self._wire_statistics()
        yield from own_families(self._node.statistics(), wire, self._tls_statistics())
        info = self._settings.info
        if info is not None:
            yield Family(info.name, "gauge", "Info Metric", (Sample(1, info.labels),))

    async def _answer(self, request: Request) -> Response:
        if self._settings.logs_requests:
            logger.info("metrics: %s", request.path)
        if request.path not in PATHS:
            return Response(HTTPStatus.NOT_FOUND)
        names = frozenset(request.query.get("name[]", ()))
        body = write_text(self.families(), names)
        headers = [("Content-Type", CONTENT_TYPE)]
        if "gzip" in request.header("accept-encoding"):
            body = gzip.compress(body, compresslevel=1)
            headers.append(("Content-Encoding", "gzip"))
        return Response(HTTPStatus.OK, body, tuple(headers))
