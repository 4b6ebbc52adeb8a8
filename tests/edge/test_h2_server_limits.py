"""Clients of the Python data plane whose connections are old, or too many of one address."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from h2.events import ConnectionTerminated

from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer
from mm.edge.h2.incoming import IncomingCall
from mm.edge.tls import Tls
from mm.edge.tls_files import read_files
from mm.errors import StatusCode
from mm.tls_settings import TlsSettings
from tests.edge.raw_h2 import PATIENCE_S, REQUEST, connect
from tests.identities import make
from tests.wire.stand import until

pytestmark = pytest.mark.anyio


async def _answer(call: IncomingCall) -> None:
    call.send_status(StatusCode.OK, "")


async def test_old_connections_end() -> None:
    limits = replace(EXTERNAL_LIMITS, age_s=1)
    server = GrpcServer(_answer, limits=limits, external=True)
    port = await server.start("127.0.0.1", 0)
    try:
        async with connect(port) as client:
            headers, _ = await client.wait_answer(client.begin(REQUEST, end=True))
            assert headers[b"grpc-status"] == b"0"
            last = await client.wait_closed()
            assert last is not None
            assert (last.error_code, last.last_stream_id) == (0, 1)
    finally:
        await server.stop(0)


async def test_a_watch_outlives_the_age_of_its_connection() -> None:
    """As any call does: the server does not stop, and does not say so."""
    gate = asyncio.Event()

    async def watch(call: IncomingCall) -> None:
        call.holds_stop = False
        await gate.wait()
        call.send_status(StatusCode.OK, "")

    server = GrpcServer(watch, limits=replace(EXTERNAL_LIMITS, age_s=1), external=True)
    port = await server.start("127.0.0.1", 0)
    try:
        async with connect(port) as client:
            stream_id = client.begin(REQUEST, end=True)
            for _ in range(2):
                assert (await client.wait_for(ConnectionTerminated)).error_code == 0
            gate.set()
            headers, _ = await client.wait_answer(stream_id)
            assert headers[b"grpc-status"] == b"0"
            await client.wait_closed()
    finally:
        await server.stop(0)


async def test_one_address_cannot_take_all_places(caplog: pytest.LogCaptureFixture) -> None:
    limits = replace(EXTERNAL_LIMITS, per_address_max=2)
    server = GrpcServer(_answer, limits=limits, external=True)
    port = await server.start("127.0.0.1", 0)
    try:
        with ExitStack() as stack:
            for _ in range(8):
                place = ("127.0.0.1", port), PATIENCE_S, ("127.0.0.7", 0)
                stack.enter_context(closing(socket.create_connection(*place)))
            await until(lambda: len(server.links) == 2 == server.crowd.counts["127.0.0.7"])
            async with connect(port) as client:
                headers, _ = await client.wait_answer(client.begin(REQUEST, end=True))
                assert headers[b"grpc-status"] == b"0"
        await until(lambda: not server.links)
        assert not server.crowd.counts
    finally:
        await server.stop(0)
    loud = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert len(loud) == 1
    assert loud[0].endswith("too many connections of one address")


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    key, certificate = make("server").write(tmp_path).values()
    settings = TlsSettings(key_path=key, certificate_path=certificate)
    return Tls(settings, read_files(settings), PATIENCE_S)


async def test_one_address_cannot_take_all_handshakes(tls: Tls) -> None:
    """Who says nothing has a place as long as a handshake may take: of his own, no more."""
    limits = replace(EXTERNAL_LIMITS, connections_max=6, per_address_max=2)
    server = GrpcServer(_answer, limits=limits, external=True, tls=tls.clients)
    port = await server.start("127.0.0.1", 0)
    try:
        with ExitStack() as stack:

            def begin(own: str) -> None:
                place = ("127.0.0.1", port), PATIENCE_S, (own, 0)
                stack.enter_context(closing(socket.create_connection(*place)))

            for _ in range(8):
                begin("127.0.0.7")
            begin("127.0.0.8")
            await until(lambda: dict(server.crowd.counts) == {"127.0.0.7": 2, "127.0.0.8": 1})
            assert len(server.handshakes) == 3
        await until(lambda: not server.handshakes)
        assert not server.crowd.counts
    finally:
        await server.stop(0)
