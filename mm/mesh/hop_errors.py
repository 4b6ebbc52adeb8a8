"""Errors between instances: what a peer should make of one that ends its call here.

Owns the words of ``mm-hop-result`` for errors of the mesh. What the runtime said is the data
plane's to pass on.
"""

from __future__ import annotations

from mm.core.calls import Outcome
from mm.core.hop_headers import read_outcome
from mm.errors import (
    LoadFailedError,
    LoadTimeoutError,
    MeshError,
    ModelMovedError,
    ModelNotFoundError,
    NoRoomError,
    QueueFullError,
    RuntimeUnavailableError,
    StatusCode,
    StoreUnavailableError,
)
from mm.mesh.ports import PeerCallError

_RESULTS = (
    (NoRoomError, Outcome.STALE),
    (QueueFullError, Outcome.STALE),
    (StoreUnavailableError, Outcome.STORE_AWAY),
    (RuntimeUnavailableError, Outcome.UNREACHABLE),
    (LoadFailedError, Outcome.LOAD_FAILED),
    # The model of a vmodel that moved on: its sender asks for the next one.
    (ModelNotFoundError, Outcome.NO_MODEL),
    (ModelMovedError, Outcome.MOVED),
)


def hop_error(outcome: Outcome, message: str) -> MeshError:
    """Answer an error that tells the sender to try elsewhere."""
    error = NoRoomError(message)
    error.hop_result = outcome.value
    return error


def hop_result(error: MeshError) -> str | None:
    """Answer what a peer should make of an error of ours; None: it is the answer to its client."""
    if isinstance(error, LoadFailedError) and error.is_permanent:
        return Outcome.LOAD_REFUSED.value
    for kind, outcome in _RESULTS:
        if isinstance(error, kind):
            return outcome.value
    return None


def peer_error(told: MeshError) -> PeerCallError | MeshError:
    """Answer what a peer's error is to the one who asked it: a word for the router, or the answer.

    ``told``: code, text and trailers, as they came; what else the peer's own error was does not.
    """
    outcome = read_outcome(told.hop_result)
    answered = outcome is not None
    if outcome is None and told.code in (StatusCode.DEADLINE_EXCEEDED, StatusCode.UNAVAILABLE):
        outcome = Outcome.STALE  # no answer worth passing on: try elsewhere
    if outcome is not None:
        return PeerCallError(
            outcome, told.message, told.hop_state, told.retry_after_ms, answered=answered
        )
    if told.code is StatusCode.NOT_FOUND:
        return ModelNotFoundError(told.message)
    return MeshError(told.message, code=told.code, retry_after_ms=told.retry_after_ms)


def load_failure(error: MeshError) -> MeshError:
    """Answer the error of a copy's load for one of those who waited for it.

    That the load itself took too long is worth a try elsewhere; that the wait for it did is not.
    """
    failure = error.another()
    if isinstance(failure, LoadTimeoutError):
        failure.hop_result = Outcome.LOAD_TIMEOUT.value
    return failure
