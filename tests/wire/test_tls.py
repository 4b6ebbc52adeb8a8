"""TLS of the wire where it may go wrong: full sockets, broken records, exchanges under load.

What clients see of TLS is tested on both data planes (tests/system/test_tls.py); these run under
the sanitizers as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mm.edge.tls import Contexts, make_contexts
from mm.edge.tls_files import read_files
from mm.tls_settings import TlsSettings
from mm.wire import Role, WireTls
from tests.edge.upstream import PATIENCE_S
from tests.identities import Identity, make
from tests.wire.stand import WireStand, serve_wire, until

pytestmark = pytest.mark.anyio
ID = (("mm-model-id", "m"),)
SEED = 11


@pytest.fixture(scope="module")
def server() -> Identity:
    return make("server")


def contexts_of(identity: Identity, directory: Path) -> Contexts:
    key, certificate = identity.write(directory).values()
    settings = TlsSettings(key_path=key, certificate_path=certificate, peers=True)
    return make_contexts(settings, read_files(settings))


@pytest.fixture
def contexts(server: Identity, tmp_path: Path) -> Contexts:
    return contexts_of(server, tmp_path / "tls")


@pytest.fixture
def others(tmp_path: Path) -> Contexts:
    """Of somebody else."""
    return contexts_of(make("other"), tmp_path / "others")


@pytest.fixture
def again(server: Identity, tmp_path: Path) -> Contexts:
    """Of the same files, read once more."""
    return contexts_of(server, tmp_path / "again")


def secure(stand: WireStand, contexts: Contexts, handshake_ms: int = 10_000) -> None:
    """Speak TLS on connections from now on."""
    tls = WireTls(contexts.clients, contexts.peers, contexts.to_peers, handshake_ms)
    stand.configure(tls=tls)


def client_of(stand: WireStand, server: Identity) -> grpc.aio.Channel:
    options = [
        ("grpc.ssl_target_name_override", "localhost"),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
    credentials = grpc.ssl_channel_credentials(server.certificate_pem)
    return grpc.aio.secure_channel(f"127.0.0.1:{stand.port}", credentials, options=options)


def client_context(server: Identity) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=server.certificate_pem.decode())
    context.set_alpn_protocols(["h2"])
    return context


async def test_large_messages_at_once(contexts: Contexts, server: Identity) -> None:
    """More than sockets take: sealed records wait in the connection, calls behind their windows."""
    bodies = [bytes([number]) * 3_000_000 for number in range(6)]
    async with serve_wire() as stand:
        secure(stand, contexts)
        async with client_of(stand, server) as client:
            call = client.unary_unary("/t.S/Unary")
            answers = await asyncio.gather(*(call(body, metadata=ID) for body in bodies))
        assert answers == [b"echo:" + body for body in bodies]
        assert stand.counts.calls_here == len(bodies)
        assert (stand.counts.handshakes, stand.counts.handshakes_failed) == (1, 0)


async def test_peers_are_called_in_tls(contexts: Contexts) -> None:
    async with serve_wire(role=Role.PEER) as there, serve_wire() as here:
        secure(there, contexts)
        here.configure(tls=WireTls(to_peers=contexts.to_peers))
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        here.add_peer("m", there.port)
        async with here.client() as client:
            body = b"q" * 1_000_000
            assert await client.unary_unary("/t.S/Unary")(body, metadata=ID) == b"echo:" + body
        assert (here.counts.calls_there, here.counts.handshakes) == (1, 1)
        assert (there.counts.calls_here, there.counts.handshakes) == (1, 1)


async def test_probes_of_ports_are_no_handshakes(contexts: Contexts) -> None:
    async with serve_wire() as stand:
        secure(stand, contexts)
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", stand.port)
            writer.close()
        await stand.settle(connections=3, connections_open=0)
        assert stand.counts.handshakes_failed == 0


@pytest.mark.parametrize("is_plain", [True, False])
async def test_a_peer_that_is_not_trusted_is_not_called(
    contexts: Contexts, others: Contexts, is_plain: bool
) -> None:
    async with serve_wire(role=Role.PEER) as there, serve_wire() as here:
        if not is_plain:
            secure(there, others)
        here.configure(tls=WireTls(to_peers=contexts.to_peers))
        here.table.set_state("m", 0)  # type: ignore[arg-type]
        here.add_peer("m", there.port)
        async with here.client() as client:
            # Tier 2 goes on with it.
            assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"echo:q"
        assert (here.counts.replayed, here.counts.handshakes_failed) == (1, 1)
        ((_, _, why),) = here.router.tried_routes
        assert why.startswith(f"no TLS with 127.0.0.1:{there.port}: ")


async def test_new_contexts_under_load(
    contexts: Contexts, server: Identity, again: Contexts
) -> None:
    """A connection keeps the context that it began with, however many come after it."""
    both = [contexts, again]
    async with serve_wire(threads=2) as stand:
        secure(stand, contexts)
        async with client_of(stand, server) as client:
            call = client.unary_unary("/t.S/Unary")
            for turn in range(20):
                secure(stand, both[turn % 2])
                async with client_of(stand, server) as another:
                    answers = await asyncio.gather(
                        *(call(b"%d" % each, metadata=ID) for each in range(10)),
                        another.unary_unary("/t.S/Unary")(b"x", metadata=ID),
                    )
                assert answers == [*(b"echo:%d" % each for each in range(10)), b"echo:x"]
        assert (stand.counts.handshakes, stand.counts.handshakes_failed) == (21, 0)


async def test_tampered_records_end_their_connection_alone(
    contexts: Contexts, server: Identity
) -> None:
    """From the first byte of the handshake to the records of a call."""
    chance = random.Random(SEED)
    async with serve_wire() as stand:
        secure(stand, contexts)
        for _ in range(40):
            await _converse(stand, client_context(server), chance)
        async with client_of(stand, server) as client:
            assert await client.unary_unary("/t.S/Unary")(b"q", metadata=ID) == b"echo:q"
        await until(lambda: stand.counts.connections_open == 0)
        assert stand.counts.handshakes_failed > 5


async def _converse(stand: WireStand, context: ssl.SSLContext, chance: random.Random) -> None:
    """Speak TLS over a socket, with one flight that has a wrong byte, or ends early."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    wrong_flight = chance.randrange(4)
    has_shaken = False
    async with asyncio.timeout(PATIENCE_S):
        for flight in range(5):
            try:
                if has_shaken:
                    tls.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
                else:
                    tls.do_handshake()
                    has_shaken = True
            except ssl.SSLWantReadError:
                pass
            data = bytearray(outgoing.read())
            if flight == wrong_flight and data:
                if chance.random() < 0.3:
                    del data[chance.randrange(len(data)) :]
                else:
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            writer.write(data)
            if flight >= wrong_flight:
                break
            if not has_shaken:
                incoming.write(await reader.read(65536))
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):
            while await reader.read(65536):
                pass
    writer.close()


async def test_handshakes_take_as_long_as_they_may(contexts: Contexts) -> None:
    async with serve_wire() as stand:
        secure(stand, contexts, handshake_ms=50)
        reader, writer = await asyncio.open_connection("127.0.0.1", stand.port)
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        writer.close()
        await stand.settle(handshakes_late=1, handshakes_failed=1, connections_open=0)
        assert stand.wire.take_tls_failure() == (Role.EXTERNAL, "it takes too long")
        assert stand.wire.take_tls_failure() is None
