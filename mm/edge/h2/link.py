"""One connection on grpclib's protocol layer: socket events in, streams told, one write a turn.

``Link`` is grpclib's ``H2Protocol`` with ``Engine`` in place of plain h2 and ``RawStream`` in
place of grpclib's streams. Its subclasses are the two ends: ``mm.edge.h2.server`` accepts
streams, ``mm.edge.h2.client`` opens them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler, Connection, EventsProcessor, H2Protocol, _set_nodelay
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from mm.core import call_texts
from mm.core.headers import HeaderList
from mm.edge.h2.engine import Engine
from mm.edge.h2.limits import TransportLimits
from mm.edge.h2.stream import FaultKind, RawStream, StreamFault

logger = logging.getLogger(__name__)

#: Time for what was written last to leave when a connection closes.
_LINGER_S = 5.0
#: Bytes gathered in a turn before they are written without waiting for its end; with the
#: transport's own mark it bounds what one connection holds for a slow socket.
_TURN_BYTES_MAX = 256 * 1024
#: More than any read holds.
_ALL = 2**31
#: A read this large may be followed by another at once: uvloop empties a full socket in up to 32
#: reads before it lets anyone else run, which for frames of nine bytes is most of a minute.
_LARGE_READ_BYTES = 64 * 1024


class LinkConnection(Connection):
    """grpclib's connection: keeps the transport alive with pings, and ends it."""

    _abort_timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Drop the connection at once; what is not written by now has no reader."""
        self.cancel_timers()
        self._transport.abort()

    def close_gently(self) -> None:
        """Close once all that was written has left, or does not leave in time."""
        if not self._transport.is_closing():
            self.cancel_timers()
            self._transport.close()
            loop = asyncio.get_running_loop()
            self._abort_timer = loop.call_later(_LINGER_S, self._transport.abort)

    def cancel_timers(self) -> None:
        """Ask for no more signs of life."""
        for timer in (self._ping_handle, self._close_by_ping_handler, self._abort_timer):
            if timer is not None:
                timer.cancel()


class LinkEvents(EventsProcessor):
    """Tells each event to the stream that it concerns. Events without a handler need none."""

    def __init__(self, handler: AbstractHandler, connection: Connection, link: Link) -> None:
        super().__init__(handler, connection)
        self.link = link
        self.table: dict[type[Event], Callable[[Any], None]] = {
            RequestReceived: self.process_request_received,
            ResponseReceived: self.process_response_received,
            TrailersReceived: self.process_trailers_received,
            DataReceived: self.process_data_received,
            WindowUpdated: self.process_window_updated,
            RemoteSettingsChanged: self.process_remote_settings_changed,
            StreamReset: self.process_stream_reset,
            ConnectionTerminated: self.process_connection_terminated,
            PingAckReceived: self.process_ping_ack_received,
        }

    def process(self, event: Event) -> None:
        """Tell one event."""
        tell = self.table.get(event.__class__)
        if tell is not None:
            tell(event)

    def process_request_received(self, event: RequestReceived) -> None:
        """A client began a stream."""
        self.link.accept(event.stream_id, event.headers, event.stream_ended is not None)

    def process_response_received(self, event: ResponseReceived) -> None:
        """The first headers of a response; with END_STREAM they are its trailers too."""
        stream = self.link.streams.get(event.stream_id)
        if stream is None:
            return
        if event.stream_ended is None:
            stream.sink.headers_received(event.headers)
        else:
            sink = stream.sink
            stream.receive_end()
            sink.trailers_received(event.headers, True)

    def process_trailers_received(self, event: TrailersReceived) -> None:
        """Trailers, which always end the stream."""
        stream = self.link.streams.get(event.stream_id)
        if stream is not None:
            sink = stream.sink
            stream.receive_end()
            sink.trailers_received(event.headers, False)

    def process_data_received(self, event: DataReceived) -> None:
        """A piece of body."""
        size = event.flow_controlled_length
        stream = self.link.streams.get(event.stream_id)
        if stream is None:
            self.link.engine.acknowledge(event.stream_id, size)
            return
        stream.unacknowledged += size
        ended = event.stream_ended is not None
        sink = stream.sink
        if ended:
            stream.receive_end()
        sink.data_received(event.data, size, ended)

    def process_window_updated(self, event: WindowUpdated) -> None:
        """More may be sent, on one stream or on all."""
        if event.stream_id:
            stream = self.link.blocked.pop(event.stream_id, None)
            if stream is not None:
                stream.pump()
        else:
            self.link.pump_at_turn_end()

    def process_remote_settings_changed(self, event: RemoteSettingsChanged) -> None:
        """The other side's limits are known, or new."""
        self.link.settings_received()
        if SettingCodes.INITIAL_WINDOW_SIZE in event.changed_settings:
            self.link.windows_changed = True
            self.link.pump_at_turn_end()

    def process_stream_reset(self, event: StreamReset) -> None:
        """The other side gave a stream up, or broke the protocol on it."""
        stream = self.link.streams.get(event.stream_id)
        # Those that the client makes us send cost the same (CVE-2025-8671).
        self.link.reset_received()
        if stream is None:
            return
        code = int(event.error_code or 0)
        if not event.remote_reset:
            kind, text = FaultKind.PROTOCOL, f"stream protocol ({_name_code(code)})"
        elif code == ErrorCodes.REFUSED_STREAM:
            kind, text = FaultKind.REFUSED, call_texts.STREAM_REFUSED
        else:
            kind, text = FaultKind.RESET, call_texts.STREAM_RESET % _name_code(code)
        stream.terminate(StreamFault(kind, text, code))

    def process_ping_ack_received(self, event: PingAckReceived) -> None:
        """A sign of life, and perhaps the answer to a question."""
        super().process_ping_ack_received(event)
        self.link.ping_answered(bytes(event.ping_data))

    def process_connection_terminated(self, event: ConnectionTerminated) -> None:
        """GOAWAY: streams above the last id were not looked at, the others go on."""
        self.link.goaway_received(cast(int, event.last_stream_id), int(event.error_code or 0))


def _name_code(code: int) -> str:
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"code {code}"


class _NoHandler(AbstractHandler):
    """grpclib's place for a request handler; links tell their streams' sinks instead."""

    def accept(self, stream: object, headers: object, release_stream: object) -> None:
        """Never called."""

    def cancel(self, stream: object) -> None:
        """Never called."""

    def close(self) -> None:
        """Nothing to close."""


class Link(H2Protocol):
    """One connection and its streams.

    Invariants: 1. ``streams`` holds exactly the streams not closed on both sides. 2. Of these,
    those with a queue are either ``blocked``, by their own windows, or ``waiting``, for the
    connection's window or the socket. 3. Whatever a turn of the event loop produces leaves in one
    write, unless it exceeds ``_TURN_BYTES_MAX``. 4. What is waiting is looked at once a turn, and
    no more of it than can send: else a client with many answers makes a frame as dear as them all.
    """

    is_server = False
    #: New streams of one read that are looked at before others have their turn.
    calls_a_turn = _ALL
    connection: LinkConnection

    def __init__(self, limits: TransportLimits) -> None:
        interval_s = limits.ping_interval_s
        config = Configuration(
            _keepalive_time=interval_s or None,
            _keepalive_timeout=limits.ping_timeout_s,
            _keepalive_permit_without_calls=True,
            _http2_max_pings_without_data=0,
            _http2_min_sent_ping_interval_without_data=interval_s / 2 or 1,
        )
        self.limits = limits
        self.engine = Engine(client_side=not self.is_server, limits=limits)
        super().__init__(_NoHandler(), config, self.engine.config)
        self.loop = asyncio.get_running_loop()
        self.streams: dict[int, RawStream] = {}
        self.blocked: dict[int, RawStream] = {}
        #: Whoever waits longest is first.
        self.waiting: OrderedDict[int, RawStream] = OrderedDict()
        #: Of all streams, by SETTINGS in this turn.
        self.windows_changed = False
        self.peer_address = ""
        self.lost = False
        self._paused = False
        self._in_turn = False
        self._flush_scheduled = False
        self._turn_ends: list[Callable[[], None]] = []
        self._pumps_at_turn_end = False
        #: Whether it waits for its turn; what comes in meanwhile waits with it.
        self.is_behind = False

    @property
    def other_end(self) -> str:
        """What texts call the other side."""
        return self.peer_address

    # --- what asyncio tells ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: SETTINGS go out at once."""
        sock = transport.get_extra_info("socket")
        if sock is not None:
            _set_nodelay(sock)
        self.transport = cast(asyncio.Transport, transport)
        self.peer_address = _format_address(transport.get_extra_info("peername"))
        self.connection = LinkConnection(self.engine, self.transport, config=self.config)
        self.processor = LinkEvents(self.handler, self.connection, self)
        self.engine.initiate_connection()
        self._flush()
        self.connection.initialize()

    def data_received(self, data: bytes) -> None:
        """Take bytes: all events they make, then one write. Many calls at once take turns."""
        try:
            self.engine.feed(data)
        except ProtocolError as error:
            self._give_up(f"protocol error: {error}")
            return
        if self.is_behind:
            self.rest()
            return
        if self.is_crowded():
            self.fall_behind()
        elif self.take_turn():
            self.fall_behind()
            self.rest()
        elif len(data) >= _LARGE_READ_BYTES and not self.transport.is_closing():
            self.transport.pause_reading()
            self.loop.call_soon(self._read_on)

    def take_turn(self) -> bool:
        """Make events of what came in, of so much as a turn allows; answers whether more waits."""
        self._in_turn = True
        try:
            try:
                events, has_more = self.engine.take(self.calls_a_turn)
            except ProtocolError as error:
                self._give_up(f"protocol error: {error}")
                return False
            process = self.processor.process
            for event in events:
                process(event)
            if self._turn_ends:
                for end_turn in self._turn_ends:
                    end_turn()
                self._turn_ends.clear()
        finally:
            self._in_turn = False
        self._flush()
        if self.transport.get_write_buffer_size() > self.limits.unread_control_bytes_max:
            self._give_up("it does not read the answers to its own frames")
            return False
        return has_more and not self.lost

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        """The other side closed its half: nothing more can be answered usefully."""
        # The transport would wait for ever for someone who does not read what is written already.
        self.connection.close_gently()
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        """The socket is gone, and all streams with it."""
        self.lost = True
        self.connection.cancel_timers()
        fault = StreamFault(FaultKind.LOST, call_texts.CONNECTION_LOST % self.other_end)
        for stream in list(self.streams.values()):
            stream.terminate(fault)

    def pause_writing(self) -> None:
        """The socket takes no more: streams queue."""
        self._paused = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._paused = False
        self.pump_waiting()

    # --- what streams use --------------------------------------------------------------------

    def has_room(self) -> bool:
        """Answer whether more data may be given to the socket in this turn."""
        if len(self.engine._data_to_send) >= _TURN_BYTES_MAX:
            self._flush()
        return not self._paused

    def request_flush(self) -> None:
        """Write what has gathered, when this turn of the event loop is over."""
        if not self._in_turn and not self._flush_scheduled and self.engine._data_to_send:
            self._flush_scheduled = True
            self.loop.call_soon(self._flush)

    def at_turn_end(self, callback: Callable[[], None]) -> None:
        """Call back once all that arrived together has been told."""
        if self._in_turn:
            self._turn_ends.append(callback)
        else:
            callback()

    def pump_at_turn_end(self) -> None:
        """Let waiting streams send, once all that arrived together has been told."""
        if not self._pumps_at_turn_end:
            self._pumps_at_turn_end = True
            self.at_turn_end(self._pump_now)

    def _pump_now(self) -> None:
        self._pumps_at_turn_end = False
        if self.windows_changed:
            self.windows_changed = False
            self.waiting.update(self.blocked)
            self.blocked.clear()
        self.pump_waiting()

    def pump_waiting(self) -> None:
        """Let waiting streams send, as long as the connection's window and the socket take it."""
        while self.waiting and self.engine.outbound_flow_control_window > 0 and self.has_room():
            self.waiting.popitem(last=False)[1].pump()

    def release(self, stream: RawStream) -> None:
        """Forget a stream that is closed."""
        self.streams.pop(stream.id, None)
        self.blocked.pop(stream.id, None)
        self.waiting.pop(stream.id, None)

    def _flush(self) -> None:
        self._flush_scheduled = False
        data = self.engine.data_to_send()
        if data and not self.lost:
            self.transport.write(data)

    def _give_up(self, reason: str) -> None:
        """End the connection, telling the other side if it still listens."""
        logger.log(
            self.complaint_level(), "closing the connection with %s: %s", self.peer_address, reason
        )
        self._flush()
        if self.transport.get_write_buffer_size() > self.limits.unread_control_bytes_max:
            self.connection.close()
        else:
            self.connection.close_gently()

    # --- what the two ends add ---------------------------------------------------------------

    def complaint_level(self) -> int:
        """Answer how loud to say what the other side did wrong."""
        return logging.WARNING

    def is_crowded(self) -> bool:
        """Answer whether so much goes on here that what comes in waits for its turn anyway."""
        return False

    def fall_behind(self) -> None:
        """Wait for the next turn. Only where ``calls_a_turn`` has a limit."""
        raise NotImplementedError

    def rest(self) -> None:
        """Read no more for now. Only where ``calls_a_turn`` has a limit."""
        raise NotImplementedError

    def accept(self, stream_id: int, headers: HeaderList, ended: bool) -> None:
        """The other side began a stream."""
        raise NotImplementedError

    def handshake_begun(self, transport: asyncio.Transport) -> None:
        """There is a socket; ``connection_made`` follows the handshake of TLS."""

    def handshake_failed(self, reason: str) -> None:
        """Nothing follows it."""

    def settings_received(self) -> None:
        """The other side's limits are known, or new."""

    def reset_received(self) -> None:
        """The other side reset a stream, or made us do so."""

    def ping_answered(self, data: bytes) -> None:
        """The other side has read all that was written before a ping with this in it."""

    def goaway_received(self, last_id: int, code: int) -> None:
        """The other side takes no more streams."""


def _format_address(peername: object) -> str:
    if isinstance(peername, tuple):
        return f"{peername[0]}:{peername[1]}"
    return str(peername) if peername else "unix socket"
