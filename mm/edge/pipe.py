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

import asyncio
import logging
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes
from hpack.struct import NeverIndexedHeaderTuple

from mm.core.calls import Call, LocalRoute, Outcome, PeerRoute, Route
from mm.core.headers import (
    HeaderList,
    MalformedHeadersError,
    Status,
    check_response_headers,
    format_timeout,
    id_headers,
    read_status,
    says_model_is_lost,
    without_mesh_headers,
)
from mm.core.hop_headers import LOAD, PREFIX, RESULT, read_load, read_outcome, write_hop_request
from mm.core.protobuf_ids import injection_suffix
from mm.edge.h2.client import Channel, UnreachableError
from mm.edge.h2.incoming import IncomingCall
from mm.edge.h2.injection import Injector
from mm.edge.h2.messages import ENCODINGS_READ, MessageMeter, TooMuchHeldError
from mm.edge.h2.stream import FaultKind, RawStream, StreamFault
from mm.errors import MeshError, RuntimeUnavailableError, StatusCode

if TYPE_CHECKING:
    from mm.edge.proxy import Proxy

logger = logging.getLogger(__name__)

#: A stream that the other side never looked at is repeated on another connection; more often than
#: this means that it takes no streams at all.
_REFUSALS_MAX = 3

#: What a RST_STREAM of the upstream means to the client (gRPC over HTTP/2, "Errors").
_RESET_CODES = {
    ErrorCodes.REFUSED_STREAM: StatusCode.UNAVAILABLE,
    ErrorCodes.CANCEL: StatusCode.CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: StatusCode.RESOURCE_EXHAUSTED,
    ErrorCodes.INADEQUATE_SECURITY: StatusCode.PERMISSION_DENIED,
}


def upstream_headers(
    incoming: IncomingCall, route: Route, channel: Channel, encoding: bytes, accepted: bytes
) -> HeaderList:
    """Answer the headers with which a call goes on (spec core 2.12)."""
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
        headers += write_hop_request(route)
    if incoming.deadline_s is not None:
        left_s = incoming.deadline_s - incoming.link.loop.time()
        if left_s <= 0:
            raise MeshError("deadline exceeded", code=StatusCode.DEADLINE_EXCEEDED)
        # Different in every call: it would only push useful entries out of HPACK's table.
        headers.append(NeverIndexedHeaderTuple(b"grpc-timeout", format_timeout(left_s)))
    return headers


class ProxiedCall:
    """The client's side of a proxied call; the body of its ``IncomingCall``.

    Invariants: 1. ``_pieces`` holds every request byte so far while ``_keeps``, else those that
    were not sent yet. 2. A piece's size is given back to the client once: when it was sent first,
    or will not be.
    """

    __slots__ = (
        "_attempt",
        "_ended",
        "_keeps",
        "_kept_bytes",
        "_meter",
        "_pieces",
        "_sent_count",
        "call",
        "incoming",
        "loop",
        "proxy",
    )

    def __init__(self, proxy: Proxy, incoming: IncomingCall, call: Call) -> None:
        self.proxy = proxy
        self.incoming = incoming
        self.call = call
        self.loop = incoming.link.loop
        self._attempt: Attempt | None = None
        self._ended = False
        self._keeps = True
        self._kept_bytes = 0
        self._meter = MessageMeter("request", proxy.message_bytes_max)
        self._pieces: list[tuple[bytes, int]] = []
        self._sent_count = 0

    # --- attempts ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Ask, send, and again, until there is an answer. Raises ``MeshError``."""
        router, call = self.proxy.router, self.call
        refusals = 0
        route = await router.route(call)
        while True:
            attempt: Attempt | None = None
            try:
                attempt = await self._begin_attempt(route)
                await attempt.done
            except UnreachableError as error:
                outcome, text = Outcome.UNREACHABLE, error.message
            except BaseException:
                # The client left or ran out of time, or the request itself is at fault.
                self._abandon(route)
                raise
            else:
                assert attempt is not None
                assert attempt.outcome is not None
                outcome, text = attempt.outcome, attempt.text
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
            route = await router.route(call)

    @property
    def may_repeat(self) -> bool:
        """Whether the call can be sent once more without anyone noticing."""
        return self._keeps and not self.incoming.headers_sent

    async def _begin_attempt(self, route: Route) -> Attempt:
        self._sent_count = 0
        self._attempt = None
        channel = self.proxy.channel(route)
        attempt = Attempt(self, route)
        encoding = b"" if attempt.injector else self.incoming.head.encoding
        accepted = self.incoming.head.accept_encoding
        headers = upstream_headers(self.incoming, route, channel, encoding, accepted)
        end = self._ended and not self._pieces
        stream = channel.try_open(headers, attempt, end)
        if stream is None:
            stream = await channel.open(headers, attempt, end)
        attempt.stream = stream
        self._attempt = attempt
        self._send_pieces(attempt)
        return attempt

    def _abandon(self, route: Route) -> None:
        if self._attempt is not None:
            self._attempt.stream.reset(ErrorCodes.CANCEL)
        self.proxy.router.finished(self.call, route, Outcome.ABANDONED)

    def _pass_on(self, attempt: Attempt | None, route: Route, outcome: Outcome, text: str) -> None:
        """Answer with what the failed attempt left."""
        incoming = self.incoming
        if attempt is not None and attempt.held_trailers is not None:
            if attempt.held_headers is not None:
                self.answer_headers(attempt.held_headers)
            self.answer_trailers(attempt.held_trailers, outcome)
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
        self._attempt = None
        self._pieces.clear()

    # --- the request -------------------------------------------------------------------------

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """Take a piece from the client and pass it on if there is somewhere to."""
        try:
            self._meter.feed(data)
        except MeshError as error:
            self.refuse(error)
            return
        self._ended = self._ended or ended
        if data:
            self._pieces.append((data, size))
            if self._keeps:
                self._kept_bytes += len(data)
                self._keeps = (
                    self._kept_bytes <= self.proxy.retry_buffer_bytes_max
                    and self.incoming.hold(len(data))
                )
        elif size:
            self.incoming.stream.acknowledge(size)
        attempt = self._attempt
        if attempt is not None and not attempt.done.done():
            self._send_pieces(attempt)

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
            if injector is None:
                self.incoming.drop_held()

    def data_sent(self, size: int) -> None:
        """A piece of the answer has left: the upstream may send more."""
        if self._attempt is not None:
            self._attempt.stream.acknowledge(size)

    def refuse(self, error: MeshError) -> None:
        """End the call because of what the client sent."""
        incoming = self.incoming
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
        self.incoming.send_raw_headers(without_mesh_headers(headers))

    def answer_trailers(self, trailers: HeaderList, outcome: Outcome = Outcome.ANSWERED) -> None:
        """End the answer."""
        if not self.incoming.headers_sent:
            self.note_load()
        trailers = without_mesh_headers(trailers, PREFIX)
        if outcome is not Outcome.ANSWERED and not self.proxy.external:
            trailers = [*trailers, (RESULT, outcome.value.encode())]
        self.incoming.send_raw_trailers(trailers)

    def note_load(self) -> None:
        """Tell a peer, with the first headers, how busy the copy is (docs/peer-protocol.md)."""
        if not self.proxy.external:
            count = b"%d" % self.proxy.router.in_flight(self.call.model_id)
            self.incoming.initial_headers.append(NeverIndexedHeaderTuple(LOAD, count))


class Attempt:
    """One stream to an upstream; the sink of its answer.

    Initial headers wait until the turn in which they came is over: most unary failures come with
    their trailers in one piece, and can then be tried elsewhere.

    Invariants: 1. ``done`` is set once, with ``outcome``. 2. Nothing goes to the client after it.
    3. ``held_trailers`` is set only if nothing of the answer went to the client.
    """

    __slots__ = (
        "_meter",
        "done",
        "held_headers",
        "held_trailers",
        "injector",
        "outcome",
        "proxied",
        "refused",
        "route",
        "stream",
        "text",
    )

    def __init__(self, proxied: ProxiedCall, route: Route) -> None:
        self.proxied = proxied
        self.route = route
        self.stream: RawStream
        self.done: asyncio.Future[None] = proxied.loop.create_future()
        self.outcome: Outcome | None = None
        self.text = ""
        self.refused = False
        self.held_trailers: HeaderList | None = None
        self.injector: Injector | None = None
        self.held_headers: HeaderList | None = None
        proxy = proxied.proxy
        self._meter = MessageMeter("response", proxy.message_bytes_max)
        if isinstance(route, LocalRoute) and route.injection_path:
            self.injector = Injector(
                injection_suffix(route.injection_path, route.model_id),
                proxied.incoming.head.encoding,
                proxy.message_bytes_max,
            )

    def headers_received(self, headers: HeaderList) -> None:
        """Hold the initial headers for the rest of the turn."""
        try:
            check_response_headers(headers)
        except MalformedHeadersError as error:
            self._spoil(StatusCode.INTERNAL, f"malformed response: {error.message}")
            return
        self._note_load(headers)
        self.held_headers = headers
        self.stream.link.at_turn_end(self._release_headers)

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """Pass a piece of the answer on."""
        if self.done.done():
            self.stream.acknowledge(size)
            return
        try:
            self._meter.feed(data)
        except MeshError as error:
            self.stream.acknowledge(size)
            self._spoil(error.code, error.message)
            return
        self._release_headers()
        if data:
            self.proxied.incoming.stream.send_data(data, size)
        else:
            self.stream.acknowledge(size)
        if ended:
            self._spoil(StatusCode.INTERNAL, "the response ended without a status")

    def trailers_received(self, trailers: HeaderList, initial: bool) -> None:
        """The answer is complete: pass its end on, or hold it if it may be tried again."""
        if self.done.done():
            return
        try:
            check_response_headers(trailers)
        except MalformedHeadersError as error:
            self._spoil(StatusCode.INTERNAL, f"malformed response: {error.message}")
            return
        proxied = self.proxied
        if initial:
            self._note_load(trailers)
        status = read_status(trailers)
        outcome = Outcome.ANSWERED if status.code == 0 else judge(self.route, status)
        self.text = status.message
        if outcome is not Outcome.ANSWERED and not proxied.incoming.headers_sent:
            self.held_trailers = trailers
        else:
            self._release_headers()
            proxied.answer_trailers(trailers, outcome)
        self._finish(outcome)

    def data_sent(self, size: int) -> None:
        """A piece of the request has left: the client may send more."""
        self.proxied.incoming.stream.acknowledge(size)

    def terminated(self, fault: StreamFault) -> None:
        """The upstream gave the call up, or is gone."""
        if self.done.done():
            return
        proxied = self.proxied
        self.text = fault.text
        if fault.kind is FaultKind.REFUSED:
            self.refused = True
            self._finish(Outcome.UNREACHABLE)
        elif fault.kind is FaultKind.LOST:
            self._finish(Outcome.UNREACHABLE)
        else:
            code = _RESET_CODES.get(ErrorCodes(fault.code)) if fault.code < 14 else None
            text = f"the upstream ended the call: {fault.text}"
            proxied.incoming.send_status(code or StatusCode.INTERNAL, text)
            self._finish(Outcome.ANSWERED)

    def _release_headers(self) -> None:
        headers = self.held_headers
        if headers is not None and not self.done.done():
            self.held_headers = None
            self.proxied.answer_headers(headers)

    def _note_load(self, headers: HeaderList) -> None:
        if isinstance(self.route, PeerRoute):
            load = read_load(headers)
            if load is not None:
                self.proxied.proxy.router.report_load(self.route, load)

    def _spoil(self, code: int, text: str) -> None:
        """Answer in place of an upstream whose answer cannot be passed on."""
        self.proxied.incoming.send_status(code, text)
        self._finish(Outcome.ANSWERED)

    def _finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.done.set_result(None)
        # Whatever of the request is still under way has no reader.
        self.stream.reset(ErrorCodes.NO_ERROR if self.stream.remote_ended else ErrorCodes.CANCEL)


def judge(route: Route, status: Status) -> Outcome:
    """Answer what a status other than OK means to the router (spec core 2.7, 2.8.4)."""
    if isinstance(route, PeerRoute):
        return read_outcome(status.hop_result) or Outcome.ANSWERED
    if says_model_is_lost(status):
        return Outcome.LOST
    if status.code == StatusCode.UNAVAILABLE:
        return Outcome.RUNTIME_UNAVAILABLE
    return Outcome.ANSWERED
