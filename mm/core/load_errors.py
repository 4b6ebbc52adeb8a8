"""What a runtime's refusal to load means, and how it is written down (spec core 3.10, around 8).

Owns the text of failure records. What to do about a failure is the mesh's; no code, whatever it
promises, spares the unload that follows: what adapters pass on is the word of a server that knows
nothing of the promise, and an unload too many costs a call, one too few costs memory.
"""

from __future__ import annotations

from typing import Final

from mm.errors import StatusCode

#: Of what a runtime says, this much is kept. The text goes into the model's record once for each
#: instance that failed (etcd takes 1.5 MiB at a time), into the trailers of every call (clients
#: take 8 KiB of them, and escaping may treble it) and into the log.
TEXT_BYTES_MAX: Final = 2048


def failure_message(code: int, description: str) -> str:
    """Answer the text for the failure record: ``CODE: description``.

    UNKNOWN says nothing that the description does not say better; without a description only the
    code is left.
    """
    status, description = status_of(code), _shortened(description.strip())
    if not description:
        return status.name
    return description if status is StatusCode.UNKNOWN else f"{status.name}: {description}"


def _shortened(text: str) -> str:
    """Answer a text with its middle left out if it is too long: of a trace the first line tells
    where one is, the last what happened.
    """
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= TEXT_BYTES_MAX:
        return text
    half = TEXT_BYTES_MAX // 2
    first, last = (
        encoded[:half].decode("utf-8", "ignore"),
        encoded[-half:].decode("utf-8", "ignore"),
    )
    return f"{first} [... of {len(encoded)} bytes] {last}"


def status_of(code: int) -> StatusCode:
    """Answer the status; as every gRPC client does, take an unlisted number for UNKNOWN."""
    try:
        return StatusCode(code)
    except ValueError:
        return StatusCode.UNKNOWN
