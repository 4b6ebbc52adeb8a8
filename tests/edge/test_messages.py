"""Message framing piece by piece, its limits, and injection into pieces."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.core.protobuf_ids import MalformedMessageError, injection_suffix
from mm.edge.h2.injection import Injector
from mm.edge.h2.messages import (
    MessageMeter,
    MessageSplitter,
    MessageTooLargeError,
    decompress,
    frame_message,
)
from mm.errors import InvalidRequestError, MethodRefusedError, StatusCode

_messages = st.lists(st.tuples(st.booleans(), st.binary(max_size=40)), max_size=6)


#: Without a time in it: names of tests are made of it.
WHOLE = gzip.compress(b"x" * 100, mtime=0)


def _pieces(data: bytes, step: int) -> list[bytes]:
    return [data[at : at + step] for at in range(0, len(data), step)]


def _framed(messages: list[tuple[bool, bytes]]) -> bytes:
    return b"".join(frame_message(content, flag) for flag, content in messages)


@given(_messages, st.integers(1, 60))
def test_meter_and_splitter_agree_however_the_bytes_arrive(
    messages: list[tuple[bool, bytes]], step: int
) -> None:
    meter, splitter = MessageMeter("request", 40), MessageSplitter("request", 40)
    found: list[tuple[bool, bytes]] = []
    for piece in _pieces(_framed(messages), step):
        meter.feed(piece)
        found += splitter.feed(piece)
        assert meter.at_boundary == splitter.at_boundary
    assert found == messages
    assert meter.count == len(messages)
    assert meter.any_compressed == any(flag for flag, _ in messages)
    assert meter.at_boundary


@pytest.mark.parametrize("step", [1, 3, 100])
def test_the_limit_is_held_against_the_prefix(step: int) -> None:
    data = frame_message(b"x" * 10) + b"\0\0\0\0\x0b"
    for reader in (MessageMeter("request", 10), MessageSplitter("request", 10)):
        with pytest.raises(MessageTooLargeError, match="request message of 11 bytes") as caught:
            _feed_all(reader, _pieces(data, step))
        assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED


def _feed_all(reader: MessageMeter | MessageSplitter, pieces: list[bytes]) -> None:
    for piece in pieces:
        list(reader.feed(piece) or ())


@given(st.binary(max_size=500))
def test_compression_is_undone(content: bytes) -> None:
    assert decompress(gzip.compress(content), b"gzip", 500) == content
    assert decompress(zlib.compress(content), b"deflate", 500) == content


def test_a_bomb_is_stopped_at_the_limit() -> None:
    bomb = gzip.compress(bytes(50 * 2**20))
    with pytest.raises(MessageTooLargeError, match="decompressed"):
        decompress(bomb, b"gzip", 1000)


@pytest.mark.parametrize(
    "broken",
    [b"", b"nonsense", WHOLE[:-5], WHOLE + b"more"],
)
def test_broken_compression(broken: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="compressed message cannot be read"):
        decompress(broken, b"gzip", 1000)


@pytest.mark.parametrize("encoding", [b"", b"snappy", b"zstd"])
def test_other_encodings_cannot_be_read(encoding: bytes) -> None:
    with pytest.raises(MethodRefusedError, match="use gzip or deflate"):
        decompress(b"x", encoding, 1000)


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=30)), max_size=4), st.integers(1, 40))
def test_the_id_is_appended_to_every_message_however_the_bytes_arrive(
    parts: list[tuple[bool, bytes]], step: int
) -> None:
    messages = [(flag, b"\x12" + bytes([len(part)]) + part) for flag, part in parts]
    sent = b"".join(
        frame_message(gzip.compress(message), True) if flag else frame_message(message)
        for flag, message in messages
    )
    suffix = injection_suffix([1], "model")
    injector = Injector(suffix, b"gzip", 1000)
    got = b"".join(injector.feed(piece) for piece in _pieces(sent, step))
    assert got == b"".join(frame_message(message + suffix) for _, message in messages)


@given(st.integers(1, 9))
def test_the_end_of_a_malformed_message_is_never_passed_on(step: int) -> None:
    suffix = injection_suffix([1], "model")
    evil = frame_message(b"\x0a\x04evil\x12" + bytes([len(suffix)]))
    injector = Injector(suffix, b"", 1000)
    got: list[bytes] = []
    with pytest.raises(MalformedMessageError):
        got.extend(injector.feed(piece) for piece in _pieces(evil, step))
    assert len(b"".join(got)) < len(evil) + len(suffix)


def test_a_compressed_message_of_an_unknown_encoding_is_not_injected() -> None:
    with pytest.raises(MethodRefusedError):
        Injector(b"x", b"snappy", 1000).feed(frame_message(b"abc", compressed=True))
