"""Unary methods with betterproto2 messages, served and called on the raw transport.

``ServiceTable`` is a server's handler: it finds the method of a call, or passes the call to its
fallback (the proxy). ``call_unary`` is the other end. Both refuse what is above the message limit
before keeping it, and read gzip and deflate; what they send is uncompressed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import betterproto2
from h2.errors import ErrorCodes

from mm.core.headers import Header, HeaderList, carries_id, format_timeout, read_status
from mm.edge.h2.client import Channel, UnreachableError
from mm.edge.h2.incoming import IncomingCall
from mm.edge.h2.messages import (
    ENCODINGS_READ,
    MessageSplitter,
    TooMuchHeldError,
    decompress,
    frame_message,
)
from mm.edge.h2.server import Handler
from mm.edge.h2.stream import FaultKind, RawStream, StreamFault
from mm.edge.protobuf import NotAMessageError, decode, encode
from mm.errors import InvalidRequestError, MeshError, MethodRefusedError, StatusCode
from mm.pb.grpc.health.v1 import HealthCheckRequest

Request = TypeVar("Request", bound=betterproto2.Message)
Reply = TypeVar("Reply", bound=betterproto2.Message)

# betterproto2 looks for pydantic when the first message is encoded, and imports it if it is
# installed: hundreds of milliseconds, better spent here than in the event loop.
bytes(HealthCheckRequest())

_CONTENT_TYPE = b"application/grpc"
_USER_AGENT = b"grpc-python-mm"


#: Bytes of messages that a streaming method may be ahead of its client.
_UNSENT_BYTES_MAX = 64 * 1024


class MessageStream:
    """A call as messages in both directions; at most a window of either waits here.

    The handler is one task: it reads or sends, one thing at a time.
    """

    def __init__(self, call: IncomingCall) -> None:
        self._call = call
        self._stream = call.stream
        self._length_max = call.stream.link.limits.message_bytes_max
        self._splitter = MessageSplitter("request", self._length_max)
        self._unsent_bytes = 0
        self._room: asyncio.Future[None] | None = None
        self._pieces: deque[tuple[bytes, int]] = deque()
        self._messages: deque[tuple[bool, bytes]] = deque()
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        # An answer that refuses an encoding must name the others, so errors carry it too.
        call.initial_headers.append((b"grpc-accept-encoding", ENCODINGS_READ))
        call.read_by(self)

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """Keep a piece until it is read."""
        self._pieces.append((data, size))
        self._ended = self._ended or ended
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def data_sent(self, size: int) -> None:
        """Let the handler send more."""
        self._unsent_bytes -= size
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def send(self, message: bytes, limit_s: float | None = None) -> None:
        """Send a message, and wait while the client is far behind. Raises ``TimeoutError`` if it
        still is after ``limit_s``.
        """
        if not self._call.headers_sent:
            self._call.send_headers()
        framed = frame_message(message)
        self._unsent_bytes += len(framed)
        self._stream.send_data(framed, len(framed))
        if self._unsent_bytes <= _UNSENT_BYTES_MAX:
            return
        async with asyncio.timeout(limit_s):
            while self._unsent_bytes > _UNSENT_BYTES_MAX:
                self._room = asyncio.get_running_loop().create_future()
                await self._room

    async def read(self) -> bytes | None:
        """Answer the next message, decompressed; None at the end. Raises ``MeshError``."""
        while not self._messages:
            while self._pieces and not self._messages:
                data, size = self._pieces.popleft()
                if not self._call.hold(len(data)):
                    raise TooMuchHeldError
                self._messages.extend(self._splitter.feed(data))
                self._stream.acknowledge(size)
            if self._messages:
                break
            if self._ended:
                if not self._splitter.at_boundary:
                    raise InvalidRequestError("the body ends inside a message")
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        compressed, message = self._messages.popleft()
        if not self._messages and self._splitter.at_boundary:
            self._call.drop_held()
        if not compressed:
            return message
        return decompress(message, self._call.head.encoding, self._length_max)

    async def read_only(self) -> bytes:
        """Answer the message of a request that is to have just one. Raises ``MeshError``."""
        message = await self.read()
        if message is None:
            raise InvalidRequestError("the request has no message")
        if await self.read() is not None:
            raise MethodRefusedError(f"{self._call.method} takes one message")
        return message


async def read_request(call: IncomingCall) -> bytes:
    """Answer the one message of a unary call. Raises ``MeshError``."""
    return await MessageStream(call).read_only()


def send_reply(call: IncomingCall, message: bytes) -> None:
    """Answer a unary call."""
    call.send_headers()
    call.stream.send_data(frame_message(message))
    call.send_status(StatusCode.OK)


class ServiceTable:
    """Full method path -> handler; anything else goes to ``fallback``.

    A method added with ``yields_to_ids`` is the mesh's own only for calls without a model or
    vmodel id; with one, the call is meant for a model (issue 3, "Server").
    """

    def __init__(self, fallback: Handler | None = None) -> None:
        self.fallback = fallback
        self._methods: dict[bytes, tuple[Handler, bool]] = {}

    def add(self, path: str, handler: Handler, *, yields_to_ids: bool = False) -> None:
        """Serve a method with a handler of raw calls."""
        assert path.startswith("/")
        self._methods[path.encode()] = (handler, yields_to_ids)

    def add_unary(
        self,
        path: str,
        request_type: type[Request],
        method: Callable[[Request, IncomingCall], Awaitable[betterproto2.Message]],
        *,
        yields_to_ids: bool = False,
    ) -> None:
        """Serve a method with one message in and one out."""

        async def serve(call: IncomingCall) -> None:
            request = parse_message(request_type, await read_request(call))
            send_reply(call, encode(await method(request, call)))

        self.add(path, serve, yields_to_ids=yields_to_ids)

    def paths(self) -> list[tuple[bytes, bool]]:
        """Answer the methods served here, and of each whether it yields to ids."""
        return [(path, yields) for path, (_, yields) in self._methods.items()]

    async def __call__(self, call: IncomingCall) -> None:
        """Serve a call."""
        found = self._methods.get(call.head.path)
        if found is not None and not (
            found[1] and self.fallback is not None and carries_id(call.head.mesh)
        ):
            await _serve_own(found[0], call)
        elif self.fallback is not None:
            await self.fallback(call)
        else:
            raise MethodRefusedError(f"Method not found: {call.method[1:]}")


async def _serve_own(handler: Handler, call: IncomingCall) -> None:
    """Serve a call of the mesh's own. A client with many of them leaves the calls for models of
    others one half of the turns, as one does whose calls wait for loads: a controller that sets
    all it knows again is in no hurry.
    """
    call.link.own_count += 1
    try:
        await handler(call)
    finally:
        call.link.own_count -= 1


def parse_message(message_type: type[Request], data: bytes) -> Request:
    """Decode a message from outside; raises ``InvalidRequestError`` where it is none."""
    try:
        return decode(message_type, data)
    except NotAMessageError as error:
        raise InvalidRequestError(f"the request is {error}") from error


# --- calling ---------------------------------------------------------------------------------


class CallError(MeshError):
    """A call was answered with a status other than OK. ``trailers`` are as they came."""

    def __init__(self, code: int, message: str, trailers: HeaderList) -> None:
        known = StatusCode(code) if 0 <= code <= 16 else StatusCode.UNKNOWN
        super().__init__(message, code=known)
        self.trailers = trailers


class Answer:
    """The whole answer to one call, gathered; the sink of its stream.

    One of ``error`` (above the message limit), ``fault`` (no answer) and ``trailers`` is set.
    """

    def __init__(self, length_max: int) -> None:
        self.headers: HeaderList = []
        self.trailers: HeaderList | None = None
        self.fault: StreamFault | None = None
        self.error: MeshError | None = None
        self.messages: list[tuple[bool, bytes]] = []
        self.stream: RawStream | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._length_max = length_max
        self._splitter = MessageSplitter("response", length_max)

    def plain_messages(self) -> list[bytes]:
        """Answer the messages, decompressed. Raises ``MeshError``."""
        encoding = dict(self.headers).get(b"grpc-encoding", b"")
        return [
            decompress(message, encoding, self._length_max) if compressed else message
            for compressed, message in self.messages
        ]

    def headers_received(self, headers: HeaderList) -> None:
        """Keep the initial headers."""
        self.headers = headers

    def data_received(self, data: bytes, size: int, ended: bool) -> None:
        """Gather messages; one above the limit ends it."""
        try:
            self.messages.extend(self._splitter.feed(data))
        except MeshError as error:
            self.error = error
            self._finish()
            return
        assert self.stream is not None
        self.stream.acknowledge(size)
        if ended:
            self.trailers = []
            self._finish()

    def trailers_received(self, trailers: HeaderList, initial: bool) -> None:
        """The answer is whole."""
        self.trailers = trailers
        self._finish()

    def data_sent(self, size: int) -> None:
        """Nobody waits for room: the request is a single message."""

    def terminated(self, fault: StreamFault) -> None:
        """There will be no answer."""
        self.fault = fault
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def exchange(channel: Channel, headers: HeaderList, body: bytes) -> Answer:
    """Send a whole request and gather the whole answer, whatever it is.

    Raises ``UnreachableError`` if there is no connection. Cancelling it cancels the call.
    """
    answer = Answer(channel.limits.message_bytes_max)
    try:
        answer.stream = await channel.open(headers, answer)
        answer.stream.send_data(body, end=True)
        await answer.done
    finally:
        if answer.stream is not None:
            answer.stream.reset(ErrorCodes.CANCEL)
    return answer


def request_headers(channel: Channel, path: str, timeout_s: float | None) -> HeaderList:
    """Answer the headers that begin a call of our own."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", channel.authority),
        (b"te", b"trailers"),
        (b"content-type", _CONTENT_TYPE),
        (b"user-agent", _USER_AGENT),
        (b"grpc-accept-encoding", ENCODINGS_READ),
    ]
    if timeout_s is not None:
        headers.append((b"grpc-timeout", format_timeout(timeout_s)))
    return headers


async def call_raw(
    channel: Channel,
    path: str,
    request: bytes,
    *,
    timeout_s: float | None,
    metadata: Iterable[Header] = (),
) -> bytes:
    """Call a unary method with an encoded message and answer the encoded reply.

    Raises ``CallError`` for any status but OK, ``UnreachableError`` when no answer came, and
    ``CallError`` DEADLINE_EXCEEDED after ``timeout_s``. Cancelling it cancels the call.
    """
    headers = [*request_headers(channel, path, timeout_s), *metadata]
    try:
        async with asyncio.timeout(timeout_s):
            answer = await exchange(channel, headers, frame_message(request))
    except TimeoutError:
        text = f"{path} at {channel.address} took longer than {timeout_s:g} s"
        raise CallError(StatusCode.DEADLINE_EXCEEDED, text, []) from None
    return _read_answer(channel, path, answer)


def _read_answer(channel: Channel, path: str, answer: Answer) -> bytes:
    where = f"{path} at {channel.address}"
    if answer.error is not None:
        raise answer.error
    if answer.fault is not None:
        if answer.fault.kind in (FaultKind.LOST, FaultKind.REFUSED):
            raise UnreachableError(f"{where}: {answer.fault.text}")
        raise CallError(StatusCode.UNAVAILABLE, f"{where}: {answer.fault.text}", [])
    trailers = answer.trailers or []
    status = read_status(trailers)
    if status.code is None:
        raise CallError(StatusCode.UNKNOWN, f"{where} answered without a grpc-status", trailers)
    if status.code != StatusCode.OK:
        raise CallError(status.code, status.message, trailers)
    if len(answer.messages) != 1:
        text = f"{where} answered {len(answer.messages)} messages instead of one"
        raise CallError(StatusCode.INTERNAL, text, trailers)
    return answer.plain_messages()[0]


async def call_unary(
    channel: Channel,
    path: str,
    request: betterproto2.Message,
    reply_type: type[Reply],
    *,
    timeout_s: float | None,
    metadata: Iterable[Header] = (),
) -> Reply:
    """Call a unary method; see ``call_raw`` for what it raises."""
    reply = await call_raw(channel, path, encode(request), timeout_s=timeout_s, metadata=metadata)
    try:
        return decode(reply_type, reply)
    except NotAMessageError as error:
        text = f"{path} at {channel.address}: the answer is {error}"
        raise CallError(StatusCode.INTERNAL, text, []) from error
