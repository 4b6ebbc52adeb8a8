"""What the wire holds a client to; the story of each value is in ``mm.limits``."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Of the external listener."""

    #: At a time, of all threads; and of these, of one IPv4 address or IPv6 /64.
    connections_max: int = 20_000
    per_address_max: int = 15_000
    #: Of a connection: resets, and frames that are no part of calls, that may come at once, and
    #: how many more each second.
    resets_burst: int = 1000
    resets_per_s: int = 200
    frames_burst: int = 10_000
    frames_per_s: int = 1000
    #: From the first byte of a list of headers, or of another frame that is of no body, to its
    #: last; of a call's first message.
    headers_ms: int = 10_000
    message_ms: int = 300_000
    #: An answer of which nothing is taken is given up after this.
    unread_ms: int = 300_000
    #: 0: no limit. A connection without calls; one with, and how long calls have then.
    idle_ms: int = 0
    age_ms: int = 0
    age_grace_ms: int = 0


def client_of(key: bytes) -> str:
    """Answer what clients are told apart by (_wire_crowd.pxi) in words."""
    address = ipaddress.IPv6Address(key)
    return str(address.ipv4_mapped or f"{address}/64")
