"""What a runtime's refusal to load means, and how it is written down (spec core 3.10, around 8).

Owns the text of failure records, and which codes promise that no memory was taken. What to do about
a failure is the mesh's.
"""

from __future__ import annotations

from typing import Final

from mm.errors import StatusCode

#: Only these promise, by the runtime's contract, that nothing was tried and no memory taken.
_NOTHING_LOADED: Final = frozenset({StatusCode.FAILED_PRECONDITION, StatusCode.INVALID_ARGUMENT})


def is_nothing_loaded(code: int) -> bool:
    """Answer whether no unload is needed after a load that ended with this code.

    NOT_FOUND, though permanent, is not among the promises: an unload too many costs a call, one too
    few costs memory.
    """
    return status_of(code) in _NOTHING_LOADED


def failure_message(code: int, description: str) -> str:
    """Answer the text for the failure record: ``CODE: description``.

    UNKNOWN says nothing that the description does not say better; without a description only the
    code is left.
    """
    status, description = status_of(code), description.strip()
    if not description:
        return status.name
    return description if status is StatusCode.UNKNOWN else f"{status.name}: {description}"


def status_of(code: int) -> StatusCode:
    """Answer the status; as every gRPC client does, take an unlisted number for UNKNOWN."""
    try:
        return StatusCode(code)
    except ValueError:
        return StatusCode.UNKNOWN
