"""What the wire holds a client to; the story of each value is in ``mm.limits``."""

from __future__ import annotations

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
