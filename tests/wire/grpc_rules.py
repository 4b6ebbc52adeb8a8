"""What HTTP/2 asks of header fields, and gRPC of a request: a row a rule.

Sections are those of RFC 9113, or of gRPC over HTTP/2, whose own servers say what it leaves open.
"""

from __future__ import annotations

from typing import Final

from tests.wire.h2_words import (
    GOES,
    MALFORMED,
    MESSAGE,
    PROTOCOL_ERROR,
    REQUEST,
    RESET,
    SERVED,
    Answers,
    Resets,
    Row,
    altered,
    begin,
    body,
    more,
    regular,
    whole,
)

FIELDS: Final = [
    Row("8.2.1", "upper-case name", more((b"X-Upper", b"x")), MALFORMED),
    Row("8.2.1", "name with a blank", more((b"a b", b"x")), MALFORMED),
    Row("8.2.1", "name with a colon", more((b"a:b", b"x")), MALFORMED),
    Row("8.2.1", "name beyond ASCII", more((b"n\xe9", b"x")), MALFORMED),
    Row("8.2.1", "empty name", more((b"", b"x")), MALFORMED),
    Row("8.2.1", "value with NUL", more((b"x", b"a\0b")), MALFORMED),
    Row("8.2.1", "value with CR", more((b"x", b"a\rb")), MALFORMED),
    Row("8.2.1", "value with LF", more((b"x", b"a\nb")), MALFORMED),
    *(
        Row("8.2.2", f"{name.decode()}", more((name, value)), MALFORMED)
        for name, value in (
            (b"connection", b"close"),
            (b"proxy-connection", b"close"),
            (b"keep-alive", b"1"),
            (b"transfer-encoding", b"chunked"),
            (b"upgrade", b"h2c"),
        )
    ),
    Row("8.2.2", "te that is not trailers", whole(regular(b"te", b"gzip")), MALFORMED),
    Row(
        "8.2.2",
        "two te, the first not trailers",
        more((b"te", b"gzip"), (b"te", b"trailers")),
        MALFORMED,
    ),
    Row("8.3", "pseudo-header after others", whole([*REQUEST[1:], REQUEST[0]]), MALFORMED),
    Row("8.3", "unknown pseudo-header", whole([(b":x", b"y"), *REQUEST]), MALFORMED),
    Row("8.3", "pseudo-header of answers", whole([(b":status", b"200"), *REQUEST]), MALFORMED),
    Row(
        "8.3",
        "pseudo-header in trailers",
        (begin() + body(flags=0) + begin([(b":path", b"/x")], 5),),
        Resets(PROTOCOL_ERROR),
    ),
    Row(
        "8.2.1",
        "upper-case name in trailers",
        (begin() + body(flags=0) + begin([(b"X", b"x")], 5),),
        Resets(PROTOCOL_ERROR),
    ),
    Row(
        "8.2.2",
        "connection in trailers",
        (begin() + body(flags=0) + begin([(b"connection", b"x")], 5),),
        Resets(PROTOCOL_ERROR),
    ),
    Row(
        "8.2.2",
        "te in trailers that is not trailers",
        (begin() + body(flags=0) + begin([(b"te", b"gzip")], 5),),
        Resets(PROTOCOL_ERROR),
    ),
    Row("8.1", "trailers", (begin() + body(flags=0) + begin([(b"x", b"y")], 5),), SERVED),
    Row(
        "8.1",
        "second HEADERS that end nothing",
        (begin() + begin([(b"x", b"y")]),),
        Resets(PROTOCOL_ERROR),
    ),
    Row("8.3.1", "no :method", whole(altered(method=None)), MALFORMED),
    Row("8.3.1", "no :scheme", whole(altered(scheme=None)), MALFORMED),
    Row("8.3.1", "no :path", whole(altered(path=None)), MALFORMED),
    Row("8.3.1", "no :authority", whole(altered(authority=None)), SERVED),
    Row("8.2.1", ":authority with CR", whole(altered(authority=b"a\rb")), MALFORMED),
    Row("8.2.1", ":scheme with NUL", whole(altered(scheme=b"ht\0tp")), MALFORMED),
    Row("8.3.1", "empty :path", whole(altered(path=b"")), MALFORMED),
    Row("8.3.1", ":path without a slash", whole(altered(path=b"t.S/Unary")), MALFORMED),
    Row("8.3.1", ":path beyond ASCII", whole(altered(path=b"/t.S/\xff")), MALFORMED),
    Row("8.3.1", ":path with a blank", whole(altered(path=b"/t.S/Unary x")), MALFORMED),
    Row("8.3.1", "two :method", whole([REQUEST[0], *REQUEST]), MALFORMED),
    Row("8.3.1", "two :scheme", whole([REQUEST[1], *REQUEST]), MALFORMED),
    Row("8.3.1", "two :path", whole([REQUEST[2], *REQUEST]), MALFORMED),
    Row("8.3.1", "two :authority", whole([REQUEST[3], *REQUEST]), MALFORMED),
    Row("8.1.1", "content-length of the body", more((b"content-length", b"6")), SERVED),
    Row(
        "8.1.1",
        "content-length above the body",
        more((b"content-length", b"7")),
        Resets(PROTOCOL_ERROR),
    ),
    Row(
        "8.1.1",
        "content-length below the body",
        more((b"content-length", b"5")),
        Resets(PROTOCOL_ERROR),
    ),
    Row("8.1.1", "content-length that is no number", more((b"content-length", b"six")), MALFORMED),
    Row(
        "8.1.1",
        "two content-lengths",
        more((b"content-length", b"6"), (b"content-length", b"7")),
        MALFORMED,
    ),
]

GRPC: Final = [
    Row("5.1", "malformed, and reset at once", (whole(altered(path=None))[0] + RESET,), GOES),
    Row("5.1", "too long, and reset at once", (begin() + body(b"\0\x7f\0\0\0", 0) + RESET,), GOES),
    Row("5.1", "cut off, and reset at once", (begin() + body(MESSAGE[:-1]) + RESET,), GOES),
    Row("gRPC requests", "te is missing", whole(regular(b"te", None)), SERVED),
    Row("gRPC requests", "GET", whole(altered(method=b"GET")), Answers("3", "405")),
    Row(
        "gRPC requests",
        "content-type of JSON",
        whole(regular(b"content-type", b"application/json")),
        Answers("3", "415"),
    ),
    Row(
        "gRPC requests",
        "content-type is missing",
        whole(regular(b"content-type", None)),
        Answers("3", "415"),
    ),
    Row(
        "gRPC requests",
        "content-type that only begins so",
        whole(regular(b"content-type", b"application/grpcx")),
        Answers("3", "415"),
    ),
    Row(
        "gRPC requests",
        "content-type of grpc-web",
        whole(regular(b"content-type", b"application/grpc-web")),
        Answers("3", "415"),
    ),
    Row(
        "gRPC requests",
        "content-type with a message format",
        whole(regular(b"content-type", b"application/grpc+proto")),
        SERVED,
    ),
    Row(
        "gRPC requests",
        "content-type with a parameter",
        whole(regular(b"content-type", b"application/grpc;x=y")),
        SERVED,
    ),
    *(
        Row(
            "gRPC requests", f"grpc-timeout of {value!r}", more((b"grpc-timeout", value)), MALFORMED
        )
        for value in (b"", b"1", b"S", b"123456789S", b"1s", b"-1S", b"1.5S", b" 1S")
    ),
    Row("gRPC requests", "grpc-timeout of nought", more((b"grpc-timeout", b"0n")), Answers("4")),
    Row(
        "gRPC compression",
        "encoding that nobody knows",
        more((b"grpc-encoding", b"zstd9")),
        Answers("13"),
    ),
    Row("gRPC requests", "-bin that is no base64", more((b"x-bin", b"!!!")), Answers("13")),
    Row(
        "gRPC requests",
        "an id in base64 that is none",
        whole([*REQUEST[:-1], (b"mm-model-id-bin", b"!!!")]),
        Answers("3"),
    ),
    *(
        Row(
            "gRPC messages",
            f"a flag of {flag}",
            whole(REQUEST, bytes((flag,)) + MESSAGE[1:]),
            Answers("13"),
        )
        for flag in (2, 255)
    ),
    Row(
        "gRPC messages",
        "compressed without an encoding",
        whole(REQUEST, b"\1" + MESSAGE[1:]),
        Answers("13"),
    ),
    Row(
        "gRPC messages", "longer than allowed", (begin() + body(b"\0\x7f\0\0\0", 0),), Answers("8")
    ),
    Row("gRPC messages", "cut off", whole(REQUEST, MESSAGE[:-1]), Answers("3")),
    Row("gRPC messages", "cut off in its prefix", whole(REQUEST, MESSAGE[:3]), Answers("3")),
]
