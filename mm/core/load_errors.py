"""What a runtime's refusal to load means, and how it is written down (spec core 3.10, around 8).

Owns the text of failure records and the sorting of status codes. What to do about a failure is the
mesh's.
"""

from __future__ import annotations

import enum
from typing import Final

from mm.errors import StatusCode


class LoadFailure(enum.Enum):
    """Whose fault a failed load was, as far as its status code tells."""

    #: The model's: another instance with the same runtime will not do better.
    PERMANENT = "permanent"
    #: The runtime was out of memory or slots: there may be room elsewhere, or here later.
    CAPACITY = "capacity"
    #: The runtime's, or unknown: worth a try elsewhere. Adapters say UNKNOWN to nearly everything.
    TRANSIENT = "transient"


_FAILURES: Final = {
    StatusCode.INVALID_ARGUMENT: LoadFailure.PERMANENT,
    StatusCode.NOT_FOUND: LoadFailure.PERMANENT,
    StatusCode.FAILED_PRECONDITION: LoadFailure.PERMANENT,
    StatusCode.OUT_OF_RANGE: LoadFailure.PERMANENT,
    StatusCode.UNIMPLEMENTED: LoadFailure.PERMANENT,
    StatusCode.RESOURCE_EXHAUSTED: LoadFailure.CAPACITY,
}

#: Only these promise, by the runtime's contract, that nothing was tried and no memory taken.
_NOTHING_LOADED: Final = frozenset({StatusCode.FAILED_PRECONDITION, StatusCode.INVALID_ARGUMENT})


def classify(code: int) -> LoadFailure:
    """Answer what a gRPC status code of ``loadModel`` says."""
    return _FAILURES.get(_status(code), LoadFailure.TRANSIENT)


def is_nothing_loaded(code: int) -> bool:
    """Answer whether no unload is needed after a load that ended with this code.

    NOT_FOUND, though permanent, is not among the promises: an unload too many costs a call, one too
    few costs memory.
    """
    return _status(code) in _NOTHING_LOADED


def failure_message(code: int, description: str) -> str:
    """Answer the text for the failure record: ``CODE: description``.

    UNKNOWN says nothing that the description does not say better; without a description only the
    code is left.
    """
    status, description = _status(code), description.strip()
    if not description:
        return status.name
    return description if status is StatusCode.UNKNOWN else f"{status.name}: {description}"


def _status(code: int) -> StatusCode:
    """Answer the status; as every gRPC client does, take an unlisted number for UNKNOWN."""
    try:
        return StatusCode(code)
    except ValueError:
        return StatusCode.UNKNOWN
