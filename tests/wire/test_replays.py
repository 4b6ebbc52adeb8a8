"""Requests that the wire gives to tier 2 after an attempt of its own."""

from __future__ import annotations

import pytest
from anyio.lowlevel import checkpoint
from h2.events import RequestReceived

from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import RawPeer, connect, listen
from tests.wire.frames import OK, request
from tests.wire.stand import serve_wire

pytestmark = pytest.mark.anyio


async def test_a_request_that_still_comes_when_the_model_turns_out_lost_is_sent_again_whole() -> (
    None
):
    """Pieces of it can come between the answer and the end of the stream to the runtime."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        while True:
            asked = await peer.wait_for(RequestReceived)
            assert asked.stream_id is not None
            lost = [*OK, (b"grpc-status", b"5"), (b"grpc-message", b"no such model")]
            peer.h2.send_headers(asked.stream_id, lost, end_stream=True)
            peer.flush()

    message = bytes(range(250)) * 200
    framed = frame_message(message)
    async with listen(serve) as (address, _):
        port = int(address.rpartition(":")[2])
        async with serve_wire(runtime_port=port) as stand, connect(stand.port) as client:
            for _ in range(40):
                stream_id = client.begin(request())
                for at in range(0, len(framed), 500):
                    client.h2.send_data(stream_id, framed[at : at + 500])
                    client.flush()
                    # So that they are read one by one, some of them at the worst moment.
                    await checkpoint()
                client.h2.end_stream(stream_id)
                client.flush()
                headers, answered = await client.wait_answer(stream_id)
                assert headers[b"grpc-status"] == b"0", headers
                assert answered == frame_message(b"echo:" + message)
