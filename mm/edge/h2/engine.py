"""HTTP/2 framing of one connection: h2, with its answers moved from the connection to the stream.

h2 keeps the frame parser, HPACK, settings and the windows. What differs from plain h2, and why:

1. A malformed request, a header list above the limit, one stream too many: h2 ends the connection,
   and with it every other call. Here the stream alone is answered or reset.
2. GOAWAY: h2 declares the connection dead, in both directions. Here streams up to the last id go
   on until they are finished (RFC 9113, 6.8).
3. h2 counts open streams by walking all of them on every new one; with thousands open, that is
   the whole cost of a call. Here they are counted.
4. Header lists stay raw bytes, unchecked: ``mm.core.headers`` checks them once.
5. Frames that are sent often are packed directly rather than through an object each.

It does no I/O and knows nothing of gRPC. Private parts of h2 are overridden: this file is the one
place that knows them, and ``tests/edge/test_h2_*.py`` holds it to raw frames.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, cast

from h2.config import H2Configuration
from h2.connection import AllowedStreamIDs, ConnectionInputs, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RequestReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import (
    DenialOfServiceError,
    NoSuchStreamError,
    ProtocolError,
    StreamClosedError,
    StreamIDTooLowError,
)
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream, StreamInputs
from h2.utilities import is_informational_response
from h2.windows import WindowManager
from hpack.exceptions import HPACKError, OversizedHeaderListError
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
)

from mm.core.headers import Header, HeaderList
from mm.edge.h2.compression import LimitedDecoder, RememberingEncoder
from mm.edge.h2.frames import LimitedFrames
from mm.edge.h2.limits import TransportLimits

_FRAME_HEAD = struct.Struct(">HBBBL")
_DATA, _HEADERS, _RST_STREAM, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 8, 9
_END_STREAM, _END_HEADERS = 1, 4
_ERROR_CODE = struct.Struct(">L")
_STREAM_ID_MAX = 2**31 - 1
_WINDOW_BYTES_DEFAULT = 65_535
#: The most that a header block may be compressed against. The other side's setting may allow
#: gigabytes, all of which would be kept here.
_ENCODER_TABLE_BYTES_MAX = 4096
#: What other frames cost beside the one that begins a stream, roughly.
_FRAMES_A_CALL = 16
#: Whose windows SETTINGS may change in the time of another frame, roughly.
_STREAMS_A_FRAME = 32
#: Frames that we take: larger than HTTP/2's 16 KiB, because a frame costs the same at any size.
_FRAME_BYTES_MAX = 64 * 1024
#: DATA frames that we send, however large ones the other side would take: the next is made only
#: when the socket takes more, so this bounds what piles up for one that is slow.
_SENT_FRAME_BYTES_MAX = 256 * 1024


class CompressionError(ProtocolError):
    """A header block that cannot be read; every later one would be read wrongly (RFC 9113, 4.3)."""

    error_code = ErrorCodes.COMPRESSION_ERROR


class EngineStream(H2Stream):
    """A stream whose header lists are neither checked nor rebuilt, and whose faults are its own."""

    def receive_headers(
        self, headers: Iterable[Header], end_stream: bool, header_encoding: bool | str | None
    ) -> tuple[list[Frame], list[Event]]:
        """Take request, response or trailers."""
        state = self.state_machine
        if state.client and is_informational_response(headers):
            informed = state.process_input(StreamInputs.RECV_INFORMATIONAL_HEADERS)
            # An announcement of an answer that ends it.
            return self._fault() if end_stream else ([], informed)
        events = state.process_input(StreamInputs.RECV_HEADERS)
        event = cast("RequestReceived | ResponseReceived | TrailersReceived", events[0])
        event.headers = cast("list[Any]", headers)
        if end_stream:
            event.stream_ended = cast(Any, state.process_input(StreamInputs.RECV_END_STREAM)[0])
        elif event.__class__ is TrailersReceived:
            return self._fault()
        return [], events

    def receive_data(
        self, data: bytes, end_stream: bool, flow_control_len: int
    ) -> tuple[list[Frame], list[Event]]:
        """Take a piece of the body. A content-length is not held against it."""
        state = self.state_machine
        events = state.process_input(StreamInputs.RECV_DATA)
        self._inbound_window_manager.window_consumed(flow_control_len)
        event = cast(DataReceived, events[0])
        event.data = data
        event.flow_controlled_length = flow_control_len
        if end_stream:
            event.stream_ended = cast(Any, state.process_input(StreamInputs.RECV_END_STREAM)[0])
        return [], events

    def _fault(self) -> tuple[list[Frame], list[Event]]:
        frames = self.reset_stream(ErrorCodes.PROTOCOL_ERROR)
        reset = StreamReset(
            stream_id=self.stream_id, error_code=ErrorCodes.PROTOCOL_ERROR, remote_reset=False
        )
        return frames, [reset]


class Engine(H2Connection):
    """One connection's framing. Bytes in by ``feed`` and ``take``, bytes out by ``data_to_send``.

    Invariants: 1. ``open_count`` is the number of streams in ``streams``; a closed stream leaves
    at once. 2. After ``goaway_last_id`` is set no new stream is begun locally. 3. Every DATA byte
    taken in is given back by ``acknowledge`` exactly once, or by the engine itself if the stream
    is gone.
    """

    def __init__(self, *, client_side: bool, limits: TransportLimits) -> None:
        super().__init__(
            H2Configuration(
                client_side=client_side,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
            )
        )
        settings = {
            SettingCodes.MAX_CONCURRENT_STREAMS: 0 if client_side else limits.streams_max,
            SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
            SettingCodes.MAX_HEADER_LIST_SIZE: limits.header_list_bytes_max,
            SettingCodes.MAX_FRAME_SIZE: _FRAME_BYTES_MAX,
        }
        if client_side:
            settings[SettingCodes.ENABLE_PUSH] = 0
        self.local_settings = Settings(client=client_side, initial_values=cast(Any, settings))
        self.max_inbound_frame_size = _FRAME_BYTES_MAX
        self.incoming_buffer = LimitedFrames(not client_side, limits.header_block_bytes_max)
        self.decoder = LimitedDecoder(limits.header_block_bytes_max)
        self.encoder = self._encoder = RememberingEncoder()
        # Priorities are deprecated (RFC 9113, 5.3.2); a strange one must not end the connection.
        self._frame_dispatch_table[PriorityFrame] = _ignore_frame
        self._streams_max = limits.streams_max
        self._connection_window_bytes = limits.connection_window_bytes
        #: Last of our streams that the other side will answer; None until it said GOAWAY.
        self.goaway_last_id: int | None = None
        #: Last of their streams that we will answer; None until we said GOAWAY.
        self._goaway_sent_last_id: int | None = None

    def initiate_connection(self) -> None:
        """Put preface, SETTINGS and the connection's window into the buffer."""
        super().initiate_connection()
        window = self._connection_window_bytes
        # INITIAL_WINDOW_SIZE is for streams; a connection always begins with the default.
        growth = window - _WINDOW_BYTES_DEFAULT
        assert growth > 0
        self._inbound_flow_control_window_manager = WindowManager(window)
        self._put_frame(_WINDOW_UPDATE, 0, 0, _ERROR_CODE.pack(growth))

    @property
    def open_count(self) -> int:
        """Streams open in either direction."""
        return len(self.streams)

    def _open_streams(self, remainder: int) -> int:
        # Only one side opens streams: pushes are refused by our SETTINGS.
        return len(self.streams)

    def can_open(self) -> bool:
        """Answer whether a further stream may, and should, be begun here now.

        Where many readers are slow, a further stream would wait for them: better elsewhere.
        """
        return (
            self.goaway_last_id is None
            and not self.is_backed_up()
            and len(self.streams) < self.remote_settings.max_concurrent_streams
            and self.highest_outbound_stream_id < _STREAM_ID_MAX - 2
        )

    # --- sending -----------------------------------------------------------------------------

    def submit_headers(self, stream_id: int, headers: HeaderList, end_stream: bool) -> None:
        """Begin a stream, answer one, or end one with trailers."""
        stream = self.streams.get(stream_id)
        if stream is None:
            if not self.config.client_side:
                return  # The client reset it in the same read, of which we are told next.
            self.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
            stream = self._begin_new_stream(stream_id, AllowedStreamIDs(self.config.client_side))
        stream.state_machine.process_input(StreamInputs.SEND_HEADERS)
        block = self._encoder.encode_list(headers)
        flags = _END_STREAM if end_stream else 0
        size_max = self.max_outbound_frame_size
        kind = _HEADERS
        while len(block) > size_max:
            self._put_frame(kind, flags, stream_id, block[:size_max])
            block, kind, flags = block[size_max:], _CONTINUATION, 0
        self._put_frame(kind, flags | _END_HEADERS, stream_id, block)
        if end_stream:
            self._end_local(stream)

    def sendable(self, stream_id: int) -> int:
        """Answer how many bytes the stream's next DATA frame may hold."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return 0
        return min(
            self.outbound_flow_control_window,
            stream.outbound_flow_control_window,
            self.max_outbound_frame_size,
            _SENT_FRAME_BYTES_MAX,
        )

    def submit_data(self, stream_id: int, data: bytes | memoryview, end_stream: bool) -> None:
        """Send one DATA frame, no longer than ``sendable``."""
        stream = self.streams[stream_id]
        stream.state_machine.process_input(StreamInputs.SEND_DATA)
        length = len(data)
        stream.outbound_flow_control_window -= length
        self.outbound_flow_control_window -= length
        self._put_frame(_DATA, _END_STREAM if end_stream else 0, stream_id, data)
        if end_stream:
            self._end_local(stream)

    def submit_reset(self, stream_id: int, code: int) -> None:
        """End a stream in both directions; nothing if it has ended already."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.state_machine.process_input(StreamInputs.SEND_RST_STREAM)
            self._put_frame(_RST_STREAM, 0, stream_id, _ERROR_CODE.pack(code))
            self._forget(stream)

    def submit_goaway(self, code: int = 0, last_id: int | None = None) -> None:
        """Tell the other side to open no more streams; those that it has go on."""
        last_id = self.highest_inbound_stream_id if last_id is None else last_id
        self._goaway_sent_last_id = last_id
        frame = GoAwayFrame(0, last_stream_id=last_id, error_code=code)
        self._data_to_send += frame.serialize()

    def _put_frame(self, kind: int, flags: int, stream_id: int, body: bytes | memoryview) -> None:
        length = len(body)
        self._data_to_send += _FRAME_HEAD.pack(length >> 8, length & 255, kind, flags, stream_id)
        self._data_to_send += body

    def _end_local(self, stream: H2Stream) -> None:
        stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        if stream.closed:
            self._forget(stream)

    def _forget(self, stream: H2Stream) -> None:
        # h2 notes what closed it, of 65,536 streams a connection. Nothing here asks: a frame of
        # any closed stream is answered alike.
        del self.streams[stream.stream_id]

    # --- flow control of what comes in ---------------------------------------------------------

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Give the other side room for ``size`` bytes more: they are passed on, or dropped."""
        increment = self._inbound_flow_control_window_manager.process_bytes(size)
        if increment:
            self._put_frame(_WINDOW_UPDATE, 0, 0, _ERROR_CODE.pack(increment))
        stream = self.streams.get(stream_id)
        if stream is not None:
            increment = stream._inbound_window_manager.process_bytes(size)
            if increment:
                self._put_frame(_WINDOW_UPDATE, 0, stream_id, _ERROR_CODE.pack(increment))

    def is_backed_up(self) -> bool:
        """Answer whether slow readers have used up most of what the other side may send here."""
        window = self._inbound_flow_control_window_manager
        return window.current_window_size < window.max_window_size // 4

    # --- receiving ---------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Take bytes in, for ``take``. Raises ``ProtocolError``."""
        self.incoming_buffer.add_data(data)
        self.incoming_buffer.max_frame_size = self.max_inbound_frame_size

    def take(self, calls_max: int) -> tuple[list[Event], bool]:
        """Answer the events of what was fed, up to so many new streams and a multiple of frames;
        and whether that may have left some. Raises ``ProtocolError``.
        """
        events: list[Event] = []
        frames_left = calls_max * _FRAMES_A_CALL
        try:
            for frame in self.incoming_buffer:
                events += self._receive_frame(frame)
                frames_left -= self._cost_of(frame)
                if frames_left <= 0:
                    return events, True
        except ProtocolError as error:
            self._terminate_connection(error.error_code)
            raise
        return events, False

    def _cost_of(self, frame: Frame) -> int:
        if frame.__class__ is SettingsFrame:
            return 1 + len(self.streams) // _STREAMS_A_FRAME
        return _FRAMES_A_CALL if frame.__class__ is HeadersFrame else 1

    def _acknowledge_settings(self) -> list[Frame]:
        frames = super()._acknowledge_settings()
        if self.encoder.header_table_size > _ENCODER_TABLE_BYTES_MAX:
            self.encoder.header_table_size = _ENCODER_TABLE_BYTES_MAX
        return frames

    def _begin_new_stream(self, stream_id: int, allowed_ids: AllowedStreamIDs) -> H2Stream:
        outbound = self._stream_id_is_outbound(stream_id)
        highest = self.highest_outbound_stream_id if outbound else self.highest_inbound_stream_id
        if stream_id <= highest:
            raise StreamIDTooLowError(stream_id, highest)
        if stream_id % 2 != int(allowed_ids):
            raise ProtocolError("Invalid stream ID for peer.")
        stream = EngineStream(
            stream_id,
            config=self.config,
            inbound_window_size=self.local_settings.initial_window_size,
            outbound_window_size=self.remote_settings.initial_window_size,
        )
        stream.max_outbound_frame_size = self.max_outbound_frame_size
        self.streams[stream_id] = stream
        if outbound:
            self.highest_outbound_stream_id = stream_id
        else:
            self.highest_inbound_stream_id = stream_id
        return stream

    def _receive_frame(self, frame: Frame) -> list[Event]:
        try:
            frames, events = self._frame_dispatch_table[frame.__class__](frame)
        except StreamClosedError as error:
            # Frames of a stream that ended here may be under way still: never the connection's
            # fault, except where the stream never existed.
            self._put_frame(
                _RST_STREAM, 0, error.stream_id, _ERROR_CODE.pack(ErrorCodes.STREAM_CLOSED)
            )
            events = error._events
        else:
            self._prepare_for_sending(frames)
        for event in events:
            stream = self.streams.get(getattr(event, "stream_id", None) or 0)
            if stream is not None and stream.closed:
                self._forget(stream)
        return cast("list[Event]", events)

    def _receive_headers_frame(self, frame: HeadersFrame) -> tuple[list[Frame], list[Event]]:
        # Whatever becomes of the stream, the block has to be decoded: it changes the state that
        # all later blocks are read with.
        headers = self._decode(frame.data)
        stream_id = frame.stream_id
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._stream_id_is_outbound(stream_id):
                if stream_id > self.highest_outbound_stream_id:
                    raise NoSuchStreamError(stream_id)
                return [], []  # Trailers of a stream that we reset.
            if stream_id <= self.highest_inbound_stream_id:
                return [], []
            if self._refuses(stream_id):
                return self._refuse(stream_id), []
            self.state_machine.process_input(ConnectionInputs.RECV_HEADERS)
            stream = self._begin_new_stream(
                stream_id, AllowedStreamIDs(not self.config.client_side)
            )
        return stream.receive_headers(headers, "END_STREAM" in frame.flags, None)

    def _decode(self, block: bytes) -> list[Header]:
        try:
            return cast("list[Header]", self.decoder.decode(block, raw=True))
        except OversizedHeaderListError as error:
            raise DenialOfServiceError(f"header block too large: {error}") from error
        except (HPACKError, IndexError) as error:
            raise CompressionError(f"header block unreadable: {error}") from error

    def _refuses(self, stream_id: int) -> bool:
        if self.config.client_side:
            return True
        last_id = self._goaway_sent_last_id
        return len(self.streams) >= self._streams_max or (
            last_id is not None and stream_id > last_id
        )

    def _refuse(self, stream_id: int) -> list[Frame]:
        """Send a stream back untouched; its client may repeat it at once elsewhere."""
        self.highest_inbound_stream_id = stream_id
        return [RstStreamFrame(stream_id, error_code=ErrorCodes.REFUSED_STREAM)]

    def _receive_data_frame(self, frame: DataFrame) -> tuple[list[Frame], list[Event]]:
        size = frame.flow_controlled_length
        self._inbound_flow_control_window_manager.window_consumed(size)
        stream = self.streams.get(frame.stream_id)
        if stream is None:
            if frame.stream_id > max(
                self.highest_inbound_stream_id, self.highest_outbound_stream_id
            ):
                raise NoSuchStreamError(frame.stream_id)
            self.acknowledge(frame.stream_id, size)
            return [], []
        try:
            return stream.receive_data(frame.data, "END_STREAM" in frame.flags, size)
        except StreamClosedError:
            # Data after END_STREAM: the stream is reset, the connection's window is not lost.
            self.acknowledge(frame.stream_id, size)
            raise

    def _receive_rst_stream_frame(self, frame: RstStreamFrame) -> tuple[list[Frame], list[Event]]:
        if frame.stream_id > max(self.highest_inbound_stream_id, self.highest_outbound_stream_id):
            raise NoSuchStreamError(frame.stream_id)
        return super()._receive_rst_stream_frame(frame)

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        last_id = frame.last_stream_id
        if self.goaway_last_id is not None:
            last_id = min(last_id, self.goaway_last_id)
        self.goaway_last_id = last_id
        event = ConnectionTerminated()
        event.error_code = cast(Any, frame.error_code)
        event.last_stream_id = last_id
        event.additional_data = frame.additional_data or None
        return [], [event]


def _ignore_frame(frame: Frame) -> tuple[list[Frame], list[Event]]:
    return [], []
