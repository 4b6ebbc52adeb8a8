"""Listeners that cannot be opened: which setting is at fault, why, and what to do about it."""

from __future__ import annotations

import errno
import os
from typing import Protocol

from mm.errors import StartupError


class Listener(Protocol):
    """What listens on a port."""

    async def start(self, host: str, port: int) -> int:
        """Listen, and answer the port; raises ``OSError`` or ``UnicodeError``."""


async def open_listener(listener: Listener, host: str, port: int, variable: str) -> int:
    """Listen, and answer the port; ``variable`` is the one that chose it."""
    try:
        return await listener.start(host, port)
    except (OSError, UnicodeError) as exc:
        raise cannot_listen(exc, host, port, variable) from exc


def cannot_listen(
    error: OSError | UnicodeError, host: str, port: int, variable: str
) -> StartupError:
    """Answer the error that ends the start."""
    return StartupError(f"cannot listen on {host}:{port} {_why_not_bound(error, variable)}")


def _why_not_bound(error: OSError | UnicodeError, variable: str) -> str:
    bad_host = "set an address of this machine, or 0.0.0.0 for all"
    # What the resolver says has numbers of its own, below 0.
    if isinstance(error, UnicodeError) or (error.errno or 0) < 0:
        return f"(MM_BIND_HOST): no such host; {bad_host}"
    # Event loops add the address to the text; it is there already.
    why = os.strerror(error.errno).lower() if error.errno else str(error)
    if error.errno == errno.EADDRNOTAVAIL:
        return f"(MM_BIND_HOST): {why}; {bad_host}"
    return f"({variable}): {why}; choose another port, or 0 for a free one"
