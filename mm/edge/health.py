"""Is this instance alive and ready: ``grpc.health.v1`` and the server methods of OIP v2.

The mesh answers them on the external port, unless a call names a model: then it is the model's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import mm
from mm.edge.h2 import IncomingCall
from mm.edge.unary import MessageStream, ServiceTable, parse_message, read_request
from mm.edge.wire_words import client_of
from mm.errors import LimitError, MeshError, StatusCode
from mm.mesh.statistics import Counters
from mm.pb import inference
from mm.pb.grpc.health.v1 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthCheckResponseServingStatus,
)

_HEALTH: Final = "/grpc.health.v1.Health/"
_OIP: Final = "/inference.GRPCInferenceService/"
#: What may be asked about; they are healthy together.
_SERVICES: Final = ("", "mmesh.ModelMesh", "inference.GRPCInferenceService")
#: Watches of health at an instance, some 15 KB each: nobody has to show a token to begin one. A
#: balancer has one of each connection.
WATCHES_MAX: Final = 1_000
#: Of them, those of one connection: one of each service that may be asked about, and one more.
WATCHES_OF_CLIENT_MAX: Final = 4


class Health:
    """Whether the instance takes calls, and who wants to know when that changes."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        #: Watches by whose they are.
        self._watches: Counter[object] = Counter()
        self._serving = True
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether calls are welcome here."""
        return self._serving

    def set_serving(self, serving: bool) -> None:
        """Say so, to watchers at once."""
        if serving != self._serving:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    def add_to(self, services: ServiceTable) -> None:
        """Serve the methods."""
        services.add_unary(_HEALTH + "Check", HealthCheckRequest, self.check, yields_to_ids=True)
        services.add(_HEALTH + "Watch", self.watch, yields_to_ids=True)
        services.add_unary(
            _OIP + "ServerLive", inference.ServerLiveRequest, self.server_live, yields_to_ids=True
        )
        services.add_unary(
            _OIP + "ServerReady",
            inference.ServerReadyRequest,
            self.server_ready,
            yields_to_ids=True,
        )
        services.add_unary(
            _OIP + "ServerMetadata",
            inference.ServerMetadataRequest,
            self.server_metadata,
            yields_to_ids=True,
        )

    async def check(self, request: HealthCheckRequest, _call: IncomingCall) -> HealthCheckResponse:
        """Answer the state now."""
        if request.service not in _SERVICES:
            raise MeshError(f"unknown service {request.service}", code=StatusCode.NOT_FOUND)
        return HealthCheckResponse(status=self._status())

    async def watch(self, call: IncomingCall) -> None:
        """Send the state, and again whenever it changes, until the client leaves."""
        with self._place(client_of(call)):
            await self._watch(call)

    @contextmanager
    def _place(self, client: object) -> Iterator[None]:
        """Have one of the places there are. Raises ``LimitError``."""
        if self._watches[client] >= WATCHES_OF_CLIENT_MAX:
            self._counters.health_watches_refused += 1
            raise LimitError(
                f"this connection watches health {WATCHES_OF_CLIENT_MAX} times, the limit"
            )
        if self._watches.total() >= WATCHES_MAX:
            self._counters.health_watches_refused += 1
            raise LimitError(f"health is watched {WATCHES_MAX} times at this instance, the limit")
        self._watches[client] += 1
        self._counters.health_watches_begun += 1
        try:
            yield
        finally:
            self._watches[client] -= 1
            if not self._watches[client]:
                del self._watches[client]
            self._counters.health_watches_ended += 1

    async def _watch(self, call: IncomingCall) -> None:
        request = parse_message(HealthCheckRequest, await read_request(call))
        stream = MessageStream(call)
        call.holds_stop = False
        while True:
            changed = self._changed
            if request.service in _SERVICES:
                status = self._status()
            else:
                status = HealthCheckResponseServingStatus.SERVICE_UNKNOWN
            await stream.send(bytes(HealthCheckResponse(status=status)))
            await changed.wait()

    def _status(self) -> HealthCheckResponseServingStatus:
        if self._serving:
            return HealthCheckResponseServingStatus.SERVING
        return HealthCheckResponseServingStatus.NOT_SERVING

    async def server_live(
        self, _request: inference.ServerLiveRequest, _call: IncomingCall
    ) -> inference.ServerLiveResponse:
        """Answering is being alive."""
        return inference.ServerLiveResponse(live=True)

    async def server_ready(
        self, _request: inference.ServerReadyRequest, _call: IncomingCall
    ) -> inference.ServerReadyResponse:
        """Answer whether calls are welcome."""
        return inference.ServerReadyResponse(ready=self._serving)

    async def server_metadata(
        self, _request: inference.ServerMetadataRequest, _call: IncomingCall
    ) -> inference.ServerMetadataResponse:
        """Answer who serves: the mesh, not a runtime behind it."""
        return inference.ServerMetadataResponse(name="mm", version=mm.__version__)


def add_health(services: ServiceTable, counters: Counters) -> Health:
    """Serve both protocols; answers the switch."""
    health = Health(counters)
    health.add_to(services)
    return health
