"""The status of a model as protobuf's own message, for the answers that must be quick: lists, and
vmodels.
"""

from __future__ import annotations

from typing import Any, Final

from mm.mesh.ports import ModelStatus
from mm.pb import mmesh

UINT64_MAX: Final = 2**64 - 1
_Status: Final = mmesh.ModelStatusInfoModelStatus


def fill_status(message: Any, status: ModelStatus) -> None:
    """Fill a ``ModelStatusInfo`` within another message; it is there even if it says nothing."""
    message.SetInParent()
    message.status = _Status[status.status].value
    message.errors.extend(status.errors)
    for copy in status.copies:
        message.modelCopyInfos.add(
            location=copy.instance_id,
            copyStatus=_Status[copy.status].value,
            time=at_most(copy.time_ms, UINT64_MAX),
        )


def at_most(number: int, limit: int) -> int:
    """Answer a number that its field can hold: anything may stand in a record."""
    return min(max(0, number), limit)
