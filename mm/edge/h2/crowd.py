"""How many connections clients have, by address: the twin of mm/wire/_wire_crowd.pxi."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Any


class Crowd:
    """Connections by IPv4 address, or IPv6 /64; those of Unix sockets have none."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def enter(self, peername: Any) -> str:
        """Count one more; answers by what, for ``leave``."""
        key = key_of(peername)
        if key:
            self.counts[key] += 1
        return key

    def leave(self, key: str) -> None:
        """Count one less."""
        if key:
            self.counts[key] -= 1
            if not self.counts[key]:
                del self.counts[key]


def key_of(peername: Any) -> str:
    """Answer by what a connection is counted; empty: by nothing."""
    if not isinstance(peername, tuple):
        return ""
    address = ipaddress.ip_address(str(peername[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)
