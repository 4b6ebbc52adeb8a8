"""Header rules of a proxied call: what is read, dropped, passed on and added (spec core 2.1, 2.12).

Pure functions over raw header lists, ``list[tuple[bytes, bytes]]`` in the order of the wire.
Nothing is decoded that need not be: repeated names, empty and non-ASCII values and ``-bin``
values pass as they came. Hop headers between instances are in ``hop_headers``; what an id inside
a message is, in ``protobuf_ids``.
"""

from __future__ import annotations

import base64
import binascii
import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from mm.errors import InvalidRequestError, MeshError, StatusCode

Header = tuple[bytes, bytes]
HeaderList = list[Header]

#: What HTTP/2 counts for a header beside its name and value (RFC 9113, 6.5.2).
HEADER_OVERHEAD_BYTES: Final = 32

#: Longer ids are not told in the clear besides: gRPC's C core refuses some of the calls with more
#: than 8 KiB of headers, and of these the two forms take 6 then, and those of clients what is left.
PLAIN_ID_BYTES_MAX: Final = 2500

#: A status text as it is sent. It may name ids of clients, of any length; gRPC's C core refuses
#: trailers above 8 KiB, and the caller then hears of that instead of what was wrong.
MESSAGE_BYTES_MAX: Final = 4096
_OMISSION: Final = " [...] "

#: What the wire says to tier 2 of a call; from anybody else it strips such headers.
WIRE_PREFIX: Final = b"mm-wire-"

#: Remembered well-formed names, so that the pattern runs once a name and not once a header.
_NAMES_REMEMBERED_MAX: Final = 4096
_NAME_REMEMBERED_BYTES_MAX: Final = 64
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_BAD_VALUE = re.compile(rb"[\x00\r\n]")
_LENGTH = re.compile(rb"[0-9]{1,18}")
#: Not what only begins so, as application/grpc-web.
_GRPC = re.compile(rb"application/grpc(?:[+;]|\Z)")
#: Other bytes have ended servers of gRPC behind us, for all their clients (grpcio 1.85 in Python).
_PATH = re.compile(rb"[\x21-\x7e]+")
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_TIMEOUT_UNITS: Final = {
    b"H": 3600.0,
    b"M": 60.0,
    b"S": 1.0,
    b"m": 1e-3,
    b"u": 1e-6,
    b"n": 1e-9,
}
#: RFC 9113, 8.2.2: a message with one of these is malformed.
_CONNECTION_SPECIFIC: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
#: Read or meant for this connection only; exact names (Java compared prefixes, spec core 10.6).
_CONSUMED: Final = frozenset(
    (
        b"content-type",
        b"content-length",
        b"te",
        b"user-agent",
        b"host",
        b"grpc-encoding",
        b"grpc-accept-encoding",
        b"grpc-timeout",
        b"tas-model-id",
    )
)
_well_formed_names: set[bytes] = set()


class MalformedHeadersError(MeshError):
    """The request headers break HTTP/2 or gRPC; the stream is answered with ``http_status``."""

    code = StatusCode.INVALID_ARGUMENT

    def __init__(
        self, message: str, *, http_status: int = 400, code: StatusCode | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.http_status = http_status


@dataclass(slots=True)
class RequestHead:
    """The headers of a request, sorted by who they are for."""

    #: "/pkg.Service/Method", as on the wire.
    path: bytes
    content_type: bytes
    #: ``grpc-encoding``; empty when absent or "identity".
    encoding: bytes
    #: ``grpc-accept-encoding``; empty when absent.
    accept_encoding: bytes
    timeout_s: float | None
    #: What the body has to come to, if the client says so.
    content_length: int | None = None
    #: Whatever else the client sent, to be passed on untouched.
    metadata: HeaderList = field(default_factory=list)
    #: ``mm-*`` and ``tas-model-id``: for the mesh alone.
    mesh: HeaderList = field(default_factory=list)


def read_request_head(
    headers: Iterable[Header], size_max: int, *, is_wire: bool = False
) -> RequestHead:
    """Check and sort the headers of a request; raises ``MalformedHeadersError``.

    ``is_wire``: the words that the wire has added do not count against the client's limit.
    """
    pseudo: dict[bytes, bytes] = {}
    consumed: dict[bytes, bytes] = {}
    metadata: HeaderList = []
    mesh: HeaderList = []
    size = 0
    content_length: int | None = None
    timeout_s: float | None = None
    for header in headers:
        name, value = header
        if not (is_wire and name.startswith(WIRE_PREFIX)):
            size += len(name) + len(value) + HEADER_OVERHEAD_BYTES
        if _BAD_VALUE.search(value):
            raise MalformedHeadersError(f"the value of header {_show(name)} is not allowed")
        if name[:1] == b":":
            if name in pseudo or metadata or mesh or consumed:
                raise MalformedHeadersError(f"pseudo-header {_show(name)} repeated or out of place")
            pseudo[name] = value
            continue
        if name not in _well_formed_names:
            _check_name(name)
        if name in _CONSUMED:
            consumed[name] = value
            if name == b"tas-model-id":
                mesh.append(header)
            elif name == b"content-length":
                content_length = _read_length(value, content_length)
            elif name == b"grpc-timeout":
                timeout_s = parse_timeout(value)
            elif name == b"te" and value != b"trailers":
                raise MalformedHeadersError(f"te: {_show(value)} does not belong into HTTP/2")
        elif name.startswith(b"mm-"):
            mesh.append(header)
        elif not name.startswith(b"grpc-"):
            metadata.append(header)
    if size > size_max:
        raise MalformedHeadersError(
            f"request headers of {size} bytes exceed the limit of {size_max} bytes "
            "(MM_SVC_GRPC_MAX_HEADERS_SIZE)",
            http_status=200,
            code=StatusCode.RESOURCE_EXHAUSTED,
        )
    _check_pseudo_headers(pseudo)
    content_type = consumed.get(b"content-type", b"")
    if not _GRPC.match(content_type):
        raise MalformedHeadersError(
            f"content-type {_show(content_type)} is not application/grpc", http_status=415
        )
    encoding = consumed.get(b"grpc-encoding", b"")
    return RequestHead(
        path=pseudo[b":path"],
        content_type=content_type,
        encoding=b"" if encoding == b"identity" else encoding,
        accept_encoding=consumed.get(b"grpc-accept-encoding", b""),
        timeout_s=timeout_s,
        content_length=content_length,
        metadata=metadata,
        mesh=mesh,
    )


def are_trailers(headers: Iterable[Header]) -> bool:
    """Answer whether headers may stand behind a request: no pseudo-header, say."""
    return all(
        _NAME.fullmatch(name)
        and name not in _CONNECTION_SPECIFIC
        and not _BAD_VALUE.search(value)
        and (name != b"te" or value == b"trailers")
        for name, value in headers
    )


def _read_length(value: bytes, before: int | None) -> int:
    if before is not None:
        raise MalformedHeadersError("content-length is there twice")
    if not _LENGTH.fullmatch(value):
        raise MalformedHeadersError(f"content-length {_show(value)} is no length")
    return int(value)


def _check_name(name: bytes) -> None:
    if not _NAME.fullmatch(name):
        raise MalformedHeadersError(f"header name {_show(name)} is not allowed")
    if name in _CONNECTION_SPECIFIC:
        raise MalformedHeadersError(f"header {_show(name)} does not belong into HTTP/2")
    if len(name) <= _NAME_REMEMBERED_BYTES_MAX and len(_well_formed_names) < _NAMES_REMEMBERED_MAX:
        _well_formed_names.add(name)


def _check_pseudo_headers(pseudo: dict[bytes, bytes]) -> None:
    method = pseudo.get(b":method")
    if method is None or b":path" not in pseudo or b":scheme" not in pseudo:
        raise MalformedHeadersError("one of :method, :scheme and :path is missing")
    if method != b"POST":
        raise MalformedHeadersError("gRPC calls are POST requests", http_status=405)
    if not pseudo[b":path"].startswith(b"/"):
        raise MalformedHeadersError(f":path {_show(pseudo[b':path'])} does not begin with /")
    if not _PATH.fullmatch(pseudo[b":path"]):
        raise MalformedHeadersError(f":path {_show(pseudo[b':path'])} is not made of ASCII")
    unknown = pseudo.keys() - {b":method", b":path", b":scheme", b":authority"}
    if unknown:
        raise MalformedHeadersError(f"unknown pseudo-header {_show(unknown.pop())}")


def _show(value: bytes) -> str:
    """Make foreign bytes fit for an error text."""
    return repr(value[:64])[1:]


# --- deadlines -------------------------------------------------------------------------------


def parse_timeout(value: bytes) -> float:
    """Read ``grpc-timeout`` into seconds; raises ``MalformedHeadersError``."""
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise MalformedHeadersError(f"grpc-timeout {_show(value)} is not a timeout")
    return int(match[1]) * _TIMEOUT_UNITS[match[2]]


def format_timeout(timeout_s: float) -> bytes:
    """Write ``grpc-timeout`` in the finest unit that eight digits allow, rounded down."""
    if timeout_s < 100:
        return b"%du" % max(1, int(timeout_s * 1e6))
    if timeout_s < 100_000:
        return b"%dm" % int(timeout_s * 1e3)
    return b"%dS" % min(int(timeout_s), 99_999_999)


# --- ids -------------------------------------------------------------------------------------


class IdKind(enum.Enum):
    """Whether an id names a model or a vmodel."""

    MODEL = "model"
    VMODEL = "vmodel"


_ID_NAMES: Final = (
    (IdKind.MODEL, b"mm-model-id"),
    (IdKind.MODEL, b"mm-model-id-bin"),
    (IdKind.VMODEL, b"mm-vmodel-id"),
    (IdKind.VMODEL, b"mm-vmodel-id-bin"),
)


def carries_id(mesh: Iterable[Header]) -> bool:
    """Answer whether any id header is there, empty or not."""
    return any(name == b"tas-model-id" or name in _ID_NAMES_ONLY for name, _ in mesh)


_ID_NAMES_ONLY: Final = frozenset(name for _, name in _ID_NAMES)


def read_ids(mesh: Sequence[Header]) -> tuple[IdKind, list[str]]:
    """Choose the ids of a call from its headers (around 6.1); raises ``InvalidRequestError``."""
    found: dict[IdKind, list[str]] = {}
    for kind, name in _ID_NAMES:
        # An ASCII header makes its -bin twin ignored, even a broken one.
        if kind not in found:
            values = [value for key, value in mesh if key == name]
            if values:
                found[kind] = _decode_ids(name, values)
    if len(found) > 1:
        raise InvalidRequestError("must include only one of model id and vmodel id")
    if not found:
        legacy = [value for key, value in mesh if key == b"tas-model-id"]
        if not legacy:
            raise InvalidRequestError("must include mm-model-id header")
        found[IdKind.MODEL] = _decode_ids(b"tas-model-id", legacy)
    kind, ids = next(iter(found.items()))
    for model_id in ids:
        check_id(kind, model_id)
    return kind, ids


def check_id(kind: IdKind, model_id: str) -> None:
    """Refuse an empty id."""
    if not model_id:
        raise InvalidRequestError(f"provided {kind.value}-id header must be non-empty")


def _decode_ids(name: bytes, values: Iterable[bytes]) -> list[str]:
    try:
        if name.endswith(b"-bin"):
            # Repeated -bin headers may arrive joined by commas, which base64 never contains.
            return [_decode_bin(part).decode() for value in values for part in value.split(b",")]
        return [value.decode() for value in values]
    except (UnicodeDecodeError, binascii.Error):
        raise InvalidRequestError(f"header {name.decode()} cannot be decoded") from None


def _decode_bin(value: bytes) -> bytes:
    """Read base64, padded or not."""
    value = value.strip().rstrip(b"=")
    return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)


def id_headers(model_id: str) -> HeaderList:
    """Answer the headers that tell a runtime or peer the concrete model (spec core 2.12).

    A long id is told once, in the header that is there always: twice it would be too much for
    runtimes on grpcio.
    """
    encoded = model_id.encode()
    headers = [(b"mm-model-id-bin", base64.b64encode(encoded).rstrip(b"="))]
    if len(encoded) <= PLAIN_ID_BYTES_MAX and all(32 <= byte <= 126 for byte in encoded):
        headers.append((b"mm-model-id", encoded))
    return headers


def is_balanced(mesh: Iterable[Header]) -> bool:
    """Answer whether the caller says that it spreads its calls itself."""
    return any(name == b"mm-balanced" and value == b"true" for name, value in mesh)


def requires_all(mesh: Iterable[Header]) -> bool:
    """Answer whether a call with several ids needs every one of them (around 11)."""
    return any(name == b"mm-required" and value.lower() == b"all" for name, value in mesh)


# --- responses -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Status:
    """A gRPC status as read from trailers. ``code`` None: there was no readable grpc-status."""

    code: int | None
    message: str
    #: Value of ``mm-hop-result``, None without one.
    hop_result: str | None = None
    #: Value of ``mm-hop-state``, None without one.
    hop_state: str | None = None
    #: ``grpc-retry-pushback-ms``, None without one, or if it says "never".
    retry_after_ms: int | None = None


def read_status(trailers: Iterable[Header]) -> Status:
    """Read the status from trailers, or from the headers of a trailers-only response."""
    code: int | None = None
    message = b""
    hop_result: str | None = None
    hop_state: str | None = None
    retry_after_ms: int | None = None
    for name, value in trailers:
        if name == b"grpc-status":
            code = int(value) if value.isdigit() and len(value) <= 9 else None
        elif name == b"grpc-message":
            message = value
        elif name == b"mm-hop-result":
            hop_result = value.decode("ascii", "replace")
        elif name == b"mm-hop-state":
            hop_state = value.decode("ascii", "replace")
        elif name == b"grpc-retry-pushback-ms":
            retry_after_ms = int(value) if value.isdigit() and len(value) <= 9 else None
    text = unquote_to_bytes(message).decode("utf-8", "replace")
    return Status(code, text, hop_result, hop_state, retry_after_ms)


def status_trailers(code: int, message: str = "") -> HeaderList:
    """Write a status as trailers."""
    trailers = [(b"grpc-status", b"%d" % code)]
    if message:
        trailers.append((b"grpc-message", encode_message(message)))
    return trailers


_PLAIN: Final = bytes(byte for byte in range(0x20, 0x7F) if byte != 0x25)


def encode_message(message: str) -> bytes:
    """Percent-encode ``grpc-message``; of a long one both ends are told."""
    encoded = _quoted(message)
    kept_count = len(message)
    while len(encoded) > MESSAGE_BYTES_MAX:
        kept_count = min(kept_count - 1, kept_count * MESSAGE_BYTES_MAX // len(encoded))
        half_count = max(1, kept_count // 2)
        encoded = _quoted(message[:half_count] + _OMISSION + message[-half_count:])
    return encoded


def _quoted(message: str) -> bytes:
    return quote_from_bytes(message.encode("utf-8", "replace"), safe=_PLAIN).encode()


def check_response_headers(headers: Iterable[Header]) -> None:
    """Refuse what would break the client's connection; raises ``MalformedHeadersError``."""
    for name, value in headers:
        if name not in _well_formed_names and name != b":status":
            _check_name(name)
        if _BAD_VALUE.search(value):
            raise MalformedHeadersError(f"the value of header {_show(name)} is not allowed")


def check_http_status(headers: HeaderList, *, begins: bool) -> None:
    """Refuse a ``:status`` that is not where it belongs: once, before all else, where an answer
    begins. Raises ``MalformedHeadersError``.
    """
    is_first = bool(headers) and headers[0][0] == b":status" and headers[0][1][:1] != b"1"
    if is_first != begins or any(name == b":status" for name, _ in headers[1:]):
        raise MalformedHeadersError("the status of HTTP is not where it belongs")


def without_mesh_headers(
    headers: HeaderList, prefix: bytes | tuple[bytes, ...] = b"mm-"
) -> HeaderList:
    """Answer response headers or trailers without those of the mesh; the same list if none is."""
    for name, _ in headers:
        if name.startswith(prefix):
            return [header for header in headers if not header[0].startswith(prefix)]
    return headers


#: How runtimes say "I do not have that model" beside NOT_FOUND (spec core 2.8.4).
_LOST_TEXTS: Final = (
    (StatusCode.UNAVAILABLE, re.compile(r"Request for unknown model.* is not found", re.S)),
    (StatusCode.UNAVAILABLE, re.compile(r"has no available versions")),
    (StatusCode.INVALID_ARGUMENT, re.compile(r"^\s*Model .*not found", re.S)),
)


def says_model_is_lost(status: Status) -> bool:
    """Answer whether a runtime's status means that it does not have the model."""
    if status.code == StatusCode.NOT_FOUND:
        return True
    return any(status.code == code and text.search(status.message) for code, text in _LOST_TEXTS)
