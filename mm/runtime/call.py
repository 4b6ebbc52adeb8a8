"""One gRPC call as a runtime sees it: headers, messages in, messages out, how it ends.

Owns the rules of a call (metadata encoding, compression, size limits). Does not own connections
and tasks (``server.py``) nor what the calls mean (``spi.py``, the runtimes).
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar
from urllib.parse import quote

import anyio
from betterproto2 import Message
from grpclib.protocol import Stream

from mm.errors import StatusCode

#: Headers as HTTP/2 has them: lower-case names, raw values, in order of arrival, repeats kept.
RawHeaders = Sequence[tuple[bytes, bytes]]

#: ``str`` for ordinary keys, ``bytes`` for keys that end in ``-bin``.
Metadata = list[tuple[str, str | bytes]]

MESSAGE_PREFIX: Final = struct.Struct(">BI")

#: Set by HTTP/2 or by gRPC itself: no metadata of the application.
_RESERVED: Final = (b":", b"grpc-")
_RESERVED_NAMES: Final = (b"content-type", b"user-agent", b"te")

#: Visible ASCII without "%": what grpc-message carries unescaped.
_MESSAGE_SAFE: Final = "".join(chr(i) for i in range(0x20, 0x7F) if chr(i) != "%")

_TIMEOUT_UNITS_S: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class CallError(Exception):
    """Ends a call with this status. ``details`` is sent as ``grpc-status-details-bin``, as is."""

    def __init__(self, code: StatusCode, message: str, *, details: bytes = b"") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class MessageBuffer:
    """Bytes of a stream on their way in; answers whole messages.

    Stands in for grpclib's own buffer, which takes an empty DATA frame for the end, looks at
    no limit before it has the whole message, and fails on compressed ones. Bytes are acknowledged
    to the sender only while somebody waits for a message, so a stream that nobody reads holds at
    most one flow-control window.
    """

    def __init__(self, acknowledge: Callable[[int], None], message_bytes_max: int) -> None:
        self._acknowledge = acknowledge
        self._message_bytes_max = message_bytes_max
        self._data = bytearray()
        self._unacknowledged_bytes = 0
        self._is_ended = False
        self._arrival: anyio.Event | None = None

    def add(self, data: bytes, ack_size: int) -> None:
        """Take a DATA frame (called by grpclib's protocol)."""
        self._data += data
        self._unacknowledged_bytes += ack_size
        self._announce()

    def eof(self) -> None:
        """Take the end of the client's side (called by grpclib's protocol)."""
        self._is_ended = True
        self._announce()

    def unacked_size(self) -> int:
        """Answer what is left to acknowledge when the stream is released (called by grpclib)."""
        size, self._unacknowledged_bytes = self._unacknowledged_bytes, 0
        return size

    async def receive(self) -> tuple[bool, bytes] | None:
        """Answer the next message and whether it is compressed; None at the end."""
        await self._wait_buffered(MESSAGE_PREFIX.size)
        if not self._data:
            return None
        if len(self._data) < MESSAGE_PREFIX.size:
            raise CallError(StatusCode.INVALID_ARGUMENT, "the request ends inside a message prefix")
        flag, size = MESSAGE_PREFIX.unpack_from(self._data)
        if flag > 1:
            raise CallError(
                StatusCode.INVALID_ARGUMENT, f"message flag {flag}; allowed are 0 and 1"
            )
        if size > self._message_bytes_max:
            raise too_large(size, self._message_bytes_max)
        end = MESSAGE_PREFIX.size + size
        await self._wait_buffered(end)
        if len(self._data) < end:
            raise CallError(StatusCode.INVALID_ARGUMENT, "the request ends inside a message")
        with memoryview(self._data) as view:
            message = bytes(view[MESSAGE_PREFIX.size : end])
        del self._data[:end]
        return flag == 1, message

    async def _wait_buffered(self, size: int) -> None:
        while len(self._data) < size and not self._is_ended:
            self._arrival = anyio.Event()
            if acknowledged := self.unacked_size():
                self._acknowledge(acknowledged)
            await self._arrival.wait()

    def _announce(self) -> None:
        if self._arrival is not None:
            self._arrival.set()


class Call:
    """What a handler is given. It receives, sends and returns (OK) or raises (``CallError``).

    ``initial_metadata`` may be filled until the first ``send``, ``trailing_metadata`` until the
    handler ends.
    """

    def __init__(self, stream: Stream, headers: RawHeaders, message_bytes_max: int) -> None:
        self.headers = headers
        self.initial_metadata: Metadata = []
        self.trailing_metadata: Metadata = []
        self._stream = stream
        self._message_bytes_max = message_bytes_max
        # Typed as grpclib's, but accept() has put ours in its place.
        self._buffer: MessageBuffer = stream.buffer  # type: ignore[assignment]
        self._is_started = False

    @property
    def path(self) -> str:
        """The full method name with its leading slash."""
        return (self.header(b":path") or b"").decode("latin-1")

    def header(self, name: bytes) -> bytes | None:
        """Answer the raw value of the first header of this name."""
        return next((value for key, value in self.headers if key == name), None)

    def application_headers(self) -> Iterator[tuple[str, bytes]]:
        """Yield the client's metadata in order, values of ``-bin`` keys decoded.

        Raises ``CallError`` at the first one that is not base64.
        """
        for key, value in self.headers:
            if not key.startswith(_RESERVED) and key not in _RESERVED_NAMES:
                yield key.decode("latin-1"), decode_value(key, value)

    def model_ids(self) -> list[str]:
        """Answer the ids that the metadata names; the ASCII header hides the other (around 6.3)."""
        ascii_ids = [value for key, value in self.headers if key == b"mm-model-id"]
        if ascii_ids:
            return [value.decode("latin-1") for value in ascii_ids]
        key = b"mm-model-id-bin"
        encoded = [decode_value(key, value) for name, value in self.headers if name == key]
        try:
            return [value.decode() for value in encoded]
        except UnicodeDecodeError as exc:
            raise CallError(StatusCode.INVALID_ARGUMENT, "mm-model-id-bin is not UTF-8") from exc

    def timeout_s(self) -> float | None:
        """Answer the caller's ``grpc-timeout``; None where there is none."""
        value = self.header(b"grpc-timeout")
        if value is None:
            return None
        text = value.decode("latin-1")
        unit_s = _TIMEOUT_UNITS_S.get(text[-1:])
        digits = text[:-1]
        if unit_s is None or not digits.isascii() or not digits.isdigit() or len(digits) > 8:
            raise CallError(StatusCode.INVALID_ARGUMENT, f"malformed grpc-timeout {text!r}")
        return int(digits) * unit_s

    async def receive(self) -> bytes | None:
        """Answer the next message of the client, decompressed; None when it has sent its last."""
        received = await self._buffer.receive()
        if received is None:
            return None
        is_compressed, message = received
        return self._decompressed(message) if is_compressed else message

    async def receive_only(self) -> bytes:
        """Answer the message of a call that has exactly one."""
        message = await self.receive()
        if message is None:
            raise CallError(StatusCode.INVALID_ARGUMENT, "the call has no request message")
        if await self.receive() is not None:
            raise CallError(
                StatusCode.INVALID_ARGUMENT, "the call has more than one request message"
            )
        return message

    async def send(self, message: bytes) -> None:
        """Send one message, the headers before the first."""
        if not self._is_started:
            self._is_started = True
            headers = [*_RESPONSE_HEADERS, *encode_metadata(self.initial_metadata)]
            await self._stream.send_headers(headers)
        await self._stream.send_data(MESSAGE_PREFIX.pack(0, len(message)) + message)

    async def finish(self, code: StatusCode, message: str = "", details: bytes = b"") -> None:
        """End the call; called by the server once the handler has ended."""
        headers = [] if self._is_started else [*_RESPONSE_HEADERS]
        if not self._is_started:
            headers += encode_metadata(self.initial_metadata)
        headers.append(("grpc-status", str(int(code))))
        if message:
            headers.append(("grpc-message", quote(message, safe=_MESSAGE_SAFE)))
        if details:
            headers += encode_metadata([("grpc-status-details-bin", details)])
        headers += encode_metadata(self.trailing_metadata)
        await self._stream.send_headers(headers, end_stream=True)
        if self._stream.closable:  # the client is still sending what nobody will read
            self._stream.reset_nowait()

    def _decompressed(self, message: bytes) -> bytes:
        encoding = self.header(b"grpc-encoding") or b"identity"
        if encoding not in (b"gzip", b"deflate"):
            # The client learns what would do from grpc-accept-encoding, which is always sent.
            text = f"grpc-encoding {encoding.decode('latin-1')!r}; gzip and deflate are served"
            raise CallError(StatusCode.UNIMPLEMENTED, text)
        inflater = zlib.decompressobj(wbits=47)  # 47: either header, largest window
        try:
            plain = inflater.decompress(message, self._message_bytes_max + 1)
        except zlib.error as exc:
            text = f"a message is not {encoding.decode()}: {exc}"
            raise CallError(StatusCode.INVALID_ARGUMENT, text) from exc
        if len(plain) > self._message_bytes_max:
            raise too_large(len(plain), self._message_bytes_max, at_least=True)
        if not inflater.eof:
            raise CallError(StatusCode.INVALID_ARGUMENT, "a compressed message is cut short")
        return plain


_RESPONSE_HEADERS: Final = (
    (":status", "200"),
    ("content-type", "application/grpc"),
    ("grpc-accept-encoding", "identity,deflate,gzip"),
)


def too_large(size: int, limit: int, *, at_least: bool = False) -> CallError:
    """Answer the error for a message above the limit."""
    text = f"message of {'at least ' if at_least else ''}{size} bytes; the limit is {limit}"
    return CallError(StatusCode.RESOURCE_EXHAUSTED, text)


def decode_value(key: bytes, value: bytes) -> bytes:
    """Answer a header's value as bytes; ``-bin`` ones travel in base64, padded or not."""
    if not key.endswith(b"-bin"):
        return value
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as exc:
        text = f"{key.decode('latin-1')} is not base64"
        raise CallError(StatusCode.INVALID_ARGUMENT, text) from exc


def encode_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[str, str]]:
    """Answer metadata as headers."""
    return [
        (
            key,
            base64.b64encode(value).rstrip(b"=").decode() if isinstance(value, bytes) else value,
        )
        for key, value in metadata
    ]


# --- handlers ---------------------------------------------------------------------------------

Handler = Callable[[Call], Awaitable[None]]

RequestT = TypeVar("RequestT", bound=Message)

#: betterproto2 has no error of its own for bytes that it cannot read: these are what it raises.
_PARSE_ERRORS: Final = (ValueError, EOFError, LookupError, AttributeError, TypeError, struct.error)


def parse_request(request_type: type[RequestT], data: bytes) -> RequestT:
    """Read a request message; ``CallError`` if the bytes are none."""
    try:
        return request_type.parse(data)
    except _PARSE_ERRORS as exc:
        text = f"the request is not a valid {request_type.__name__}: {exc}"
        raise CallError(StatusCode.INVALID_ARGUMENT, text) from exc


def unary(
    request_type: type[RequestT], answer: Callable[[Call, RequestT], Awaitable[Message]]
) -> Handler:
    """Answer a handler for a method with one request message and one response message."""

    async def handle(call: Call) -> None:
        request = parse_request(request_type, await call.receive_only())
        await call.send(bytes(await answer(call, request)))

    return handle
