"""``mm.testing.Echo``: one method of each kind of call, for tests of what passes through.

Part of the example runtime; proto/mm-testing.proto says what the methods do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import anyio

from mm.errors import StatusCode
from mm.pb.mm.testing import EchoRequest, EchoResponse, Header
from mm.runtime.call import Call, CallError, Handler, parse_request

INITIAL_PREFIX = "echo-initial-"
TRAILING_PREFIX = "echo-trailing-"


def methods(require_model: Callable[[Call], str]) -> dict[str, Handler]:
    """Answer the four methods; ``require_model`` answers the id of a call or raises."""

    async def unary(call: Call) -> None:
        echo = Echo(call, require_model(call))
        request = parse_request(EchoRequest, await call.receive_only())
        await echo.answer(request, [request.payload], count=1)

    async def server_stream(call: Call) -> None:
        echo = Echo(call, require_model(call))
        request = parse_request(EchoRequest, await call.receive_only())
        await echo.answer(request, [request.payload], count=request.reply_count)

    async def client_stream(call: Call) -> None:
        echo = Echo(call, require_model(call))
        payloads: list[bytes] = []
        instructions = EchoRequest()
        async for request in echo.requests():
            payloads.append(request.payload)
            if has_instructions(request):
                instructions = request
        await echo.answer(instructions, payloads, count=1)

    async def bidi_stream(call: Call) -> None:
        echo = Echo(call, require_model(call))
        async for request in echo.requests():
            await echo.answer(request, [request.payload], count=request.reply_count)

    prefix = "/mm.testing.Echo"
    return {
        f"{prefix}/unary": unary,
        f"{prefix}/serverStream": server_stream,
        f"{prefix}/clientStream": client_stream,
        f"{prefix}/bidiStream": bidi_stream,
    }


class Echo:
    """One call: what it received, what it answers."""

    def __init__(self, call: Call, model_id: str) -> None:
        self._call = call
        self._model_id = model_id
        self._timeout_s = call.timeout_s()
        self._request_count = 0
        self._headers = [Header(key=k, value=v) for k, v in call.application_headers()]
        for header in self._headers:
            value = header.value if header.key.endswith("-bin") else header.value.decode("latin-1")
            if header.key.startswith(INITIAL_PREFIX):
                call.initial_metadata.append((header.key, value))
            elif header.key.startswith(TRAILING_PREFIX):
                call.trailing_metadata.append((header.key, value))

    async def requests(self) -> AsyncIterator[EchoRequest]:
        """Yield the client's messages."""
        while (message := await self._call.receive()) is not None:
            self._request_count += 1
            yield parse_request(EchoRequest, message)

    async def answer(self, request: EchoRequest, payloads: list[bytes], *, count: int) -> None:
        """Send ``count`` answers (0 counts as 1), then fail if asked to."""
        count = max(count, 1)
        for _ in range(min(count, request.fail_after) if request.fail_code else count):
            await anyio.sleep(request.reply_delay_ms / 1000)
            await self._call.send(bytes(self._response(request, payloads)))
        if request.fail_code:
            try:
                code = StatusCode(request.fail_code)
            except ValueError as exc:
                text = f"fail_code {request.fail_code}; allowed are 1 to 16"
                raise CallError(StatusCode.INVALID_ARGUMENT, text) from exc
            raise CallError(code, request.fail_message, details=request.fail_details)

    def _response(self, request: EchoRequest, payloads: list[bytes]) -> EchoResponse:
        return EchoResponse(
            model_id=self._model_id,
            model_name=request.model_name,
            payload=bytes(request.reply_bytes) if request.reply_bytes else b"".join(payloads),
            request_count=max(self._request_count, 1),
            headers=self._headers,
            deadline_ms=int((self._timeout_s or 0.0) * 1000),
        )


def has_instructions(request: EchoRequest) -> bool:
    """Answer whether a request of a client stream says how to answer."""
    return any(
        (request.reply_count, request.reply_bytes, request.reply_delay_ms, request.fail_code)
    )
