"""A connection of HTTP/2 byte by byte, with nothing between the test and its frames.

``tests/edge/raw_h2.py`` leaves framing to h2, which knows the rules that are broken here. Blocking
sockets: what is served stands in a thread of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from hpack import Decoder

#: Ends what hangs; no test asserts how fast anything is by it.
PATIENCE_S: Final = 60.0
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
(DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE) = range(6)
(PING, GOAWAY, WINDOW_UPDATE, CONTINUATION) = range(6, 10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 1, 1, 4, 8, 32

Headers = Sequence[tuple[bytes, bytes]]


def frame(kind: int, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    """Lay out one frame, whatever it says."""
    head = len(body).to_bytes(3, "big") + bytes((kind, flags))
    return head + stream_id.to_bytes(4, "big") + body


def text(value: bytes) -> bytes:
    """Lay out a string of HPACK, not compressed."""
    length = len(value)
    if length < 127:
        return bytes((length,)) + value
    rest, digits = length - 127, bytearray((127,))
    while rest >= 128:
        digits.append(rest % 128 + 128)
        rest //= 128
    return bytes(digits) + bytes((rest,)) + value


def block(headers: Headers) -> bytes:
    """Lay out a header block that no table has a part in."""
    return b"".join(b"\0" + text(name) + text(value) for name, value in headers)


@dataclass
class Answer:
    """What came on one stream."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    has_ended: bool = False
    reset: int | None = None


@dataclass
class Talk:
    """One connection, and all that was received on it."""

    sock: socket.socket
    decoder: Decoder = field(default_factory=Decoder)
    received: bytes = b""
    answers: dict[int, Answer] = field(default_factory=dict)
    #: Of GOAWAY: code and last stream.
    goaway: tuple[int, int] | None = None
    pongs: list[bytes] = field(default_factory=list)
    acknowledged: int = 0
    is_closed: bool = False
    #: By TCP: it was closed before all was read that was sent, and last words may be lost.
    is_broken: bool = False
    _block: bytes = b""

    def send(self, data: bytes) -> None:
        """Send as it is; who has closed already is found out by reading."""
        try:
            self.sock.sendall(data)
        except ConnectionError:
            self.is_broken = True

    def answer(self, stream_id: int) -> Answer:
        return self.answers.setdefault(stream_id, Answer())

    def read(self) -> bool:
        """Take what comes next; False at the end of the connection."""
        try:
            data = self.sock.recv(65536)
        except ConnectionError:
            self.is_broken = True
            data = b""
        self.is_closed = not data
        self.received += data
        while len(self.received) >= 9:
            end = 9 + int.from_bytes(self.received[:3], "big")
            if len(self.received) < end:
                break
            kind, flags = self.received[3:5]
            stream_id = int.from_bytes(self.received[5:9], "big")
            body, self.received = self.received[9:end], self.received[end:]
            self._take(kind, flags, stream_id, body)
        return not self.is_closed

    def wait_end(self, stream_id: int) -> Answer:
        """Read until a stream has its answer, or was reset."""
        answer = self.answer(stream_id)
        while not answer.has_ended and answer.reset is None:
            assert self.read(), f"closed before stream {stream_id} ended: {self}"
        return answer

    def wait_closed(self) -> None:
        while not self.is_closed:
            self.read()

    def ping(self, data: bytes) -> None:
        """Have all that was sent before looked at."""
        self.send(frame(PING, 0, 0, data))
        while data not in self.pongs:
            assert self.read(), f"closed before a ping was answered: {self}"

    def _take(self, kind: int, flags: int, stream_id: int, body: bytes) -> None:
        if kind in (HEADERS, CONTINUATION):
            self._block += body
            if flags & END_HEADERS:
                fields = self.decoder.decode(self._block, raw=True)
                self.answer(stream_id).headers.update(fields)  # type: ignore[arg-type]
                self._block = b""
        elif kind == DATA:
            self.answer(stream_id).body += body
        elif kind == RST_STREAM:
            self.answer(stream_id).reset = int.from_bytes(body, "big")
        elif kind == GOAWAY:
            self.goaway = int.from_bytes(body[4:8], "big"), int.from_bytes(body[:4], "big")
        elif kind == PING and flags & ACK:
            self.pongs.append(body)
        elif kind == SETTINGS:
            if flags & ACK:
                self.acknowledged += 1
            else:
                self.send(frame(SETTINGS, ACK, 0))
        if kind in (DATA, HEADERS) and flags & END_STREAM:
            self.answer(stream_id).has_ended = True


def talk(port: int, greeting: bytes = PREFACE + frame(SETTINGS, 0, 0)) -> Talk:
    """Connect, and say what begins a connection."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    conversation = Talk(sock)
    conversation.send(greeting)
    return conversation
