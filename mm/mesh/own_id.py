"""Whether this instance may have its id: not while another process lives under it (around 2).

Owns the question, asked once at the start. What an earlier process left in records is the
registrar's to take out.
"""

from __future__ import annotations

import logging

from mm.core.ids import InstanceId
from mm.core.records import InstanceRecord, RecordError
from mm.errors import StartupError
from mm.mesh.ports import Item, Peers

logger = logging.getLogger(__name__)


async def refuse_if_taken(
    item: Item | None,
    peers: Peers,
    *,
    me: InstanceId,
    own_address: str,
    start_time_ms: int,
    timeout_s: float,
) -> None:
    """Raise ``StartupError`` if another process wrote our record, ``item``, and lives."""
    if item is None:
        return
    address = _address_of(item)
    if address and address != own_address:
        identity = await peers.identify(address, timeout_s)
        # The same start time is ourselves, at an address we had, or have by another name.
        is_taken = (
            identity is not None
            and identity.instance_id == me
            and identity.start_time_ms != start_time_ms
        )
        if is_taken:
            raise StartupError(
                f"instance id {me} is taken by the process at {address}:"
                " give this one another MM_INSTANCE_ID, or stop that one"
            )
    logger.info("instance id %s is taken over from a process that is gone", me)


def _address_of(item: Item) -> str:
    try:
        return InstanceRecord.decode(item.value).address
    except RecordError as exc:
        logger.error("record %s skipped: %s", item.key, exc)
        return ""
