"""What HTTP/2 asks of a server that is sent wrong frames, streams and header blocks: a row a rule.

Sections are those of RFC 9113, or of RFC 7541 (HPACK) where a row says so.
"""

from __future__ import annotations

from typing import Final

from tests.wire.h2_talk import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITIZED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    frame,
)
from tests.wire.h2_words import (
    ASKED,
    CALL,
    COMPRESSION_ERROR,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOES,
    HANG,
    MESSAGE,
    PROTOCOL_ERROR,
    REQUEST,
    SAID_ON,
    SERVED,
    STREAM_CLOSED,
    WAIT,
    WRONG,
    WRONG_SIZE,
    Ends,
    Resets,
    Row,
    begin,
    body,
    number,
    setting,
)

HALF_SETTING: Final = b"\0\4\0\0\0"

FRAMES: Final = [
    # --- frames: size, stream, flags, kind
    Row(
        "4.1",
        "reserved bit of a stream",
        (frame(HEADERS, 4, 3 | 1 << 31, block(REQUEST)) + body(),),
        SERVED,
    ),
    Row("4.1", "flags that mean nothing", (begin(flags=0xD2 | END_HEADERS & ~8) + body(),), GOES),
    Row(
        "4.1",
        "a frame of unknown kind",
        (frame(0xBE, 255, 0, b"x" * 99) + frame(0xBE, 0, 3) + CALL,),
        SERVED,
    ),
    Row("4.2", "DATA longer than allowed", (begin() + body(bytes(1 << 17)),), WRONG_SIZE),
    Row(
        "4.2",
        "HEADERS longer than allowed",
        (begin([*REQUEST, (b"x", bytes(1 << 17))]),),
        WRONG_SIZE,
    ),
    Row(
        "4.2",
        "a frame of unknown kind longer than allowed",
        (frame(0xBE, 0, 0, bytes(1 << 17)),),
        WRONG_SIZE,
    ),
    Row(
        "6.3",
        "PRIORITY of four bytes",
        (begin() + frame(PRIORITY, 0, 3, bytes(4)),),
        Resets(FRAME_SIZE_ERROR),
        wire=WRONG_SIZE,
        python=WRONG_SIZE,
    ),
    Row(
        "6.4",
        "RST_STREAM of three bytes",
        (begin() + frame(RST_STREAM, 0, 3, bytes(3)),),
        WRONG_SIZE,
    ),
    Row("6.5", "SETTINGS of five bytes", (frame(SETTINGS, 0, 0, HALF_SETTING),), WRONG_SIZE),
    Row(
        "6.5",
        "SETTINGS ACK with payload",
        (frame(SETTINGS, ACK, 0, HALF_SETTING + b"\0"),),
        WRONG_SIZE,
        python=WRONG,
    ),
    Row("6.7", "PING of seven bytes", (frame(PING, 0, 0, bytes(7)),), WRONG_SIZE),
    Row("6.8", "GOAWAY of seven bytes", (frame(GOAWAY, 0, 0, bytes(7)),), WRONG_SIZE),
    Row(
        "6.9",
        "WINDOW_UPDATE of three bytes",
        (begin() + frame(WINDOW_UPDATE, 0, 3, bytes(3)),),
        WRONG_SIZE,
    ),
    Row(
        "6.9",
        "reserved bit of an increment",
        (begin() + frame(WINDOW_UPDATE, 0, 3, number(1 | 1 << 31)) + body(),),
        SERVED,
        python=WRONG,
    ),
    Row("6.1", "DATA on stream 0", (frame(DATA, 0, 0, b"x"),), WRONG),
    Row("6.2", "HEADERS on stream 0", (frame(HEADERS, 5, 0, block(REQUEST)),), WRONG),
    Row("6.3", "PRIORITY on stream 0", (frame(PRIORITY, 0, 0, bytes(5)),), WRONG),
    Row("6.4", "RST_STREAM on stream 0", (frame(RST_STREAM, 0, 0, bytes(4)),), WRONG),
    Row("6.5", "SETTINGS on a stream", (frame(SETTINGS, 0, 1),), WRONG),
    Row("6.7", "PING on a stream", (frame(PING, 0, 1, bytes(8)),), WRONG),
    Row("6.8", "GOAWAY on a stream", (frame(GOAWAY, 0, 1, bytes(8)),), WRONG),
    Row("6.10", "CONTINUATION on stream 0", (frame(CONTINUATION, 4, 0, b""),), WRONG),
    Row(
        "6.1",
        "DATA with padding",
        (begin() + frame(DATA, PADDED | END_STREAM, 3, b"\5" + MESSAGE + bytes(5)),),
        SERVED,
    ),
    Row("6.1", "DATA that is padding", (begin() + frame(DATA, PADDED, 3, b"\0") + body(),), SERVED),
    Row(
        "6.1",
        "DATA padded beyond its end",
        (begin() + frame(DATA, PADDED, 3, b"\7" + MESSAGE),),
        WRONG,
    ),
    Row(
        "6.1",
        "padded DATA without a length",
        (begin() + frame(DATA, PADDED, 3),),
        WRONG_SIZE,
        wire=WRONG,
    ),
    Row(
        "6.2",
        "HEADERS with padding",
        (frame(HEADERS, PADDED | 4, 3, b"\3" + block(REQUEST) + bytes(3)) + body(),),
        SERVED,
    ),
    Row(
        "6.2",
        "HEADERS padded beyond their end",
        (frame(HEADERS, PADDED | 4, 3, b"\xff" + block(REQUEST)[:9]),),
        WRONG,
    ),
    Row(
        "6.2",
        "HEADERS with a priority",
        (frame(HEADERS, PRIORITIZED | 4, 3, bytes(5) + block(REQUEST)) + body(),),
        SERVED,
    ),
    Row(
        "6.2",
        "HEADERS shorter than their priority",
        (frame(HEADERS, PRIORITIZED | 4, 3, bytes(4)),),
        WRONG_SIZE,
    ),
    Row(
        "5.3.2",
        "PRIORITY of a stream on itself",
        (frame(PRIORITY, 0, 3, number(3) + b"\1") + CALL,),
        SERVED,
        wire=WRONG,
    ),
    Row(
        "5.3.2",
        "HEADERS that depend on themselves",
        (frame(HEADERS, PRIORITIZED | 4, 3, number(3) + b"\1" + block(REQUEST)) + body(),),
        SERVED,
        wire=WRONG,
    ),
    Row("6.5", "an unknown setting", (setting(0xBEEF, 7) + CALL,), SERVED),
    Row("6.5.2", "ENABLE_PUSH of 2", (setting(2, 2),), WRONG),
    Row("6.5.2", "INITIAL_WINDOW_SIZE of 2^31", (setting(4, 1 << 31),), Ends(FLOW_CONTROL_ERROR)),
    Row("6.5.2", "MAX_FRAME_SIZE of 16383", (setting(5, 16383),), WRONG),
    Row("6.5.2", "MAX_FRAME_SIZE of 2^24", (setting(5, 1 << 24),), WRONG),
    Row("6.7", "PING ACK that answers nothing", (frame(PING, ACK, 0, bytes(8)) + CALL,), SERVED),
    Row("6.8", "GOAWAY", (CALL + frame(GOAWAY, 0, 0, bytes(8)),), SERVED),
    # --- windows
    Row(
        "6.9",
        "increment of 0 on a stream",
        (begin() + frame(WINDOW_UPDATE, 0, 3, number(0)),),
        Resets(PROTOCOL_ERROR),
        wire=WRONG,
        python=WRONG,
    ),
    Row("6.9", "increment of 0 on the connection", (frame(WINDOW_UPDATE, 0, 0, number(0)),), WRONG),
    Row(
        "6.9.1",
        "a stream's window above 2^31-1",
        (begin() + frame(WINDOW_UPDATE, 0, 3, number(2**31 - 1)),),
        Resets(FLOW_CONTROL_ERROR),
    ),
    Row(
        "6.9.1",
        "the connection's window above 2^31-1",
        (frame(WINDOW_UPDATE, 0, 0, number(2**31 - 1)),),
        Ends(FLOW_CONTROL_ERROR),
    ),
    Row(
        "6.9.2",
        "streams' windows above 2^31-1 by SETTINGS",
        (begin() + frame(WINDOW_UPDATE, 0, 3, number(2**30)) + setting(4, 2**31 - 1),),
        Ends(FLOW_CONTROL_ERROR),
        wire=Resets(FLOW_CONTROL_ERROR),
    ),
    # --- streams
    Row("5.1", "DATA on an idle stream", (frame(DATA, 0, 3, b"x"),), WRONG),
    Row("5.1", "RST_STREAM on an idle stream", (frame(RST_STREAM, 0, 3, number(8)),), WRONG),
    Row("5.1", "WINDOW_UPDATE on an idle stream", (frame(WINDOW_UPDATE, 0, 3, number(8)),), WRONG),
    Row("5.1", "PRIORITY on an idle stream", (frame(PRIORITY, 0, 9, bytes(5)) + CALL,), SERVED),
    Row(
        "5.1",
        "DATA on a half-closed stream",
        (ASKED + body(),),
        Resets(STREAM_CLOSED),
        wire=Ends(STREAM_CLOSED),
    ),
    Row(
        "5.1",
        "HEADERS on a half-closed stream",
        (ASKED + begin(),),
        Resets(STREAM_CLOSED),
        wire=Ends(STREAM_CLOSED),
    ),
    Row(
        "5.1",
        "WINDOW_UPDATE on a half-closed stream",
        (CALL[:-15] + body() + frame(WINDOW_UPDATE, 0, 3, number(8)),),
        SERVED,
    ),
    Row(
        "5.1",
        "DATA on a stream that the client reset",
        (ASKED + frame(RST_STREAM, 0, 3, number(8)) + body(),),
        GOES,
    ),
    Row(
        "5.1",
        "HEADERS on a stream that the client reset",
        (ASKED + frame(RST_STREAM, 0, 3, number(8)) + begin(),),
        GOES,
    ),
    Row("5.1", "DATA on a closed stream", (CALL, WAIT, body()), GOES),
    Row("5.1", "HEADERS on a closed stream", (CALL, WAIT, begin()), GOES),
    Row(
        "5.1",
        "WINDOW_UPDATE on a closed stream",
        (CALL, WAIT, frame(WINDOW_UPDATE, 0, 3, number(8))),
        GOES,
    ),
    Row(
        "5.1",
        "RST_STREAM on a closed stream",
        (CALL, WAIT, frame(RST_STREAM, 0, 3, number(8))),
        GOES,
    ),
    Row("5.1", "RST_STREAM twice", (ASKED + 2 * frame(RST_STREAM, 0, 3, number(8)),), GOES),
    Row("5.1.1", "HEADERS on an even stream", (begin(stream_id=4),), WRONG),
    Row(
        "5.1.1",
        "HEADERS on a stream that was passed over",
        (begin(HANG, stream_id=7) + CALL,),
        WRONG,
        wire=GOES,
        python=GOES,
    ),
    Row(
        "8.4",
        "PUSH_PROMISE of a client",
        (frame(PUSH_PROMISE, 4, 1, number(2) + block(REQUEST)),),
        WRONG,
    ),
    Row("4.3", "DATA among HEADERS", (begin(flags=0) + body(),), WRONG),
    Row("4.3", "other HEADERS among HEADERS", (begin(flags=0) + begin(stream_id=5),), WRONG),
    Row(
        "5.5", "a frame of unknown kind among HEADERS", (begin(flags=0) + frame(0xBE, 0, 3),), WRONG
    ),
    Row(
        "6.10",
        "CONTINUATION of another stream",
        (begin(flags=0) + frame(CONTINUATION, 4, 5, b""),),
        WRONG,
    ),
    Row("6.10", "CONTINUATION without HEADERS", (begin() + frame(CONTINUATION, 4, 3, b""),), WRONG),
    Row(
        "6.10",
        "HEADERS in pieces",
        (
            frame(HEADERS, 0, 3, block(REQUEST)[:20])
            + frame(CONTINUATION, 0, 3)
            + frame(CONTINUATION, 4, 3, block(REQUEST)[20:])
            + body(),
        ),
        SERVED,
    ),
]


def coded(bytes_: bytes) -> tuple[bytes]:
    """A request whose header block goes on like this."""
    return (frame(HEADERS, END_HEADERS | END_STREAM, SAID_ON, block(REQUEST) + bytes_),)


SPOILT: Final = Ends(COMPRESSION_ERROR)
BLOCKS: Final = [
    Row("RFC 7541 2.3.3", "index beyond both tables", coded(b"\xff\x80\x01"), SPOILT),
    Row("RFC 7541 6.1", "index 0", coded(b"\x80"), SPOILT),
    Row("RFC 7541 6.2", "name by an index beyond both tables", coded(b"\x7f\x80\x01\1a"), SPOILT),
    Row("RFC 7541 4.2", "size update within a block", coded(b"\x20"), SPOILT),
    Row(
        "RFC 7541 6.3",
        "size update above the setting",
        (frame(HEADERS, 5, 3, b"\x3f\xff\xff\x7f" + block(REQUEST)),),
        SPOILT,
    ),
    Row("RFC 7541 5.1", "integer without an end", coded(b"\xff" + b"\xff" * 12), SPOILT),
    Row("RFC 7541 5.2", "string longer than its block", coded(b"\0\5abc"), SPOILT),
    Row("RFC 7541 5.2", "block that ends in a field", coded(b"\0\1a"), SPOILT),
    Row("RFC 7541 5.2", "Huffman code padded with noughts", coded(b"\0\1a\x81\x18"), SPOILT),
    Row(
        "RFC 7541 5.2",
        "Huffman code with eight bits of padding",
        coded(b"\0\1a\x82\x1f\xff\xff"[:-1]),
        SPOILT,
    ),
    Row("RFC 7541 5.2", "Huffman code with EOS", coded(b"\0\1a\x84\xff\xff\xff\xff"), SPOILT),
    Row(
        "RFC 7541 4.3",
        "size update at the beginning",
        (frame(HEADERS, 4, 3, b"\x20" + block(REQUEST)) + body(),),
        SERVED,
    ),
]
