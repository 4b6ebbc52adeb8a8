"""Errors that reach a client, each with its gRPC status.

What code stands for which outcome is design section 8; texts that clients and controllers parse are
those of the
Java mesh (spec core 8). A ``MeshError`` is an answer to a call, never a bug: bugs are ordinary
exceptions, reach the
client as INTERNAL and the log with a traceback.
"""

from __future__ import annotations

import enum
from typing import Self


class StatusCode(enum.IntEnum):
    """The gRPC status codes, by their numbers on the wire."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class MeshError(Exception):
    """An outcome that is told to the client as a gRPC status.

    ``retry_after_ms`` is sent as ``grpc-retry-pushback-ms`` where the time of a useful retry is
    known.
    """

    code = StatusCode.UNKNOWN
    #: Value of the ``mm-hop-result`` trailer when the caller is a peer; None: an answer for the
    #: client.
    #: It is an ``mm.core.calls.Outcome`` value, and tells the sender to try elsewhere.
    hop_result: str | None = None
    #: Value of the ``mm-hop-state`` trailer: the state of an instance that refuses a load for it.
    hop_state: str | None = None

    def __init__(
        self, message: str, *, code: StatusCode | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms
        if code is not None:
            self.code = code

    def another(self) -> Self:
        """Answer the same outcome anew: one object raised many times would pile up tracebacks."""
        # Not by ``__init__``, as a copy is: what that takes is each class's own affair.
        other = type(self).__new__(type(self), *self.args)
        other.__dict__.update(self.__dict__)
        return other


class InvalidRequestError(MeshError):
    """The request itself is wrong: a missing id, two kinds of id, an empty type."""

    code = StatusCode.INVALID_ARGUMENT


class ModelNotFoundError(MeshError):
    """The model (or vmodel) is not registered."""

    code = StatusCode.NOT_FOUND

    def __init__(self, message: str = "model not found") -> None:
        super().__init__(message)


class ModelMovedError(MeshError):
    """The vmodel by which the call named its model stands for another one by now: no client hears
    of it, the call goes there.
    """

    code = StatusCode.UNAVAILABLE

    def __init__(self, message: str = "the vmodel has moved on") -> None:
        super().__init__(message)


class ModelExistsError(MeshError):
    """The id is registered with another type, path or key."""

    code = StatusCode.ALREADY_EXISTS


class ModelReferencedError(MeshError):
    """The model cannot be unregistered because a vmodel refers to it."""

    code = StatusCode.FAILED_PRECONDITION


class TargetConflictError(MeshError):
    """The target of a vmodel is not the one that the request expects."""

    code = StatusCode.FAILED_PRECONDITION


class MethodRefusedError(MeshError):
    """The method is not served, or not permitted by the data-plane configuration or the runtime."""

    code = StatusCode.UNIMPLEMENTED


class LoadFailedError(MeshError):
    """The model could not be loaded anywhere; the message ends in the runtime's own text.

    ``is_permanent``: it is the model's fault, and no other instance need be tried.
    """

    code = StatusCode.FAILED_PRECONDITION

    def __init__(self, message: str, *, is_permanent: bool = False) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent


class NoEligibleInstanceError(LoadFailedError):
    """No running instance has the labels that the type of the model requires.

    No instance has failed, so nothing is recorded; the controller waits for one that can.
    """


class LoadTimeoutError(MeshError):
    """A load, or the wait for one, took longer than its limit."""

    code = StatusCode.DEADLINE_EXCEEDED


class NoRoomError(MeshError):
    """No instance can take the model now (no space, no candidate, draining): worth a retry."""

    code = StatusCode.UNAVAILABLE


class ChurnError(NoRoomError):
    """A load would evict what has just been loaded, and the churn guard is set."""


class QueueFullError(MeshError):
    """A bounded queue is full."""

    code = StatusCode.RESOURCE_EXHAUSTED


class LimitError(MeshError):
    """A limit of the mesh is reached; the text names it and the way out."""

    code = StatusCode.RESOURCE_EXHAUSTED


class WaitersFullError(MeshError):
    """Too many calls wait for loads. Not worth a try elsewhere: it would be loaded twice for it."""

    code = StatusCode.RESOURCE_EXHAUSTED


class StoreUnavailableError(MeshError):
    """The store (etcd) cannot be reached, so nothing can be written or looked up strongly.

    ``is_refused``: every address refuses us, because nobody listens or not to us, so waiting longer
    is of no use.
    """

    code = StatusCode.UNAVAILABLE

    def __init__(self, message: str, *, is_refused: bool = False) -> None:
        super().__init__(message)
        self.is_refused = is_refused


class ContendedError(StoreUnavailableError):
    """The store works, but others changed this one record each time before we could."""


class RuntimeUnavailableError(MeshError):
    """The model runtime beside an instance does not answer."""

    code = StatusCode.UNAVAILABLE


class ConfigError(Exception):
    """Settings are wrong; each complaint names a variable, its value and what is allowed."""

    def __init__(self, *complaints: str) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = complaints


class StartupError(Exception):
    """The process cannot start; the text says why and what to do. Exit code 1, no traceback."""
