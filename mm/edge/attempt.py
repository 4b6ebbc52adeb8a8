"""One attempt to get a proxied call answered: a stream to a runtime or peer, and what it meant.

What of the answer goes to the client at once, and what waits because it may be tried elsewhere,
is decided here, in the callbacks of the upstream's connection. Who tries again is
``mm.edge.pipe``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes

from mm.core import call_texts
from mm.core.calls import LocalRoute, Outcome, PeerRoute, Route
from mm.core.headers import (
    HeaderList,
    MalformedHeadersError,
    Status,
    check_http_status,
    check_response_headers,
    read_status,
    says_model_is_lost,
)
from mm.core.hop_headers import read_load, read_outcome
from mm.core.protobuf_ids import injection_suffix
from mm.edge.h2.injection import Injector
from mm.edge.h2.messages import MessageMeter
from mm.edge.h2.stream import FaultKind, RawStream, StreamFault
from mm.errors import MeshError, StatusCode

if TYPE_CHECKING:
    from mm.edge.pipe import ProxiedCall

#: What a RST_STREAM of the upstream means to the client (gRPC over HTTP/2, "Errors").
_RESET_CODES = {
    ErrorCodes.REFUSED_STREAM: StatusCode.UNAVAILABLE,
    ErrorCodes.CANCEL: StatusCode.CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: StatusCode.RESOURCE_EXHAUSTED,
    ErrorCodes.INADEQUATE_SECURITY: StatusCode.PERMISSION_DENIED,
}


class Attempt:
    """One stream to an upstream; the sink of its answer.

    Initial headers wait until the turn in which they came is over: most unary failures come with
    their trailers in one piece, and can then be tried elsewhere.

    Invariants: 1. ``done`` is set once, with ``outcome``. 2. Nothing goes to the client after it.
    3. ``held_trailers`` is set only if nothing of the answer went to the client.
    """

    __slots__ = (
        "_meter",
        "code",
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
        #: What it ended with; without an answer, that there was none.
        self.code: int = StatusCode.UNAVAILABLE
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
            check_http_status(headers, begins=True)
            check_response_headers(headers)
        except MalformedHeadersError:
            self._spoil(StatusCode.INTERNAL, call_texts.MALFORMED_RESPONSE)
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
            if self.proxied.observation is not None:
                self.proxied.observation.response_piece(data)
            self.proxied.incoming.stream.send_data(data, size)
        else:
            self.stream.acknowledge(size)
        if ended:
            self._spoil(StatusCode.INTERNAL, call_texts.NO_STATUS)

    def trailers_received(self, trailers: HeaderList, initial: bool) -> None:
        """The answer is complete: pass its end on, or hold it if it may be tried again."""
        if self.done.done():
            return
        try:
            check_http_status(trailers, begins=initial)
            check_response_headers(trailers)
        except MalformedHeadersError:
            self._spoil(StatusCode.INTERNAL, call_texts.MALFORMED_RESPONSE)
            return
        proxied = self.proxied
        if initial:
            self._note_load(trailers)
        status = read_status(trailers)
        self.code = StatusCode.UNKNOWN if status.code is None else status.code
        outcome = Outcome.ANSWERED if status.code == 0 else judge(self.route, status)
        self.text = status.message
        if isinstance(self.route, PeerRoute) and status.hop_state is not None:
            proxied.proxy.router.report_state(proxied.call, self.route, status.hop_state)
        if isinstance(self.route, PeerRoute) and outcome is not Outcome.ANSWERED:
            proxied.call.hear_retry(status.retry_after_ms)
        if outcome is not Outcome.ANSWERED and not proxied.incoming.headers_sent:
            self.held_trailers = trailers
        else:
            self._release_headers()
            proxied.answer_trailers(trailers, self.code, outcome)
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
        elif fault.kind is FaultKind.PROTOCOL:
            self._spoil(StatusCode.INTERNAL, call_texts.MALFORMED_RESPONSE)
        else:
            code = _RESET_CODES.get(ErrorCodes(fault.code)) if fault.code < 14 else None
            self.code = code or StatusCode.INTERNAL
            text = call_texts.UPSTREAM_ENDED % fault.text
            proxied.answer_status(self.code, text)
            self._finish(Outcome.ANSWERED)

    @property
    def messages_bytes(self) -> int:
        """What the messages of the answer have, so far."""
        return self._meter.messages_bytes

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
        self.code = code
        self.proxied.answer_status(code, text)
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
    if status.code == StatusCode.RESOURCE_EXHAUSTED:
        return Outcome.EXHAUSTED
    return Outcome.ANSWERED
