"""One HTTP/2 stream as its user sees it: what to send, and a sink that is told what comes in.

Nothing here waits. What cannot be sent yet (the other side's window, a full socket) is queued,
and ``StreamSink.data_sent`` tells when it has left: a proxy acknowledges then what it received,
so neither side ever holds more than a window. Connections are ``mm.edge.h2.link``.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from h2.errors import ErrorCodes

from mm.core.headers import HeaderList

if TYPE_CHECKING:
    from mm.edge.h2.link import Link


class FaultKind(enum.Enum):
    """Why a stream ended before its time."""

    #: RST_STREAM from the other side, with ``StreamFault.code``.
    RESET = "reset"
    #: The other side never looked at it (REFUSED_STREAM, GOAWAY below its id): safe to repeat.
    REFUSED = "refused"
    #: The connection is gone.
    LOST = "lost"
    #: The other side broke the protocol on this stream.
    PROTOCOL = "protocol"


@dataclass(frozen=True, slots=True)
class StreamFault:
    """What ended a stream before its time."""

    kind: FaultKind
    text: str
    code: int = 0


class StreamSink(Protocol):
    """Whoever a stream belongs to. Called from the connection's reader; must not block or raise.

    After ``terminated``, or after the stream ended in both directions, nothing more is told.
    """

    def headers_received(self, headers: HeaderList) -> None:
        """The initial headers of a response are here."""

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """A piece of body is here; ``size`` is to be given back by ``RawStream.acknowledge``."""

    def trailers_received(self, trailers: HeaderList, initial: bool) -> None:
        """The last headers are here; ``initial``: they are also the first (trailers-only)."""

    def data_sent(self, size: int) -> None:
        """Data that was given to ``send_data`` with this ``size`` has left."""

    def terminated(self, fault: StreamFault) -> None:
        """The stream ended before its time."""


class _Nobody:
    """The sink of a stream that is closed, or answered already."""

    def headers_received(self, headers: HeaderList) -> None: ...

    def data_received(self, data: bytes, size: int, ended: bool) -> None: ...

    def trailers_received(self, trailers: HeaderList, initial: bool) -> None: ...

    def data_sent(self, size: int) -> None: ...

    def terminated(self, fault: StreamFault) -> None: ...


NOBODY = _Nobody()


class RawStream:
    """Sends on one stream, in order, as windows allow.

    Invariants: 1. ``unacknowledged`` is what was received and not yet given back; all of it is
    given back when the stream ends. 2. Nothing is sent after END_STREAM or RST_STREAM. 3. Queued
    data leaves before the end that was asked for after it.
    """

    __slots__ = (
        "_end_wanted",
        "_queue",
        "_trailers",
        "id",
        "link",
        "local_ended",
        "remote_ended",
        "sink",
        "unacknowledged",
    )

    def __init__(self, link: Link, stream_id: int, sink: StreamSink) -> None:
        self.link = link
        self.id = stream_id
        self.sink = sink
        self.unacknowledged = 0
        self.local_ended = False
        self.remote_ended = False
        self._queue: deque[tuple[bytes | memoryview, int]] | None = None
        self._end_wanted = False
        self._trailers: HeaderList | None = None

    @property
    def closed(self) -> bool:
        """Whether both directions have ended."""
        return self.local_ended and self.remote_ended

    @property
    def has_queue(self) -> bool:
        """Whether data waits for a window."""
        return bool(self._queue)

    def send_headers(self, headers: HeaderList, end: bool = False) -> None:
        """Answer with initial headers, or (``end``) with nothing but trailers."""
        if not self.local_ended:
            self.link.engine.submit_headers(self.id, headers, end)
            self.link.request_flush()
            if end:
                self._ended_here()

    def send_data(self, data: bytes | memoryview, size: int = 0, end: bool = False) -> None:
        """Send a piece of body, now or when there is room."""
        if self.local_ended:
            if size:
                self.sink.data_sent(size)
            return
        self._end_wanted = self._end_wanted or end
        if self._queue is None:
            self._queue = deque()
        self._queue.append((data, size))
        if len(self._queue) == 1:
            self.pump()

    def send_trailers(self, trailers: HeaderList) -> None:
        """End with trailers, after whatever is queued."""
        if self.local_ended:
            return
        if self._queue:
            self._trailers = trailers
        else:
            self.send_headers(trailers, end=True)

    def end(self) -> None:
        """Half-close, after whatever is queued."""
        if self.local_ended:
            return
        if self._queue:
            self._end_wanted = True
        else:
            self.link.engine.submit_data(self.id, b"", True)
            self.link.request_flush()
            self._ended_here()

    def reset(self, code: int = ErrorCodes.CANCEL) -> None:
        """End both directions at once. The sink hears nothing more."""
        if not self.closed:
            self.link.engine.submit_reset(self.id, code)
            self.link.request_flush()
            self._close()

    def acknowledge(self, size: int) -> None:
        """Give back room for data that was received."""
        if size and self.unacknowledged:
            size = min(size, self.unacknowledged)
            self.unacknowledged -= size
            self.link.engine.acknowledge(self.id, size)
            self.link.request_flush()

    def pump(self) -> None:
        """Send what is queued as far as windows and the socket allow."""
        queue = self._queue
        engine = self.link.engine
        while queue and self.link.has_room():
            room = engine.sendable(self.id)
            data, size = queue[0]
            length = len(data)
            if length > room:
                if room <= 0:
                    break
                view = memoryview(data)
                engine.submit_data(self.id, view[:room], False)
                queue[0] = (view[room:], size)
            else:
                queue.popleft()
                end = self._end_wanted and not queue
                engine.submit_data(self.id, data, end)
                if size:
                    self.sink.data_sent(size)
                if end:
                    self._ended_here()
            self.link.request_flush()
        if queue and not self.closed:
            own = engine.streams.get(self.id)
            is_own = own is None or own.outbound_flow_control_window <= 0
            (self.link.blocked if is_own else self.link.waiting)[self.id] = self
        elif self._trailers is not None:
            trailers, self._trailers = self._trailers, None
            self.send_headers(trailers, end=True)

    def receive_end(self) -> None:
        """Note that the other side has ended."""
        self.remote_ended = True
        if self.local_ended:
            self._close()

    def terminate(self, fault: StreamFault) -> None:
        """End both directions because the other side, or the connection, did."""
        if not self.closed:
            sink = self.sink
            self._close()
            sink.terminated(fault)

    def _ended_here(self) -> None:
        self.local_ended = True
        if self.remote_ended:
            self._close()
        elif self.link.is_server:
            # The answer is complete, so what the client still sends is of no use (RFC 9113, 8.1).
            self.link.engine.submit_reset(self.id, ErrorCodes.NO_ERROR)
            self._close()

    def _close(self) -> None:
        self.local_ended = self.remote_ended = True
        self._trailers = None
        queue, self._queue = self._queue, None
        if self.unacknowledged:
            self.link.engine.acknowledge(self.id, self.unacknowledged)
            self.unacknowledged = 0
        self.link.release(self)
        # The stream lets go of its user, who holds the stream: they shall not wait for the
        # garbage collector together.
        sink, self.sink = self.sink, NOBODY
        if queue:
            # Whoever waits for room on another stream must not wait for ever.
            for _, size in queue:
                if size:
                    sink.data_sent(size)
