"""Codes and texts of failed calls as the Java mesh has them, for clients that parse them.

``MM_LEGACY_ERRORS`` turns it on (decision 6, around 12, interop 0.10): the runtime's own text
stands behind the method and the code, a runtime that is away and a load that failed are INTERNAL.
"""

from __future__ import annotations

from mm.core.calls import Outcome
from mm.core.headers import HeaderList, encode_message, read_status
from mm.errors import (
    LoadFailedError,
    MeshError,
    MethodRefusedError,
    NoRoomError,
    RuntimeUnavailableError,
    StatusCode,
)

_LOADS = (Outcome.LOAD_FAILED, Outcome.LOAD_REFUSED)
_REPLACED = (b"grpc-status", b"grpc-message", b"grpc-status-details-bin")


def legacy_error(error: MeshError, method: str) -> MeshError:
    """Answer what a client of the Java mesh would have been told."""
    code, text = StatusCode.INTERNAL, error.message
    if isinstance(error, RuntimeUnavailableError):
        text = f"ModelRuntime UNAVAILABLE: {_prefixed(method, StatusCode.UNAVAILABLE, text)}"
    elif isinstance(error, MethodRefusedError) and text:
        code, text = error.code, _prefixed(method, error.code, text)
    elif not isinstance(error, LoadFailedError | NoRoomError):
        return error
    return MeshError(text, code=code, retry_after_ms=error.retry_after_ms)


def legacy_trailers(trailers: HeaderList, outcome: Outcome, method: str) -> HeaderList:
    """Answer the trailers of a runtime or peer so; details go, for they repeat code and text."""
    status = read_status(trailers)
    # There are runtimes that make up codes.
    code = next((each for each in StatusCode if each == status.code), StatusCode.UNKNOWN)
    text = status.message
    if code is StatusCode.OK:
        return trailers
    if outcome is Outcome.RUNTIME_UNAVAILABLE:
        text = f"ModelRuntime UNAVAILABLE: {_prefixed(method, code, text)}"
        code = StatusCode.INTERNAL
    elif outcome in _LOADS:
        code = StatusCode.INTERNAL
    elif outcome in (Outcome.ANSWERED, Outcome.LOST, Outcome.EXHAUSTED):
        text = _prefixed(method, code, text)
    kept = [header for header in trailers if header[0] not in _REPLACED]
    return [*kept, (b"grpc-status", b"%d" % code), (b"grpc-message", encode_message(text))]


def _prefixed(method: str, code: StatusCode, text: str) -> str:
    return f"{method.lstrip('/')}: {code.name}: {text}"
