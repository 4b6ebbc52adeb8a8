"""Clients that attack: plain sockets and bytes laid out by hand, beside one that behaves."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from typing import Any

from hpack import Encoder

from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import PATIENCE_S
from tests.wire.frames import request
from tests.wire.stand import WireStand

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0, 1, 2, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
END_STREAM, ACK, END_HEADERS = 1, 1, 4
ENHANCE_YOUR_CALM = 11
#: Written at once.
_CHUNK_BYTES = 65536


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream_id: int = 0) -> bytes:
    """Lay out a frame, right or wrong."""
    return (
        struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload
    )


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS)
#: After the preface: windows without end.
WINDOWS = frame(SETTINGS, b"\0\4\x7f\xff\xff\xff") + frame(WINDOW_UPDATE, b"\x7f\xff\0\0")


class Requests:
    """Lays out requests, one stream after the other."""

    def __init__(self, headers: HeaderList | None = None) -> None:
        self._headers = headers or request()
        self._encoder = Encoder()
        self._blocks: list[bytes] = []
        self.stream_id = -1

    def next(self, headers: HeaderList | None = None, *, flags: int = END_HEADERS) -> bytes:
        self.stream_id += 2
        block = self._block() if headers is None else self._encoder.encode(headers)
        return frame(HEADERS, block, flags=flags, stream_id=self.stream_id)

    def _block(self) -> bytes:
        """From the second time on a request is all references, always the same."""
        if len(self._blocks) < 2:
            self._blocks.append(self._encoder.encode(self._headers))
        return self._blocks[-1]


@dataclass
class End:
    """How an attack ended."""

    #: Of the GOAWAY; None: there was none.
    code: int | None
    sent_bytes: int
    received: bytes

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Answer kind, stream and payload of what was received."""
        at = 0
        while at + 9 <= len(self.received):
            length = int.from_bytes(self.received[at : at + 3], "big")
            kind, stream_id = self.received[at + 3], self.received[at + 5 : at + 9]
            yield kind, int.from_bytes(stream_id, "big"), self.received[at + 9 : at + 9 + length]
            at += 9 + length


def dial(port: int, *, receives_bytes: int = 0) -> socket.socket:
    """Connect; ``receives_bytes`` bounds what the kernel takes for one who does not read."""
    caller = socket.socket()
    if receives_bytes:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives_bytes)
    caller.settimeout(PATIENCE_S)
    caller.connect(("127.0.0.1", port))
    return caller


def ask_large(stand: WireStand) -> socket.socket:
    """Ask on stream 1 for an answer that no socket holds, with windows for all of it."""

    async def large(_request: bytes, _context: Any) -> bytes:
        return bytes(2**23)

    stand.runtime.scripts["Large"] = large
    caller = dial(stand.port, receives_bytes=4096)
    caller.sendall(PREFACE + WINDOWS + Requests(request(b"/t.S/Large")).next())
    caller.sendall(frame(DATA, frame_message(b"q"), flags=END_STREAM, stream_id=1))
    return caller


def attack(
    caller: socket.socket, pieces: Iterator[bytes], *, reads: bool = True, bytes_max: int = 2**26
) -> End:
    """Send until one is cut off, or everything is sent; then read to the end."""
    sent, received, chunk = 0, bytearray(), b""
    with suppress(ConnectionError):
        for piece in pieces:
            chunk += piece
            if len(chunk) >= _CHUNK_BYTES:
                caller.sendall(chunk)
                sent += len(chunk)
                chunk = b""
                if reads:
                    _read_what_is_there(caller, received)
            if sent > bytes_max:
                raise AssertionError(f"{sent} bytes, and nobody minds")
        caller.sendall(chunk)
        sent += len(chunk)
    # What came before the end can be read after it.
    with suppress(ConnectionError):
        while data := caller.recv(2**16):
            received += data
    end = End(None, sent, bytes(received))
    for kind, _, payload in end.frames():
        if kind == GOAWAY:
            end.code = int.from_bytes(payload[4:8], "big")
    return end


def _read_what_is_there(caller: socket.socket, into: bytearray) -> None:
    while select.select([caller], [], [], 0)[0]:
        data = caller.recv(2**16)
        if not data:
            return
        into += data


@asynccontextmanager
async def good_client(
    stand: WireStand, *, model_id: str = "m", body: bytes = b""
) -> AsyncIterator[Callable[[], int]]:
    """Somebody who calls all the time, one call after the other, and loses none.

    Yields how many were answered.
    """
    answered = 0

    async def call_on() -> None:
        nonlocal answered
        async with stand.client() as client:
            while True:
                sent = b"%d" % answered + body
                answer = await client.unary_unary("/t.S/Unary")(
                    sent, metadata=(("mm-model-id", model_id),), timeout=PATIENCE_S
                )
                assert answer == b"echo:" + sent
                answered += 1

    async def wait_for(count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while answered < count and not task.done():
                await asyncio.wait((task,), timeout=0.005)

    task = asyncio.create_task(call_on())
    try:
        await wait_for(1)
        yield lambda: answered
        await wait_for(answered + 3)
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def run_attack(
    stand: WireStand, pieces: Iterator[bytes], *, reads: bool = True, receives_bytes: int = 0
) -> End:
    """Attack from a thread, while somebody else calls."""
    async with good_client(stand):
        with closing(dial(stand.port, receives_bytes=receives_bytes)) as caller:
            return await asyncio.to_thread(attack, caller, pieces, reads=reads)
