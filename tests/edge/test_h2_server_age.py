"""Clients of the Python data plane whose connections are old."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer
from mm.edge.h2.incoming import IncomingCall
from mm.errors import StatusCode
from tests.edge.raw_h2 import REQUEST, connect

pytestmark = pytest.mark.anyio


async def _answer(call: IncomingCall) -> None:
    call.send_status(StatusCode.OK, "")


async def test_old_connections_end() -> None:
    limits = replace(EXTERNAL_LIMITS, age_s=1)
    server = GrpcServer(_answer, limits=limits, external=True)
    port = await server.start("127.0.0.1", 0)
    try:
        async with connect(port) as client:
            headers, _ = await client.wait_answer(client.begin(REQUEST, end=True))
            assert headers[b"grpc-status"] == b"0"
            last = await client.wait_closed()
            assert last is not None
            assert (last.error_code, last.last_stream_id) == (0, 1)
    finally:
        await server.stop(0)
