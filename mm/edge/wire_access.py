"""Who may do what, as the wire is told (``mm/wire/_wire_access.pxi``)."""

from __future__ import annotations

from mm.core.access import (
    NOT_A_TOKEN,
    NOTHING_SHOWN,
    SHOWN_TWICE,
    UNKNOWN_CERTIFICATE,
    UNKNOWN_TOKEN,
    Access,
    Role,
)
from mm.wire import WireAccess, WireIdentity

#: In the order of the wire's.
_UNKNOWN = (NOTHING_SHOWN, NOT_A_TOKEN, SHOWN_TWICE, UNKNOWN_TOKEN, UNKNOWN_CERTIFICATE)


def wire_access(access: Access | None) -> WireAccess | None:
    """Answer it in the wire's words; None: anybody may do anything."""
    if access is None:
        return None
    return WireAccess(
        tuple(
            WireIdentity(
                each.name.encode(),
                tuple(each.refusal(role).encode() for role in Role),
                (*each.digests, *(name.encode() for name in each.certificate_names)),
            )
            for each in access.identities
        ),
        tuple(text.encode() for text in _UNKNOWN),
        access.passes_tokens,
    )
