"""One proxied call: attempts to get it answered, and the bytes between client and upstream.

A ``ProxiedCall`` keeps what the client sent as long as the call may be sent again; an ``Attempt``
is one stream to a runtime or peer. Bytes go through in the callbacks of the two connections,
without a task in between: the call's task sleeps until the attempt is over, then asks the router
what that meant.

Neither side knows a method's kind, so the rule is by bytes: a call may be sent again while every
request byte so far is kept (``retry_buffer_bytes_max``) and no byte of an answer went to the
client (design section 5). Forwarding never waits for the end of the request.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio
from h2.errors import ErrorCodes
from hpack.struct import NeverIndexedHeaderTuple

from mm.core import call_texts
from mm.core.calls import Call, LocalRoute, Outcome, PeerRoute, Route
from mm.core.headers import (
    WIRE_PREFIX,
    HeaderList,
    format_timeout,
    id_headers,
    read_status,
    without_mesh_headers,
)
from mm.core.hop_headers import LOAD, PREFIX, RESULT, write_hop_request
from mm.core.protobuf_ids import MalformedMessageError
from mm.edge.attempt import Attempt
from mm.edge.h2.client import Channel, ChannelFullError, UnreachableError
from mm.edge.h2.incoming import IncomingCall
from mm.edge.h2.messages import ENCODINGS_READ, MessageMeter, TooMuchHeldError
from mm.edge.legacy_errors import legacy_trailers
from mm.errors import MeshError, RuntimeUnavailableError, StatusCode

if TYPE_CHECKING:
    from mm.edge.payloads import Observation
    from mm.edge.proxy import Proxy

logger = logging.getLogger(__name__)

#: A stream that the other side never looked at is repeated on another connection; more often than
#: this means that it takes no streams at all.
_REFUSALS_MAX = 3
#: A peer may send a call back, because its vmodel has moved on, only if all of the request is kept.
#: Clients send the end a moment after the headers; those that stream are waited for in vain.
_END_WAIT_S = 0.1


def upstream_headers(
    incoming: IncomingCall,
    route: Route,
    channel: Channel,
    encoding: bytes,
    accepted: bytes,
    *,
    is_kept: bool,
) -> HeaderList:
    """Answer the headers with which a call goes on (spec core 2.12).

    ``is_kept``: the whole request is here and can be sent again.
    """
    head = incoming.head
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", head.path),
        (b":authority", channel.authority),
        (b"te", b"trailers"),
        (b"content-type", head.content_type),
        *head.metadata,
        *id_headers(route.model_id),
    ]
    if accepted:
        headers.append((b"grpc-accept-encoding", accepted))
    if encoding:
        headers.append((b"grpc-encoding", encoding))
    if isinstance(route, PeerRoute):
        headers += write_hop_request(route, is_kept=is_kept)
    if incoming.deadline_s is not None:
        left_s = incoming.deadline_s - incoming.link.loop.time()
        if left_s <= 0:
            raise MeshError(call_texts.DEADLINE_EXCEEDED, code=StatusCode.DEADLINE_EXCEEDED)
        # Different in every call: it would only push useful entries out of HPACK's table.
        headers.append(NeverIndexedHeaderTuple(b"grpc-timeout", format_timeout(left_s)))
    return headers


class ProxiedCall:
    """The client's side of a proxied call; the body of its ``IncomingCall``.

    Invariants: 1. ``_pieces`` holds every request byte so far while ``_keeps``, else those that
    were not sent yet. 2. A piece's size is given back to the client once: when it was sent first,
    or will not be. 3. What is kept while the router is asked is within the windows, or counts among
    the bytes of those who wait; from the attempt on it is held (``IncomingCall.hold``).
    """

    __slots__ = (
        "_attempt",
        "_end_awaited",
        "_ended",
        "_held_bytes",
        "_is_parked",
        "_keeps",
        "_kept_bytes",
        "_meter",
        "_pieces",
        "_sent_count",
        "call",
        "incoming",
        "loop",
        "observation",
        "proxy",
        "vmodel_id",
    )

    def __init__(
        self,
        proxy: Proxy,
        incoming: IncomingCall,
        call: Call,
        vmodel_id: str = "",
        observation: Observation | None = None,
    ) -> None:
        self.proxy = proxy
        self.incoming = incoming
        self.call = call
        #: By which the client named the model.
        self.vmodel_id = vmodel_id
        #: Who wants to see it; None: nobody.
        self.observation = observation
        self.loop = incoming.link.loop
        self._attempt: Attempt | None = None
        self._ended = False
        self._end_awaited: anyio.Event | None = None
        self._is_parked = False
        self._keeps = True
        self._kept_bytes = 0
        self._held_bytes = 0
        self._meter = MessageMeter("request", proxy.message_bytes_max)
        self._pieces: list[tuple[bytes, int]] = []
        self._sent_count = 0

    # --- attempts ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Ask, send, and again, until there is an answer. Raises ``MeshError``."""
        router, call = self.proxy.router, self.call
        refusals = 0
        route = await self._ask()
        while True:
            attempt: Attempt | None = None
            began_s = self.loop.time()
            try:
                attempt = await self._begin_attempt(route)
                await attempt.done
            except ChannelFullError:
                router.finished(call, route, Outcome.CROWDED)
                raise
            except UnreachableError as error:
                outcome, text = Outcome.UNREACHABLE, error.message
                self._measure(route, StatusCode.UNAVAILABLE, began_s)
            except BaseException:
                # The client left or ran out of time, or the request itself is at fault.
                if self._attempt is not None:
                    code = self.incoming.status_code or StatusCode.CANCELLED
                    self._measure(route, code, began_s)
                self._abandon(route)
                raise
            else:
                assert attempt is not None
                assert attempt.outcome is not None
                outcome, text = attempt.outcome, attempt.text
                self._measure(route, attempt.code, began_s)
                if attempt.refused and self.may_repeat and refusals < _REFUSALS_MAX:
                    refusals += 1
                    continue
            again = router.finished(call, route, outcome, text)
            if outcome is Outcome.ANSWERED:
                return
            if not (again and self.may_repeat):
                self._pass_on(attempt, route, outcome, text)
                return
            refusals = 0
            self._give_up_held()
            route = await self._ask()

    async def _ask(self) -> Route:
        """Ask the router; the connection counts the call as parked as long as it waits for a load,
        here or at a peer.
        """
        self._park(True)
        route = await self.proxy.router.route(self.call)
        self._park(isinstance(route, PeerRoute) and route.may_wait)
        return route

    def _park(self, is_parked: bool) -> None:
        if is_parked is not self._is_parked:
            self._is_parked = is_parked
            self.incoming.link.parked_count += 1 if is_parked else -1

    @property
    def may_repeat(self) -> bool:
        """Whether the call can be sent once more without anyone noticing.

        Without an attempt nothing has left, however much it is.
        """
        return (self._keeps or self._attempt is None) and not self.incoming.headers_sent

    async def _begin_attempt(self, route: Route) -> Attempt:
        self._sent_count = 0
        self._attempt = None
        if isinstance(route, PeerRoute) and route.may_wait and route.named_by is not None:
            await self._wait_end()
        self._hold_kept()
        channel = self.proxy.channel(route)
        attempt = Attempt(self, route)
        encoding = b"" if attempt.injector else self.incoming.head.encoding
        accepted = self.incoming.head.accept_encoding
        is_kept = self._ended and self._keeps
        headers = upstream_headers(
            self.incoming, route, channel, encoding, accepted, is_kept=is_kept
        )
        end = self._ended and not self._pieces
        stream = channel.try_open(headers, attempt, end)
        if stream is None:
            stream = await channel.open(headers, attempt, end)
        attempt.stream = stream
        self._attempt = attempt
        self._send_pieces(attempt)
        return attempt

    async def _wait_end(self) -> None:
        """Return when the request is all here, is too much to keep, or takes too long."""
        if not self._ended and self._keeps:
            self._end_awaited = anyio.Event()
            with anyio.move_on_after(_END_WAIT_S):
                await self._end_awaited.wait()

    def _measure(self, route: Route, code: int, began_s: float) -> None:
        """Count an attempt at the runtime here."""
        meter = self.proxy.meter
        if meter is not None and isinstance(route, LocalRoute):
            taken_s = self.loop.time() - began_s
            meter.invoked(self.call.method, code, taken_s, route.model_id, self.vmodel_id)

    def _abandon(self, route: Route) -> None:
        if self._attempt is not None:
            self._attempt.stream.reset(ErrorCodes.CANCEL)
        self.proxy.router.finished(self.call, route, Outcome.ABANDONED)

    def _pass_on(self, attempt: Attempt | None, route: Route, outcome: Outcome, text: str) -> None:
        """Answer with what the failed attempt left."""
        incoming = self.incoming
        has_moved = outcome in (Outcome.NO_MODEL, Outcome.MOVED)
        if has_moved and self.may_repeat and self.call.failure is not None:
            # Where a vmodel named the model, it has moved on.
            self._give_up_held()
            if not self.proxy.external:
                self.call.failure.hop_result = outcome.value
            raise self.call.failure
        if attempt is not None and attempt.held_trailers is not None:
            if attempt.held_headers is not None:
                self.answer_headers(attempt.held_headers)
            self.answer_trailers(attempt.held_trailers, attempt.code, outcome)
            return
        error = self.call.failure or RuntimeUnavailableError(text)
        if incoming.headers_sent:
            incoming.send_status(StatusCode.UNAVAILABLE, text)
            return
        if error.hop_result is None and not self.proxy.external:
            error.hop_result = outcome.value
        raise error

    def close(self) -> None:
        """Let go of the last attempt, which holds this call."""
        self._park(False)
        self.incoming.request_bytes = self._meter.messages_bytes
        if self._attempt is not None:
            self.incoming.response_bytes = self._attempt.messages_bytes
        self._attempt = None
        self._pieces.clear()

    # --- the request -------------------------------------------------------------------------

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """Take a piece from the client and pass it on if there is somewhere to."""
        try:
            self._meter.feed(data)
            if ended and not self._meter.at_boundary:
                raise MalformedMessageError(call_texts.MESSAGE_CUT_OFF)
        except MeshError as error:
            self.refuse(error)
            return
        self._ended = self._ended or ended
        if data:
            if self.observation is not None:
                self.observation.request_piece(data)
            self._pieces.append((data, size))
            self._kept_bytes += len(data)
            if self._kept_bytes > self.proxy.retry_buffer_bytes_max:
                self._keeps = False
            try:
                self._count_kept(len(data))
            except MeshError as error:
                self.refuse(error)
                return
        elif size:
            self.incoming.stream.acknowledge(size)
        if self._end_awaited is not None and (self._ended or not self._keeps):
            self._end_awaited.set()
        attempt = self._live_attempt
        if attempt is not None:
            self._hold_kept()
            self._send_pieces(attempt)

    @property
    def _live_attempt(self) -> Attempt | None:
        attempt = self._attempt
        return None if attempt is None or attempt.done.done() else attempt

    def _count_kept(self, size: int) -> None:
        call = self.call
        if not self._keeps and self._live_attempt is not None:
            return  # it goes on at once
        if call.waits:
            self.proxy.router.request_grew(call, size)
        else:
            call.request_bytes += size

    def _hold_kept(self) -> None:
        """Ask to keep what goes out now; without leave the call has this one attempt."""
        if self._keeps:
            self._keeps = self.incoming.hold(self._kept_bytes - self._held_bytes)
            self._held_bytes = self._kept_bytes

    def _give_up_held(self) -> None:
        self.incoming.drop_held()
        self._held_bytes = 0

    def _send_pieces(self, attempt: Attempt) -> None:
        pieces = self._pieces
        stream = attempt.stream
        injector = attempt.injector
        count = len(pieces)
        while self._sent_count < count:
            data, size = pieces[self._sent_count]
            pieces[self._sent_count] = (data, 0)
            self._sent_count += 1
            if injector is not None:
                try:
                    data = injector.feed(data)
                except MeshError as error:
                    self.refuse(error)
                    return
            if data:
                end = self._ended and self._sent_count == count
                stream.send_data(data, size, end)
            elif size and not self.incoming.hold(size):
                self.refuse(TooMuchHeldError())
                return
            else:
                # A compressed message gathers in the injector.
                self.incoming.stream.acknowledge(size)
        if self._ended:
            stream.end()
        if not self._keeps:
            pieces.clear()
            self._sent_count = 0
            if self.call.request_bytes:
                self.proxy.router.request_passed_on(self.call)
            if injector is None:
                self.incoming.drop_held()

    def data_sent(self, size: int) -> None:
        """A piece of the answer has left: the upstream may send more."""
        if self._attempt is not None:
            self._attempt.stream.acknowledge(size)

    def refuse(self, error: MeshError) -> None:
        """End the call because of what the client sent."""
        incoming = self.incoming
        if not incoming.headers_sent:
            self.note_load()
        if isinstance(error, MeshError) and error.code == StatusCode.UNIMPLEMENTED:
            incoming.send_status(
                error.code, error.message, ((b"grpc-accept-encoding", ENCODINGS_READ),)
            )
        else:
            incoming.fail(error)
        incoming.task.cancel()

    # --- the answer --------------------------------------------------------------------------

    def answer_headers(self, headers: HeaderList) -> None:
        """Begin the answer."""
        self.note_load()
        if self.call.waits:
            self.proxy.router.answer_began(self.call)
        self._park(False)
        if self.observation is not None:
            self.observation.response_headers(without_mesh_headers(headers))
        self.incoming.send_raw_headers(without_mesh_headers(headers))

    def answer_trailers(
        self, trailers: HeaderList, code: int, outcome: Outcome = Outcome.ANSWERED
    ) -> None:
        """End the answer."""
        if not self.incoming.headers_sent:
            self.note_load()
        trailers = without_mesh_headers(trailers, (PREFIX, WIRE_PREFIX))
        if outcome is not Outcome.ANSWERED and not self.proxy.external:
            trailers = [*trailers, (RESULT, outcome.value.encode())]
        if self.proxy.legacy_errors and code:
            trailers = legacy_trailers(trailers, outcome, self.incoming.method)
            code = read_status(trailers).code or code
        self.incoming.send_raw_trailers(trailers, code)

    def answer_status(self, code: int, text: str) -> None:
        """End the answer with a status of ours."""
        if not self.incoming.headers_sent:
            self.note_load()
        self.incoming.send_status(code, text)

    def note_load(self) -> None:
        """Tell a peer, with the first headers, how busy the copy is (docs/peer-protocol.md)."""
        if not self.proxy.external:
            count = b"%d" % self.proxy.router.tell_load(self.call)
            self.incoming.initial_headers.append(NeverIndexedHeaderTuple(LOAD, count))
