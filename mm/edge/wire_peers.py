"""Where the other instances are, as the wire's threads want it: names looked up, numbers laid out.

Owns what is known of each address. The addresses come from other instances' records, so they may be
anything: one that is no use is named once in the log and passed over, and a name that takes long to
be looked up holds up nobody else's. Who is there is ``mm.mesh.members``'.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterable

from anyio.abc import TaskGroup

from mm.core.ids import InstanceId
from mm.edge.addresses import split_address
from mm.wire.addresses import Target, inet_sockaddr

logger = logging.getLogger(__name__)

#: A name is looked up again when there is news of peers and it was so long ago; one that was not
#: found, without news.
RESOLVE_AGAIN_S = 5.0
#: Of names at a time; the others wait.
RESOLVES_MAX = 8
_AWAY_FOREVER_NS = 2**63 - 1


class PeerTargets:
    """What the addresses of other instances come to. ``on_found`` is told when that has changed."""

    def __init__(
        self,
        on_found: Callable[[], None],
        resolve: Callable[[str], Awaitable[bytes]] | None = None,
    ) -> None:
        self._on_found = on_found
        self._resolve = resolve or resolve_sockaddr
        self._slots = asyncio.Semaphore(RESOLVES_MAX)
        #: By address; empty: not found.
        self._found: dict[str, bytes] = {}
        #: When names were last asked for; infinite while they are.
        self._asked_s: dict[str, float] = {}
        #: Those of which the log has said that they are no use.
        self._named: set[str] = set()

    def targets(
        self, callable_now: Iterable[tuple[int, InstanceId, str, float]], group: TaskGroup
    ) -> list[Target]:
        """Answer what can be called at this moment; names are looked up by tasks of ``group``."""
        peers = list(callable_now)
        self._forget_others({address for _, _, address, _ in peers})
        targets = []
        for handle, name, address, away_until_s in peers:
            raw = self._sockaddr(address, group)
            if raw:
                away_ns = _AWAY_FOREVER_NS if math.isinf(away_until_s) else int(away_until_s * 1e9)
                targets.append(Target(address, raw, handle, max(0, away_ns), instance=name))
        return targets

    def _forget_others(self, present: set[str]) -> None:
        for known in (self._found, self._asked_s):
            for address in known.keys() - present:
                del known[address]
        self._named &= present

    def _sockaddr(self, address: str, group: TaskGroup) -> bytes:
        """Answer what is known of an address now: empty if that is nothing."""
        try:
            host, port, is_ip = split_address(address)
        except ValueError as error:
            self._name(address, error)
            return b""
        if is_ip:
            return inet_sockaddr(host, port)
        now_s = asyncio.get_running_loop().time()
        asked_s = self._asked_s.get(address)
        if asked_s is None or now_s - asked_s >= RESOLVE_AGAIN_S:
            self._asked_s[address] = math.inf
            group.start_soon(self._look_up, address)
        return self._found.get(address, b"")

    async def _look_up(self, address: str) -> None:
        loop = asyncio.get_running_loop()
        raw = b""
        async with self._slots:
            try:
                raw = await self._resolve(address)
            except OSError as error:
                self._name(address, error)
        if address not in self._asked_s:
            return  # whose it was has gone
        self._asked_s[address] = loop.time()
        if raw:
            self._named.discard(address)
        else:
            loop.call_later(RESOLVE_AGAIN_S, self._on_found)
        if raw and raw != self._found.get(address):
            self._found[address] = raw
            self._on_found()

    def _name(self, address: str, why: Exception) -> None:
        if address not in self._named:
            self._named.add(address)
            logger.warning("the address %.300r of an instance is no use: %s", address, why)


async def resolve_sockaddr(address: str) -> bytes:
    """Find out the address of "host:port". Raises ``OSError``, ``ValueError`` if it is none."""
    host, port, is_ip = split_address(address)
    if not is_ip:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # As elsewhere, IPv4 first: "localhost" is often listened to on that alone.
        host = str(min(found, key=lambda each: each[0] != socket.AF_INET)[4][0])
    return inet_sockaddr(host, port)
