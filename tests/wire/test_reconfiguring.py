"""What the wire goes by changes while calls come: none of them fails. And what sockets are told."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from mm.wire.addresses import Target, inet_sockaddr
from tests.edge.upstream import serve_runtime
from tests.wire.hostile import good_client
from tests.wire.stand import serve_wire

pytestmark = pytest.mark.anyio
CHANGES = 200


async def test_no_call_fails_while_everything_is_configured_anew() -> None:
    async with serve_runtime() as other, serve_wire(threads=2) as stand:
        ports = (stand.runtime.port, other.port)
        nobody = stand.table.add_instance("nobody")
        peer = Target("127.0.0.1:1", inet_sockaddr("127.0.0.1", 1), nobody)
        async with good_client(stand) as first, good_client(stand, body=bytes(20_000)) as second:
            for turn in range(CHANGES):
                port = ports[turn // 2 % 2]
                stand.configure(leaves_here=turn % 50 == 49)
                stand.wire.set_peers([peer] * (turn % 2))
                stand.wire.set_runtime(
                    Target(f"127.0.0.1:{port}", inet_sockaddr("127.0.0.1", port))
                )
                # Some calls are begun between two changes, and some are under way at each.
                await asyncio.wait((asyncio.get_running_loop().create_future(),), timeout=0.002)
            assert first() > 1
            assert second() > 1
            assert stand.counts.cancelled == 0


def _tcp_sockets() -> Iterator[socket.socket]:
    """Those of this process, which stay open; duplicates show what is set on them."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(fd))) as copy:
            if copy.family == socket.AF_INET and copy.type == socket.SOCK_STREAM:
                yield copy


async def test_small_frames_never_wait_for_acknowledgements() -> None:
    """TCP_NODELAY, on what is accepted and on what is dialled."""
    async with serve_wire() as stand, good_client(stand):
        here, dialled = (stand.port, stand.runtime.port)
        found: dict[str, list[int]] = {"accepted": [], "dialled": []}
        for each in _tcp_sockets():
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            no_delay = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if each.getsockname()[1] == here:
                found["accepted"].append(no_delay)
            elif each.getpeername()[1] == dialled:
                found["dialled"].append(no_delay)
        for kind, no_delays in found.items():
            assert no_delays, f"no socket that was {kind}"
            assert all(no_delays), kind
