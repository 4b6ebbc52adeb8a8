"""``mm.testing.Echo``: one method of each kind of call, for tests of what passes through.

Part of the example runtime; proto/mm-testing.proto says what the methods do.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio

from mm.core.headers import HeaderList
from mm.edge.h2 import IncomingCall
from mm.edge.unary import MessageStream, parse_message
from mm.errors import InvalidRequestError, StatusCode
from mm.pb.mm.testing import EchoRequest, EchoResponse, Header
from mm.runtime.call import CallError, Methods

INITIAL_PREFIX = b"echo-initial-"
TRAILING_PREFIX = b"echo-trailing-"

#: Set by HTTP/2 or by gRPC itself: no metadata of the application.
_RESERVED = (b":", b"grpc-")
_RESERVED_NAMES = (b"content-type", b"user-agent", b"te")


def add_methods(methods: Methods, require_model: Callable[[IncomingCall], str]) -> None:
    """Serve the four methods; ``require_model`` answers the id of a call or raises."""

    def add(name: str, serve_echo: Callable[[Echo], Awaitable[None]]) -> None:
        async def serve(call: IncomingCall) -> None:
            echo = Echo(call, require_model(call))
            await serve_echo(echo)
            call.send_status(StatusCode.OK, extra=echo.trailers)

        methods.add(f"/mm.testing.Echo/{name}", serve)

    add("unary", _unary)
    add("serverStream", _server_stream)
    add("clientStream", _client_stream)
    add("bidiStream", _bidi_stream)


async def _unary(echo: Echo) -> None:
    request = await echo.only_request()
    await echo.answer(request, [request.payload], count=1)


async def _server_stream(echo: Echo) -> None:
    request = await echo.only_request()
    await echo.answer(request, [request.payload], count=request.reply_count)


async def _client_stream(echo: Echo) -> None:
    payloads: list[bytes] = []
    instructions = EchoRequest()
    async for request in echo.requests():
        payloads.append(request.payload)
        if has_instructions(request):
            instructions = request
    await echo.answer(instructions, payloads, count=1)


async def _bidi_stream(echo: Echo) -> None:
    async for request in echo.requests():
        await echo.answer(request, [request.payload], count=request.reply_count)


class Echo:
    """One call: what it received, what it answers."""

    def __init__(self, call: IncomingCall, model_id: str) -> None:
        self._call = call
        self._stream = MessageStream(call)
        self._model_id = model_id
        self._request_count = 0
        self._headers = application_headers(call.headers)
        call.initial_headers += [h for h in call.headers if h[0].startswith(INITIAL_PREFIX)]
        #: To be sent with the status.
        self.trailers = [h for h in call.headers if h[0].startswith(TRAILING_PREFIX)]

    async def only_request(self) -> EchoRequest:
        """Answer the client's message if it is to send just one."""
        return parse_message(EchoRequest, await self._stream.read_only())

    async def requests(self) -> AsyncIterator[EchoRequest]:
        """Yield the client's messages, until the call is answered."""
        while not self._call.status_sent and (message := await self._stream.read()) is not None:
            self._request_count += 1
            yield parse_message(EchoRequest, message)

    async def answer(self, request: EchoRequest, payloads: list[bytes], *, count: int) -> None:
        """Send ``count`` answers (0 counts as 1), then fail if asked to."""
        count = max(count, 1)
        for _ in range(min(count, request.fail_after) if request.fail_code else count):
            await anyio.sleep(request.reply_delay_ms / 1000)
            await self._stream.send(bytes(self._response(request, payloads)))
        if request.fail_code:
            try:
                code = StatusCode(request.fail_code)
            except ValueError as exc:
                text = f"fail_code {request.fail_code}; allowed are 1 to 16"
                raise CallError(StatusCode.INVALID_ARGUMENT, text) from exc
            error = CallError(code, request.fail_message, details=request.fail_details)
            self._call.send_status(code, error.message, [*error.trailers(), *self.trailers])

    def _response(self, request: EchoRequest, payloads: list[bytes]) -> EchoResponse:
        return EchoResponse(
            model_id=self._model_id,
            model_name=request.model_name,
            payload=bytes(request.reply_bytes) if request.reply_bytes else b"".join(payloads),
            request_count=max(self._request_count, 1),
            headers=self._headers,
            deadline_ms=int((self._call.head.timeout_s or 0.0) * 1000),
        )


def application_headers(headers: HeaderList) -> list[Header]:
    """Answer the client's metadata in order, values of ``-bin`` keys decoded."""
    return [
        Header(key=key.decode("latin-1"), value=decode_value(key, value))
        for key, value in headers
        if not key.startswith(_RESERVED) and key not in _RESERVED_NAMES
    ]


def decode_value(key: bytes, value: bytes) -> bytes:
    """Answer a header's value; ``-bin`` ones travel in base64, padded or not."""
    if not key.endswith(b"-bin"):
        return value
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as exc:
        raise InvalidRequestError(f"{key.decode('latin-1')} is not base64") from exc


def has_instructions(request: EchoRequest) -> bool:
    """Answer whether a request of a client stream says how to answer."""
    return any(
        (request.reply_count, request.reply_bytes, request.reply_delay_ms, request.fail_code)
    )
