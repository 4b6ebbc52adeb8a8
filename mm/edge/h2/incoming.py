"""One call that came in: what it asks, and the ways to answer it.

Made by ``mm.edge.h2.server``; handed to its handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from h2.errors import ErrorCodes

from mm.core import call_texts
from mm.core.headers import Header, HeaderList, RequestHead, are_trailers, status_trailers
from mm.edge.h2.stream import RawStream, StreamFault
from mm.errors import MeshError, StatusCode

if TYPE_CHECKING:
    from mm.edge.h2.server import ServerLink


class Body(Protocol):
    """Whoever reads the body of a request."""

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """A piece is here; ``size`` is to be given back by ``RawStream.acknowledge``."""

    def data_sent(self, size: int) -> None:
        """Data that was given to ``RawStream.send_data`` with this ``size`` has left."""


class IncomingCall:
    """One call that a client or peer made.

    ``deadline_s`` is on the clock of the event loop. The task that serves the call is cancelled
    when the client goes away (``abandoned``), its deadline passes or the server stops; by then
    the answer, if any was possible, has been sent.
    """

    __slots__ = (
        "_body",
        "_early",
        "_finished",
        "_held_bytes",
        "_length_left",
        "_timer",
        "abandoned",
        "caller",
        "deadline_s",
        "head",
        "headers",
        "headers_sent",
        "holds_stop",
        "initial_headers",
        "link",
        "model_id",
        "request_bytes",
        "response_bytes",
        "status_code",
        "status_sent",
        "stream",
        "task",
    )

    def __init__(self, link: ServerLink, headers: HeaderList, head: RequestHead) -> None:
        self.link = link
        #: As they came, pseudo-headers included.
        self.headers = headers
        self.head = head
        self.headers_sent = False
        #: The status was given to the stream; it leaves after what is queued before it.
        self.status_sent = False
        #: The code of this status.
        self.status_code: int | None = None
        #: The name of the identity that makes it; empty: nobody asked.
        self.caller = ""
        #: Whom it is for, as far as that is known and one.
        self.model_id = ""
        #: Of its messages, as far as somebody counted them.
        self.request_bytes = 0
        self.response_bytes = 0
        self.abandoned = False
        #: Whether a server that stops waits for this call; watches would never end by themselves.
        self.holds_stop = True
        #: Sent with the first headers of the answer, whatever it is.
        self.initial_headers: HeaderList = []
        self.stream: RawStream
        self.task: asyncio.Task[None]
        self._body: Body | None = None
        self._finished = False
        self._length_left = head.content_length
        self._held_bytes = 0
        self._early: list[tuple[bytes, int, bool]] = []
        self._timer: asyncio.TimerHandle | None = None
        self.deadline_s: float | None = None
        if head.timeout_s is not None:
            self.deadline_s = link.loop.time() + head.timeout_s
            self._timer = link.loop.call_at(self.deadline_s, self._expire)

    @property
    def method(self) -> str:
        """The full path, "/pkg.Service/Method"."""
        return self.head.path.decode("utf-8", "replace")

    @property
    def peer_address(self) -> str:
        """Where the call came from."""
        return self.link.peer_address

    @property
    def answered(self) -> bool:
        """Whether the answer is complete, or nobody waits for one."""
        return self.stream.local_ended

    # --- reading -----------------------------------------------------------------------------

    def read_by(self, body: Body) -> None:
        """Hand the body over, beginning with what is here already."""
        self._body = body
        early, self._early = self._early, []
        for data, size, ended in early:
            body.data_received(data, size, ended)

    def unread(self, pieces: list[tuple[bytes, int, bool]]) -> None:
        """Take back pieces that were read, for the next reader."""
        self._body = None
        self._early = pieces

    def hold(self, size: int) -> bool:
        """Ask to keep ``size`` bytes of the request beyond its windows, until the call ends."""
        server = self.link.server
        if server.held_bytes + size > server.limits.held_bytes_max:
            return False
        server.held_bytes += size
        self._held_bytes += size
        return True

    def drop_held(self) -> None:
        """Give back what ``hold`` granted."""
        self.link.server.held_bytes -= self._held_bytes
        self._held_bytes = 0

    def finish(self) -> None:
        """The handler has ended: nobody reads the rest of the request."""
        self._finished = True
        self._body = None
        self._early.clear()
        self.drop_held()

    # --- answering ---------------------------------------------------------------------------

    def send_headers(self, headers: Iterable[Header] = ()) -> None:
        """Send initial headers: those given, after :status and content-type."""
        assert not self.headers_sent
        self.headers_sent = True
        self.stream.send_headers(
            [
                (b":status", b"200"),
                (b"content-type", self.head.content_type),
                *self.initial_headers,
                *headers,
            ]
        )

    def send_raw_headers(self, headers: HeaderList) -> None:
        """Send initial headers as another server made them."""
        self.headers_sent = True
        if self.initial_headers:
            headers = headers + self.initial_headers
        self.stream.send_headers(headers)

    def send_raw_trailers(self, trailers: HeaderList, code: int) -> None:
        """End with trailers as another server made them; they say ``code``."""
        if self.status_sent:
            return
        self._status_follows(code)
        if not self.headers_sent:
            self.headers_sent = True
            if self.initial_headers:
                trailers = trailers + self.initial_headers
        self.stream.send_trailers(trailers)

    def send_status(self, code: int, message: str = "", extra: Iterable[Header] = ()) -> None:
        """End with a status; without headers before it, trailers-only. Nothing if answered."""
        if self.status_sent:
            return
        self._status_follows(code)
        trailers = [*status_trailers(code, message), *extra]
        if not self.headers_sent:
            self.headers_sent = True
            trailers = [
                (b":status", b"200"),
                (b"content-type", self.head.content_type),
                *self.initial_headers,
                *trailers,
            ]
        self.stream.send_trailers(trailers)

    def fail(self, error: MeshError) -> None:
        """End with the status of an error."""
        extra: HeaderList = []
        if error.retry_after_ms is not None:
            extra.append((b"grpc-retry-pushback-ms", b"%d" % error.retry_after_ms))
        if error.hop_result is not None and not self.link.server.external:
            extra.append((b"mm-hop-result", error.hop_result.encode()))
            if error.hop_state is not None:
                extra.append((b"mm-hop-state", error.hop_state.encode()))
        self.send_status(error.code, error.message, extra)

    # --- what the stream tells ---------------------------------------------------------------

    def headers_received(self, headers: HeaderList) -> None:
        """Clients send no second headers but trailers."""

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """Pass on a piece of the body, or keep it until someone reads."""
        if self._length_left is not None:
            self._length_left -= len(data)
            if self._length_left < 0 or (ended and self._length_left):
                self._break_off()
                return
        if self._body is not None:
            self._body.data_received(data, size, ended)
        elif self._finished:
            self.stream.acknowledge(size)
        else:
            self._early.append((data, size, ended))

    def trailers_received(self, trailers: HeaderList, initial: bool) -> None:
        """Trailers of a request mean nothing to gRPC but its end."""
        if are_trailers(trailers):
            self.data_received(b"", 0, True)
        else:
            self._break_off()

    def data_sent(self, size: int) -> None:
        """Pass on that there is room again."""
        if self._body is not None:
            self._body.data_sent(size)

    def terminated(self, fault: StreamFault) -> None:
        """The client gave up, or is gone."""
        self._abandon()

    def _break_off(self) -> None:
        """Reset the stream: the request breaks HTTP/2 (RFC 9113, 8.1.1)."""
        self._length_left = None
        self.stream.reset(ErrorCodes.PROTOCOL_ERROR)
        self._abandon()

    def _abandon(self) -> None:
        self.abandoned = True
        self._stop_timer()
        self.task.cancel()

    def _expire(self) -> None:
        self._timer = None
        if self.stream.has_queue:
            # The client does not take what it asked for: no trailers would reach it either.
            self.stream.reset(ErrorCodes.CANCEL)
        else:
            self.send_status(StatusCode.DEADLINE_EXCEEDED, call_texts.DEADLINE_EXCEEDED)
        self.task.cancel()

    def _status_follows(self, code: int) -> None:
        self.status_sent = True
        self.status_code = code
        if not self.stream.has_queue:
            self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
