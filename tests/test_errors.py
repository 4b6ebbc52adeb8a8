"""Errors of the mesh can be told again, each of them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mm
from mm import errors
from mm.core.headers import MalformedHeadersError
from mm.core.protobuf_ids import MalformedMessageError
from mm.edge.h2 import client, messages
from mm.edge.unary import CallError
from mm.errors import MeshError, StatusCode
from mm.mesh.vmodel_records import UnreadableVModelError
from mm.runtime import call, tensors
from mm.testing.instance import RuntimeAnswerError

EXAMPLES: tuple[MeshError, ...] = (
    MeshError("text", code=StatusCode.ABORTED, retry_after_ms=7),
    errors.InvalidRequestError("text"),
    errors.ModelNotFoundError(),
    errors.ModelMovedError(),
    errors.ModelExistsError("text"),
    errors.ModelReferencedError("text"),
    errors.TargetConflictError("text"),
    errors.MethodRefusedError("text"),
    errors.LoadFailedError("text", is_permanent=True),
    errors.NoEligibleInstanceError("text"),
    errors.LoadTimeoutError("text"),
    errors.NoRoomError("text"),
    errors.ChurnError("text"),
    errors.QueueFullError("text"),
    errors.LimitError("text", retry_after_ms=7),
    errors.WaitersFullError("text"),
    errors.StoreUnavailableError("text", is_refused=True),
    errors.ContendedError("text"),
    errors.RuntimeUnavailableError("text"),
    MalformedHeadersError("text", http_status=415),
    MalformedMessageError("text"),
    client.UnreachableError("text"),
    client.ChannelFullError("text"),
    messages.MessageFlagError("request"),
    messages.MessageTooLargeError("request", 9, 8),
    messages.TooMuchHeldError(),
    CallError(5, "text", [(b"grpc-status", b"5")]),
    UnreadableVModelError("v", owner="me"),
    call.CallError(StatusCode.DATA_LOSS, "text", details=b"more"),
    tensors.InvalidTensorError("x", "text"),
    RuntimeAnswerError("text", code=StatusCode.NOT_FOUND),
)


def kinds_of(kind: type[MeshError]) -> Iterator[type[MeshError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from kinds_of(each)


def test_there_is_an_example_of_each() -> None:
    package = Path(mm.__file__).parent
    for path in package.rglob("*.py"):
        if re.search(r"^class \w+\([\w.]*Error\)", path.read_text(), re.MULTILINE):
            importlib.import_module(
                ".".join(path.relative_to(package.parent).with_suffix("").parts)
            )
    ours = {each for each in kinds_of(MeshError) if each.__module__.startswith("mm.")}
    assert ours == {type(each) for each in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_another_is_the_same_outcome(error: MeshError) -> None:
    error.hop_result, error.hop_state = "stale", "state"
    try:
        raise error
    except MeshError:
        another = error.another()
    assert another is not error
    assert type(another) is type(error)
    assert (str(another), another.args, vars(another)) == (str(error), error.args, vars(error))
    assert another.__traceback__ is None
