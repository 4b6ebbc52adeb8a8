"""Requests and answers frame by frame, as the wire's tests send them."""

from __future__ import annotations

from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import REQUEST, RawPeer

OK: HeaderList = [(b":status", b"200"), (b"content-type", b"application/grpc")]


def request(
    path: bytes = b"/t.S/Unary", *more: tuple[bytes, bytes], model_id: bytes = b"m"
) -> HeaderList:
    headers = [(b":path", path) if name == b":path" else (name, value) for name, value in REQUEST]
    return [*headers, (b"mm-model-id", model_id), *more]


def begin(peer: RawPeer, headers: HeaderList | None = None, body: bytes = b"q") -> int:
    stream_id = peer.begin(headers or request())
    peer.send(stream_id, frame_message(body), end=True)
    return stream_id


def answer(peer: RawPeer, stream_id: int, body: bytes = b"a") -> None:
    peer.h2.send_headers(stream_id, OK)
    peer.h2.send_data(stream_id, frame_message(body))
    peer.h2.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
    peer.flush()
