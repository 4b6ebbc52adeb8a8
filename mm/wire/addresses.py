"""Addresses as the wire's threads want them: found out beforehand, laid out for ``connect``.

Names are resolved in Python, off the threads that move bytes.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """Where calls can be sent. ``name`` is what requests say in :authority, and texts too, unless
    there is a ``label``.

    Of an instance: its ``handle`` in the table, and until when (on the monotonic clock) tier 2 says
    to leave it alone. ``instance`` is its id, or that of the one beside which a runtime is.
    """

    name: str
    sockaddr: bytes
    handle: int = 0
    away_until_ns: int = 0
    label: str = ""
    instance: str = ""


def unix_sockaddr(path: str) -> bytes:
    """Lay out the address of a Unix socket."""
    return struct.pack("=H", socket.AF_UNIX) + path.encode() + b"\0"


def inet_sockaddr(host: str, port: int) -> bytes:
    """Lay out the address of an IP address, of either family. Raises ``OSError``."""
    if ":" in host:
        family, packed = socket.AF_INET6, socket.inet_pton(socket.AF_INET6, host)
        return struct.pack("=H", family) + struct.pack("!HI16sI", port, 0, packed, 0)
    packed = socket.inet_pton(socket.AF_INET, host)
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, packed)
