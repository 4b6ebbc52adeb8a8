"""Header rules as tables: what is malformed, what passes, which id counts."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.core.headers import (
    MESSAGE_BYTES_MAX,
    HeaderList,
    IdKind,
    MalformedHeadersError,
    Status,
    carries_id,
    check_response_headers,
    encode_message,
    format_timeout,
    id_headers,
    is_balanced,
    parse_timeout,
    read_ids,
    read_request_head,
    read_status,
    requires_all,
    says_model_is_lost,
    status_trailers,
    without_mesh_headers,
)
from mm.errors import InvalidRequestError, StatusCode

PSEUDO: HeaderList = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/p.S/M"),
    (b":authority", b"a"),
]
BASE: HeaderList = [*PSEUDO, (b"content-type", b"application/grpc")]


def test_a_head_is_sorted_by_who_it_is_for() -> None:
    custom: HeaderList = [
        (b"authorization", b"Bearer x"),
        (b"x-empty", b""),
        (b"x-twice", b"1"),
        (b"x-twice", b"2"),
        (b"x-latin", "é".encode("latin-1")),
        (b"x-bin", b"not base64!"),
        (b"con", b"kept: only exact names are dropped"),
        (b"user", b"kept"),
    ]
    head = read_request_head(
        [
            *BASE,
            (b"te", b"trailers"),
            (b"user-agent", b"x"),
            (b"grpc-encoding", b"gzip"),
            (b"grpc-accept-encoding", b"gzip,identity"),
            (b"grpc-timeout", b"250m"),
            (b"grpc-trace-bin", b"AAA"),
            *custom,
            (b"mm-model-id", b"m"),
            (b"tas-model-id", b"t"),
        ],
        8192,
    )
    assert head.metadata == custom
    assert head.mesh == [(b"mm-model-id", b"m"), (b"tas-model-id", b"t")]
    assert (head.path, head.encoding, head.accept_encoding) == (
        b"/p.S/M",
        b"gzip",
        b"gzip,identity",
    )
    assert head.timeout_s == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("headers", "http_status"),
    [
        ([*BASE, (b"Upper", b"x")], 400),
        ([*BASE, (b"", b"x")], 400),
        ([*BASE, (b"a b", b"x")], 400),
        ([*BASE, ("é".encode(), b"x")], 400),
        ([*BASE, (b"x", b"a\r\nb: c")], 400),
        ([*BASE, (b"x", b"a\0b")], 400),
        ([*BASE, (b"connection", b"close")], 400),
        ([*BASE, (b"transfer-encoding", b"chunked")], 400),
        ([*BASE, (b":path", b"/late")], 400),
        ([(b":method", b"POST"), *BASE], 400),
        ([*PSEUDO[1:], BASE[-1]], 400),
        ([PSEUDO[0], PSEUDO[1], BASE[-1]], 400),
        ([(b":status", b"100"), *BASE], 400),
        ([(b":method", b"GET"), *BASE[1:]], 405),
        ([*PSEUDO[:2], (b":path", b"nowhere"), BASE[-1]], 400),
        (PSEUDO, 415),
        ([*PSEUDO, (b"content-type", b"text/html")], 415),
        ([(b":authority", b"a\r\nb: c"), *BASE], 400),
        ([PSEUDO[0], (b":scheme", b"ht\0tp"), *BASE[2:]], 400),
        ([*BASE, (b"te", b"gzip"), (b"te", b"trailers")], 400),
        ([*BASE, (b"grpc-timeout", b"x"), (b"grpc-timeout", b"1S")], 400),
        ([*BASE, (b"grpc-timeout", b"1")], 400),
        ([*BASE, (b"grpc-timeout", b"-1S")], 400),
        ([*BASE, (b"grpc-timeout", b"123456789S")], 400),
    ],
)
def test_malformed_heads(headers: HeaderList, http_status: int) -> None:
    with pytest.raises(MalformedHeadersError) as caught:
        read_request_head(headers, 8192)
    assert caught.value.http_status == http_status
    assert caught.value.code == StatusCode.INVALID_ARGUMENT


def test_too_many_headers_name_the_limit() -> None:
    size = sum(len(name) + len(value) + 32 for name, value in BASE)
    read_request_head(BASE, size)
    with pytest.raises(MalformedHeadersError, match=f"limit of {size - 1} bytes") as caught:
        read_request_head(BASE, size - 1)
    assert caught.value.code == StatusCode.RESOURCE_EXHAUSTED


def test_only_the_wire_has_words_that_do_not_count() -> None:
    size = sum(len(name) + len(value) + 32 for name, value in BASE)
    said = [*BASE, (b"mm-wire-x", b"y" * 100)]
    read_request_head(said, size, is_wire=True)
    with pytest.raises(MalformedHeadersError, match=f"limit of {size} bytes"):
        read_request_head(said, size)


@pytest.mark.parametrize("subtype", [b"application/grpc+json", b"application/grpc+anything"])
def test_every_content_subtype_passes(subtype: bytes) -> None:
    assert read_request_head([*PSEUDO, (b"content-type", subtype)], 8192).content_type == subtype


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 4e-3), (b"5u", 5e-6), (b"99999999n", 0.1)],
)
def test_timeouts_are_read(value: bytes, seconds: float) -> None:
    assert parse_timeout(value) == pytest.approx(seconds)


@given(st.floats(1e-6, 1e8 - 1))
def test_timeouts_are_written_within_eight_digits_and_never_longer(seconds: float) -> None:
    written = format_timeout(seconds)
    assert len(written) <= 9
    assert parse_timeout(written) <= seconds * (1 + 1e-9)
    assert parse_timeout(written) >= seconds * 0.98 - 1e-6


# --- ids -------------------------------------------------------------------------------------


def _bin(text: str) -> bytes:
    return base64.b64encode(text.encode())


@pytest.mark.parametrize(
    ("mesh", "kind", "ids"),
    [
        ([(b"mm-model-id", b"m")], IdKind.MODEL, ["m"]),
        ([(b"mm-model-id", "ü".encode())], IdKind.MODEL, ["ü"]),
        ([(b"mm-model-id-bin", _bin("ü"))], IdKind.MODEL, ["ü"]),
        ([(b"mm-model-id-bin", _bin("four").rstrip(b"="))], IdKind.MODEL, ["four"]),
        ([(b"mm-model-id-bin", _bin("a") + b"," + _bin("b"))], IdKind.MODEL, ["a", "b"]),
        ([(b"mm-model-id", b"a,b")], IdKind.MODEL, ["a,b"]),
        ([(b"mm-model-id", b"m"), (b"mm-model-id-bin", b"!")], IdKind.MODEL, ["m"]),
        ([(b"mm-model-id", b"a"), (b"mm-model-id", b"b")], IdKind.MODEL, ["a", "b"]),
        ([(b"mm-vmodel-id", b"v")], IdKind.VMODEL, ["v"]),
        ([(b"mm-vmodel-id-bin", _bin("v"))], IdKind.VMODEL, ["v"]),
        ([(b"tas-model-id", b"t")], IdKind.MODEL, ["t"]),
        ([(b"tas-model-id", b"t"), (b"mm-vmodel-id", b"v")], IdKind.VMODEL, ["v"]),
        ([(b"mm-model-idx", b"x"), (b"mm-model-id", b"m")], IdKind.MODEL, ["m"]),
    ],
)
def test_which_id_counts(mesh: HeaderList, kind: IdKind, ids: list[str]) -> None:
    assert read_ids(mesh) == (kind, ids)
    assert carries_id(mesh)


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        ([], "must include mm-model-id header"),
        ([(b"mm-balanced", b"true")], "must include mm-model-id header"),
        (
            [(b"mm-model-id", b"m"), (b"mm-vmodel-id-bin", _bin("v"))],
            "must include only one of model id and vmodel id",
        ),
        ([(b"mm-model-id", b"")], "provided model-id header must be non-empty"),
        ([(b"mm-model-id", b"a"), (b"mm-model-id", b"")], "provided model-id header must be"),
        ([(b"mm-vmodel-id-bin", b"")], "provided vmodel-id header must be non-empty"),
        ([(b"tas-model-id", b"")], "provided model-id header must be non-empty"),
        ([(b"mm-model-id-bin", b"a")], "header mm-model-id-bin cannot be decoded"),
        ([(b"mm-model-id-bin", b"?*!~")], "header mm-model-id-bin cannot be decoded"),
        ([(b"mm-model-id-bin", base64.b64encode(b"\xff"))], "mm-model-id-bin cannot be decoded"),
        ([(b"mm-model-id", b"\xff")], "header mm-model-id cannot be decoded"),
    ],
)
def test_bad_ids(mesh: HeaderList, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        read_ids(mesh)


@given(st.text(min_size=1))
def test_ids_survive_the_way_to_a_peer(model_id: str) -> None:
    assert read_ids(id_headers(model_id)) == (IdKind.MODEL, [model_id])


def test_the_ascii_header_is_only_for_visible_ascii() -> None:
    for model_id in ("a b~", "x" * 2500):
        assert [name for name, _ in id_headers(model_id)] == [b"mm-model-id-bin", b"mm-model-id"]
    for model_id in ("ü", "a\tb", "a\x7f", "x" * 2501):
        assert [name for name, _ in id_headers(model_id)] == [b"mm-model-id-bin"]


def test_switches() -> None:
    assert is_balanced([(b"mm-balanced", b"true")])
    assert not is_balanced([(b"mm-balanced", b"TRUE")])
    assert requires_all([(b"mm-required", b"All")])
    assert not requires_all([(b"mm-required", b"any")])


# --- responses -------------------------------------------------------------------------------


@given(st.sampled_from(list(StatusCode)), st.text())
def test_statuses_survive(code: StatusCode, message: str) -> None:
    message = message.encode("utf-8", "replace").decode()
    trailers = status_trailers(code, message)
    check_response_headers(trailers)
    assert read_status(trailers) == Status(code, message)


def test_unreadable_statuses() -> None:
    assert read_status([(b"grpc-status", b"x")]).code is None
    assert read_status([(b"grpc-status", b"-1")]).code is None
    assert read_status([]).code is None


def test_when_a_retry_makes_sense_is_read() -> None:
    for text, known in ((b"250", 250), (b"0", 0), (b"-1", None), (b"1" * 10, None), (b"x", None)):
        assert read_status([(b"grpc-retry-pushback-ms", text)]).retry_after_ms == known
    assert read_status([]).retry_after_ms is None


def test_strange_messages_are_read() -> None:
    assert read_status([(b"grpc-message", b"%zz%e4")]).message == "%zz�"
    assert encode_message("100 %\n") == b"100 %25%0A"


@pytest.mark.parametrize("filling", ["x", "\u00e9", "\U0001f600", "%", "x\u00e9"])
@pytest.mark.parametrize("length", [100, 5_000, 300_000])
def test_of_a_long_status_text_both_ends_are_told(filling: str, length: int) -> None:
    message = f"vmodel {filling * length} already exists"
    encoded = encode_message(message)
    assert len(encoded) <= MESSAGE_BYTES_MAX
    told = read_status([(b"grpc-status", b"1"), (b"grpc-message", encoded)]).message
    if len(quote(message, safe=" ")) <= MESSAGE_BYTES_MAX:
        assert told == message
    else:
        begin, end = told.split(" [...] ")
        assert message.startswith(begin)
        assert message.endswith(end)
        assert len(encoded) > MESSAGE_BYTES_MAX * 2 // 3
        assert end.endswith("already exists")


def test_mesh_headers_are_dropped_and_clean_lists_are_not_copied() -> None:
    clean: HeaderList = [(b":status", b"200"), (b"x", b"1"), (b"mm", b"kept")]
    assert without_mesh_headers(clean) is clean
    assert without_mesh_headers([*clean, (b"mm-hop-load", b"1")]) == clean
    assert without_mesh_headers([(b"mm-x", b"1"), (b"mm-hop-y", b"2")], b"mm-hop-") == [
        (b"mm-x", b"1")
    ]


@pytest.mark.parametrize(
    ("code", "message", "lost"),
    [
        (5, "anything", True),
        (14, "Request for unknown model: 'm' is not found", True),
        (14, "Request for unknown model: 'm' has no available versions", True),
        (14, "overloaded", False),
        (3, "Model m with version  not found", True),
        (3, "Tensor not found", False),
        (13, "Model m not found", False),
        (0, "", False),
        (None, "", False),
    ],
)
def test_how_runtimes_say_that_a_model_is_lost(code: int | None, message: str, lost: bool) -> None:
    assert says_model_is_lost(Status(code, message)) is lost


def test_malformed_response_headers_are_refused() -> None:
    check_response_headers([(b":status", b"200"), (b"x", b"\xe9"), (b"y", b"")])
    for header in ((b"X", b""), (b"x", b"\n"), (b"upgrade", b"h2c"), (b":path", b"/")):
        with pytest.raises(MalformedHeadersError):
            check_response_headers([header])
