"""A runtime, or another instance, that may answer in any way: what it says is spoilt by a seed.

Threads and blocking sockets, as in ``h2_talk.py``.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field

from tests.wire.fuzz.mutations import answer, mutated, on_stream
from tests.wire.h2_talk import (
    ACK,
    DATA,
    END_STREAM,
    GOAWAY,
    PING,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)

_HELLO = frame(SETTINGS, 0, 0) + frame(WINDOW_UPDATE, 0, 0, b"\x3f\0\0\0")
#: What else it may do in place of an answer.
_ENDS = (
    b"",
    frame(GOAWAY, 0, 0, bytes(8)),
    frame(GOAWAY, 0, 0, b"\x7f\xff\xff\xff\0\0\0\2"),
    frame(SETTINGS, 0, 0, b"\0\3\0\0\0\0"),
    frame(SETTINGS, 0, 0, b"\0\4\0\0\0\0"),
)


@dataclass
class Upstream:
    """Echoes calls. With a ``seed`` most of its answers are wrong, each in its own way."""

    listener: socket.socket
    seed: int | None = None
    answered: int = 0
    spoilt: int = 0
    _socks: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def accept(self) -> None:
        """Serve connections until the listener is closed."""
        with suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self._socks = [each for each in self._socks if each.fileno() != -1]
                self._threads = [each for each in self._threads if each.is_alive()]
                self._socks.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def stop(self) -> None:
        """End what is left."""
        self.listener.shutdown(socket.SHUT_RDWR)
        for sock in self._socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bodies: dict[int, bytes] = {}
        received = b""
        with closing(sock), suppress(OSError):
            sock.sendall(_HELLO)
            while data := sock.recv(65536):
                received += data
                if received.startswith(b"PRI"):
                    if len(received) < 24:
                        continue
                    received = received[24:]
                while len(received) >= 9:
                    end = 9 + int.from_bytes(received[:3], "big")
                    if len(received) < end:
                        break
                    whole, received = received[:end], received[end:]
                    sock.sendall(self._reply(whole, bodies))

    def _reply(self, whole: bytes, bodies: dict[int, bytes]) -> bytes:
        kind, flags, body = whole[3], whole[4], whole[9:]
        stream_id = int.from_bytes(whole[5:9], "big")
        said = b""
        if kind in (SETTINGS, PING) and not flags & ACK:
            return frame(kind, ACK, 0, body if kind == PING else b"")
        if kind == RST_STREAM:
            bodies.pop(stream_id, None)
        elif kind == DATA:
            bodies[stream_id] = bodies.get(stream_id, b"") + body
            if body:
                grant = len(body).to_bytes(4, "big")
                said = frame(WINDOW_UPDATE, 0, 0, grant) + frame(WINDOW_UPDATE, 0, stream_id, grant)
        if kind == DATA and flags & END_STREAM:
            said += self._answer(stream_id, bodies.pop(stream_id)[5:])
        return said

    def _answer(self, stream_id: int, message: bytes) -> bytes:
        pieces = on_stream(answer(b"echo:" + message), stream_id)
        self.answered += 1
        if self.seed is None:
            return b"".join(pieces)
        # By the call and not by the turn, which the machine decides.
        chance = random.Random(f"{self.seed} {message!r}")
        if chance.random() < 0.1:
            return b"".join(pieces)
        self.spoilt += 1
        pieces = mutated(pieces, [*pieces, *on_stream(pieces, stream_id + 2)], chance)
        return b"".join(pieces) + chance.choice(_ENDS)


@contextmanager
def serve_upstream(seed: int | None = None) -> Iterator[Upstream]:
    """An upstream that serves, and right answers only without a seed."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as listener:
        upstream = Upstream(listener, seed)
        acceptor = threading.Thread(target=upstream.accept)
        acceptor.start()
        try:
            yield upstream
        finally:
            upstream.stop()
            acceptor.join()
