"""Codes and texts of the Java mesh (around 12)."""

from __future__ import annotations

import pytest

from mm.core.calls import Outcome
from mm.core.headers import read_status
from mm.edge.legacy_errors import legacy_error, legacy_trailers
from mm.errors import (
    ChurnError,
    LoadFailedError,
    LoadTimeoutError,
    MeshError,
    MethodRefusedError,
    ModelNotFoundError,
    RuntimeUnavailableError,
    StatusCode,
)

METHOD = "/pkg.Svc/call"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (LoadFailedError("bad archive", is_permanent=True), StatusCode.INTERNAL, "bad archive"),
        (ChurnError("Cache churn threshold exceeded"), StatusCode.INTERNAL, "Cache churn"),
        (
            RuntimeUnavailableError("gone"),
            StatusCode.INTERNAL,
            "ModelRuntime UNAVAILABLE: pkg.Svc/call: UNAVAILABLE: gone",
        ),
        (
            MethodRefusedError("Method not found"),
            StatusCode.UNIMPLEMENTED,
            "pkg.Svc/call: UNIMPLEMENTED: Method not found",
        ),
        (MethodRefusedError(""), StatusCode.UNIMPLEMENTED, ""),
        (LoadTimeoutError("timed out"), StatusCode.DEADLINE_EXCEEDED, "timed out"),
        (ModelNotFoundError(), StatusCode.NOT_FOUND, "model not found"),
    ],
)
def test_errors_of_the_mesh(error: MeshError, code: StatusCode, text: str) -> None:
    found = legacy_error(error, METHOD)
    assert found.code == code
    assert found.message.startswith(text)


def test_a_retry_that_makes_sense_is_still_told() -> None:
    error = ChurnError("no room")
    error.retry_after_ms = 7
    assert legacy_error(error, METHOD).retry_after_ms == 7


@pytest.mark.parametrize(
    ("outcome", "said", "code", "text"),
    [
        (Outcome.ANSWERED, 3, 3, "pkg.Svc/call: INVALID_ARGUMENT: 50% é"),
        (
            Outcome.RUNTIME_UNAVAILABLE,
            14,
            13,
            "ModelRuntime UNAVAILABLE: pkg.Svc/call: UNAVAILABLE: 50% é",
        ),
        (Outcome.ANSWERED, 99, 2, "pkg.Svc/call: UNKNOWN: 50% é"),
        (Outcome.LOAD_FAILED, 9, 13, "50% é"),
        (Outcome.STORE_AWAY, 14, 14, "50% é"),
    ],
)
def test_trailers(outcome: Outcome, said: int, code: int, text: str) -> None:
    trailers = [
        (b"grpc-status", b"%d" % said),
        (b"own", b"kept"),
        (b"grpc-message", b"50%25 %C3%A9"),
        (b"grpc-status-details-bin", b"CAM"),
    ]
    found = legacy_trailers(trailers, outcome, METHOD)
    status = read_status(found)
    assert (status.code, status.message) == (code, text)
    assert [name for name, _ in found] == [b"own", b"grpc-status", b"grpc-message"]


def test_what_went_well_is_left_alone() -> None:
    trailers = [(b"grpc-status", b"0"), (b"own", b"kept")]
    assert legacy_trailers(trailers, Outcome.ANSWERED, METHOD) is trailers
