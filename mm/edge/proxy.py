"""The catch-all: any method of any service, as raw bytes, to where its model is.

Owns what happens before the router is asked: which methods are served, which model a call is for
(around 6.1), and what may not pass in from outside. The bytes are ``mm.edge.pipe``'s, calls for
several models ``mm.edge.multi``'s.
"""

from __future__ import annotations

import asyncio

from mm.config import Config
from mm.core.call_meter import CallMeter
from mm.core.calls import Call, Hop, LocalRoute, NamedBy, Route
from mm.core.dataplane import RpcConfig
from mm.core.headers import IdKind, check_id, is_balanced, read_ids
from mm.core.hop_headers import HopRequest, read_hop_request
from mm.core.ids import ModelId
from mm.core.protobuf_ids import extract_id
from mm.edge.h2.client import Channel, ChannelPool
from mm.edge.h2.incoming import IncomingCall
from mm.edge.h2.messages import ENCODINGS_READ, MessageSplitter, TooMuchHeldError, decompress
from mm.edge.legacy_errors import legacy_error
from mm.edge.moves import Moves, stay
from mm.edge.multi import MultiCall
from mm.edge.payload_sinks import Observers
from mm.edge.payloads import Observation
from mm.edge.pipe import ProxiedCall
from mm.edge.wire_words import goes_on, read_tried
from mm.errors import (
    InvalidRequestError,
    MeshError,
    MethodRefusedError,
    ModelMovedError,
    StatusCode,
)
from mm.mesh.permissions import MANAGEMENT_SERVICES
from mm.mesh.ports import Router

#: The services that manage a runtime are for its own mesh alone (around 6.4).
_FORBIDDEN = tuple(prefix.encode() for prefix in MANAGEMENT_SERVICES)
#: What instances tell each other. A call of it for a model elsewhere would be sent on to the port
#: where it is served.
_OF_PEERS = b"/mm.peer."


class Proxy:
    """The handler of all calls that are not the mesh's own, on one listener.

    ``external``: clients call here, so hop headers are ignored and none go out. Else peers do.
    ``config`` may be replaced while calls run: each call takes it once. Calls of clients are
    measured as soon as it is known which model they are for: what is refused before that is no
    inference (around 6.1).
    """

    def __init__(
        self,
        router: Router,
        *,
        runtime: Channel,
        peers: ChannelPool,
        config: Config,
        external: bool,
        meter: CallMeter | None = None,
        observers: Observers | None = None,
    ) -> None:
        self.router = router
        self.runtime = runtime
        self.peers = peers
        self.config = config
        self.external = external
        #: None: nobody wants to know of calls.
        self.meter = meter
        #: None: nobody wants to see requests and answers.
        self.observers = observers
        self.legacy_errors = config.legacy_errors and external
        self.message_bytes_max = config.message_bytes_max
        self.retry_buffer_bytes_max = config.retry_buffer_bytes_max

    async def __call__(self, incoming: IncomingCall) -> None:
        """Serve one call. Raises ``MeshError``."""
        head = incoming.head
        if head.path.startswith(_FORBIDDEN) or (self.external and head.path.startswith(_OF_PEERS)):
            name = incoming.method[1:]
            raise MethodRefusedError(f"Method not found or not permitted: {name}")
        hop = HopRequest() if self.external else read_hop_request(head.mesh)
        method = incoming.method
        if hop.hop is not Hop.EXTERNAL:
            _, ids = read_ids(head.mesh)
            await self._serve(incoming, hop.to_call(ModelId(ids[0]), method, None), None)
            return
        rpc = self.config.dataplane_config.rpc(method)
        if rpc is None:
            raise MethodRefusedError("")
        began_s = incoming.link.loop.time()
        kind, ids = await self._find_ids(incoming, rpc)
        if self.meter is None:
            await self._serve_client(incoming, kind, ids)
            return
        code: int = StatusCode.INTERNAL
        try:
            await self._serve_client(incoming, kind, ids)
        except MeshError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = StatusCode.CANCELLED
            raise
        finally:
            if incoming.status_code is not None:
                code = incoming.status_code
            is_one, is_vmodel = len(ids) == 1, kind is IdKind.VMODEL
            self.meter.answered(
                method,
                code,
                incoming.link.loop.time() - began_s,
                incoming.request_bytes,
                incoming.response_bytes,
                incoming.model_id if is_one else "",
                ids[0] if is_one and is_vmodel else "",
            )

    async def _serve_client(self, incoming: IncomingCall, kind: IdKind, ids: list[str]) -> None:
        """Serve a call of a client, with the errors that it knows."""
        try:
            await self._serve_ids(incoming, kind, ids)
        except MeshError as error:
            if not self.legacy_errors:
                raise
            raise legacy_error(error, incoming.method) from error

    async def _serve_ids(self, incoming: IncomingCall, kind: IdKind, ids: list[str]) -> None:
        """Serve a call for one model or several."""
        if len(ids) > 1:
            await MultiCall(self, incoming, kind, ids).run()
            return
        vmodel_id = ids[0] if kind is IdKind.VMODEL else None
        model_id = ModelId(ids[0]) if vmodel_id is None else await self.router.resolve(vmodel_id)
        incoming.model_id = model_id
        balanced = is_balanced(incoming.head.mesh)
        named_by = None if vmodel_id is None else NamedBy(vmodel_id)
        call = Call(model_id, method=incoming.method, balanced=balanced, named_by=named_by)
        observation = None
        if self.observers is not None:
            observation = self.observers.begin(incoming, model_id, vmodel_id or "")
        if observation is None:
            await self._serve(incoming, call, vmodel_id)
            return
        with observation.until_end(lambda: incoming.status_code):
            await self._serve(incoming, call, vmodel_id, observation)

    async def _serve(
        self,
        incoming: IncomingCall,
        call: Call,
        vmodel_id: str | None,
        observation: Observation | None = None,
    ) -> None:
        call.deadline_s = incoming.deadline_s
        proxied = ProxiedCall(self, incoming, call, vmodel_id or "", observation)
        incoming.read_by(proxied)
        moves = Moves(self.router, vmodel_id)
        tried = read_tried(incoming.head.mesh) if incoming.link.is_wire else None
        try:
            while True:
                try:
                    if tried is not None:
                        told, tried = tried, None
                        if not goes_on(self.router, incoming, call, told):
                            return
                    await proxied.run()
                    return
                except MeshError as error:
                    moved = await moves.follow(call, error) if proxied.may_repeat else None
                    if moved is None and isinstance(error, ModelMovedError) and vmodel_id:
                        moved = stay(call)
                    if moved is None:
                        raise
                    call = proxied.call = moved
        except MeshError:
            proxied.note_load()
            raise
        finally:
            call.end_turn()
            proxied.close()

    # --- ids ---------------------------------------------------------------------------------

    async def _find_ids(self, incoming: IncomingCall, rpc: RpcConfig) -> tuple[IdKind, list[str]]:
        """Answer the ids of a client's call, from its first message or its headers."""
        if rpc.id_extraction_path:
            message = await first_message(incoming, self.message_bytes_max)
            extracted = extract_id(message, rpc.id_extraction_path)
            if extracted is not None:
                kind = IdKind.VMODEL if rpc.is_vmodel_id else IdKind.MODEL
                check_id(kind, extracted)
                return kind, [extracted]
        kind, ids = read_ids(incoming.head.mesh)
        if len(ids) > self.config.multi_model_ids_max:
            raise InvalidRequestError(
                f"{len(ids)} ids in one call; at most {self.config.multi_model_ids_max} may be"
            )
        return kind, ids

    # --- what pipes ask ----------------------------------------------------------------------

    def channel(self, route: Route) -> Channel:
        """Answer the channel that a route takes."""
        if isinstance(route, LocalRoute):
            return self.runtime
        return self.peers.get(route.address, may_wait=route.may_wait)


class _FirstMessage:
    """The body of a call until its first message is here; then all of it is given back."""

    def __init__(self, incoming: IncomingCall, length_max: int) -> None:
        self.incoming = incoming
        self.pieces: list[tuple[bytes, int, bool]] = []
        self.message: tuple[bool, bytes] | None = None
        self.error: MeshError | None = None
        self.done: asyncio.Future[None] = incoming.link.loop.create_future()
        self._splitter = MessageSplitter("request", length_max)

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        if self.done.done():
            self.pieces.append((data, size, ended))
            return
        # It has to be kept whole, so the client gets its room back; the message limit bounds it.
        self.pieces.append((data, 0, ended))
        self.incoming.stream.acknowledge(size)
        try:
            if not self.incoming.hold(len(data)):
                raise TooMuchHeldError
            self.message = next(self._splitter.feed(data), None)
        except MeshError as error:
            self.error = error
        if self.message is not None or self.error is not None or ended:
            self.done.set_result(None)

    def data_sent(self, size: int) -> None: ...


async def first_message(incoming: IncomingCall, length_max: int) -> bytes:
    """Answer the first message of a call, decompressed; the body begins anew after it.

    Raises ``MeshError``.
    """
    body = _FirstMessage(incoming, length_max)
    incoming.read_by(body)
    await body.done
    if body.error is not None:
        raise body.error
    if body.message is None:
        raise InvalidRequestError("Half-closed without a request")
    incoming.unread(body.pieces)
    compressed, message = body.message
    if not compressed:
        return message
    try:
        return decompress(message, incoming.head.encoding, length_max)
    except MethodRefusedError as error:
        incoming.initial_headers.append((b"grpc-accept-encoding", ENCODINGS_READ))
        raise error
