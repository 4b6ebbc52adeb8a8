"""What the wire tells tier 2 of an attempt is bounded, whatever was answered there."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import pytest

from mm.core.access import parse_access
from mm.core.headers import HeaderList
from mm.edge.h2 import IncomingCall
from mm.edge.h2.messages import frame_message
from mm.edge.tls import Contexts, make_contexts
from mm.edge.tls_files import read_files
from mm.edge.wire_access import wire_access
from mm.tls_settings import TlsSettings
from mm.wire import Role, WireTls
from tests.edge.raw_h2 import RawPeer, listen
from tests.identities import make
from tests.wire.frames import OK, request
from tests.wire.stand import WireStand, serve_wire

pytestmark = pytest.mark.anyio
#: Beyond what is reserved for a request with few headers.
OWN_COUNT = 60
MESSAGES_COUNT = 40


async def repeats(peer: RawPeer) -> None:
    """Refuse each call, and say why many times."""
    peer.start()
    messages = [(b"grpc-message", b"reason %d" % number) for number in range(MESSAGES_COUNT)]
    while True:
        stream_id = await peer.wait_ended()
        peer.h2.send_headers(stream_id, OK)
        trailers = [(b"grpc-status", b"14"), *messages]
        peer.h2.send_headers(stream_id, trailers, end_stream=True)
        peer.flush()


def noted_words(stand: WireStand) -> list[HeaderList]:
    """Have what the wire says noted, for each call that tier 2 gets."""
    server = stand.tier2_servers[Role.EXTERNAL]
    serve, words = server.handler, list[HeaderList]()

    async def note(call: IncomingCall) -> None:
        words.append([each for each in call.head.mesh if each[0].startswith(b"mm-wire-")])
        await serve(call)

    server.handler = note
    return words


@pytest.fixture
def secured(tmp_path: Path) -> tuple[Contexts, ssl.SSLContext]:
    """What a server goes by that wants certificates, and a client that has one."""
    server, client = make("server"), make("me")
    key, certificate = server.write(tmp_path / "server").values()
    own_key, own_certificate = client.write(tmp_path / "client").values()
    settings = TlsSettings(
        key_path=key,
        certificate_path=certificate,
        client_auth="require",
        trust_paths=(own_certificate,),
    )
    dialled = ssl.create_default_context(cadata=server.certificate_pem.decode())
    dialled.set_alpn_protocols(["h2"])
    dialled.load_cert_chain(own_certificate, own_key)
    return make_contexts(settings, read_files(settings)), dialled


async def test_an_answer_with_many_reasons_and_a_client_with_a_certificate(
    secured: tuple[Contexts, ssl.SSLContext],
) -> None:
    """All that the wire may add to one list, some of it many times: it wrote beyond its end."""
    contexts, dialled = secured
    identity = {"roles": ["infer"], "certificateNames": ["CN:me"]}
    access = wire_access(parse_access(json.dumps({"identities": {"me": identity}})))
    async with (
        listen(repeats) as (address, _),
        serve_wire(runtime_port=int(address.rpartition(":")[2])) as stand,
    ):
        stand.configure(tls=WireTls(contexts.clients), access=access)
        words = noted_words(stand)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", stand.port, ssl=dialled, server_hostname="localhost"
        )
        peer = RawPeer(reader, writer, client_side=True)
        peer.start()
        own = [(b"x-%d" % number, b"v") for number in range(OWN_COUNT)]
        stream_id = peer.begin([*request(), *own])
        peer.send(stream_id, frame_message(b"q"), end=True)
        headers, _ = await peer.wait_answer(stream_id)
        await peer.close()
        assert headers[b"grpc-status"] == b"0"  # tier 2 asks another one
        assert stand.counts.replayed == 1
        (told,) = words
        names = [name for name, _ in told]
        assert len(names) == len(set(names)) == 5, names
        assert dict(told)[b"mm-wire-message"] == b"reason %d" % (MESSAGES_COUNT - 1)
        assert dict(told)[b"mm-wire-certificate"] == b"me"
