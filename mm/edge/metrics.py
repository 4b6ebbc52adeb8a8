"""Metrics of one instance: what is told, and to whom (around 19).

Owns the choice that ``MM_METRICS`` makes: a page for Prometheus, packets for StatsD, or nothing.
What the series are is ``java_series``' and ``own_series``'.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from mm.config import Config
from mm.core.call_meter import CallMeter, CallSource
from mm.core.metric_families import CONTENT_TYPE, Family, Sample, write_text
from mm.edge.access import AccessControl
from mm.edge.binding import open_listener
from mm.edge.http_server import HttpServer, Request, Response
from mm.edge.java_series import JavaSeries
from mm.edge.own_series import own_families
from mm.edge.statsd import Statsd
from mm.mesh.node import Node

if TYPE_CHECKING:
    import ssl

    from mm.edge.tls import Contexts, Tls

logger = logging.getLogger(__name__)

#: Where the page is, as in Java.
PATHS: Final = frozenset(("/", "/metrics"))


def _context(host: str, tls: Tls | None) -> ssl.SSLContext:
    """Answer the TLS of the page, with the certificate of ``tls`` or one of its own."""
    # Takes a tenth of a second to import, which most instances have no use for.
    from mm.edge.page_tls import page_context, self_signed, use

    context = page_context()
    if tls is None:
        use(context, self_signed(host))
        return context

    def show(_: Contexts | None = None) -> None:
        use(context, tls.files.key + tls.files.chain)

    show()
    tls.on_exchange.append(show)
    return context


def call_meter(config: Config) -> CallMeter | None:
    """Answer what measures the calls of the data plane in Python; None if nobody wants to know."""
    if config.metrics.kind == "disabled":
        return None
    return CallMeter(
        methods_max=config.metric_methods_max, models_max=config.metrics.models_max(config)
    )


class Metrics:
    """Told from ``shown`` on, as long as that lasts.

    ``sources`` are the data planes; ``wire_statistics`` answers those of the wire, if there is one.
    """

    def __init__(
        self,
        config: Config,
        node: Node,
        sources: tuple[CallSource, ...],
        wire_statistics: Callable[[], object] | None = None,
        tls: Tls | None = None,
        access: AccessControl | None = None,
    ) -> None:
        self._config = config
        self._settings = config.metrics
        self._node = node
        self._wire_statistics = wire_statistics
        self._tls = tls
        self._access = access
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
        context = None
        if settings.is_https:
            shown = self._tls if settings.shows_serving_certificate else None
            context = await asyncio.to_thread(_context, config.advertise_host, shown)
        server = HttpServer(self._answer, config, context)
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
        tls = None if self._tls is None else self._tls.statistics
        access = None if self._access is None else self._access.statistics
        yield from own_families(self._node.statistics(), wire, tls, access)
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
