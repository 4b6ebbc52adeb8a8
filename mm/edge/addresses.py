"""Reads "host:port", which for instances is what another one's record says, and so anything.

Looking names up is whoever connects' (``mm.edge.wire_peers``, ``mm.edge.h2.client``).
"""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"[A-Za-z0-9_.-]{1,253}")
_PORT = re.compile(r"[0-9]{1,5}")


def split_address(address: str) -> tuple[str, int, bool]:
    """Answer host and port, and whether the host is an IP address.

    Raises ``ValueError`` for what can be neither that nor a name.
    """
    host, colon, port = address.rpartition(":")
    if not colon:
        raise ValueError("it is not host:port")
    if not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise ValueError(f"{port[:100]!r} is not a port")
    host = host.strip("[]")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        if not _HOST.fullmatch(host) or not all(0 < len(label) < 64 for label in labels):
            raise ValueError("it has no name of a host") from None
        return host, int(port), False
    if getattr(ip, "scope_id", None) is not None:
        raise ValueError("addresses of one link alone cannot be called")
    return str(ip), int(port), True
