"""A wire between mutated clients and mutated upstreams, and the oracle beside them. For mutated
clients there is the Python data plane as well, of which the wire's tier 2 is made.

After so many executions a well-behaved client makes a call, which has to be answered, and rightly;
at the end all that the wire counts as open has to be gone. A thread that died, or a sanitizer that
objects, ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from anyio.from_thread import BlockingPortal, start_blocking_portal

from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from mm.edge.tls import Contexts, make_contexts
from mm.edge.tls_files import read_files
from mm.tls_settings import TlsSettings
from mm.wire import Method, WireTls
from tests.edge.upstream import serve_proxy
from tests.identities import make
from tests.wire.fuzz.mutations import NAMED, conversations, mutated, request
from tests.wire.fuzz.upstream import Upstream, serve_upstream
from tests.wire.h2_talk import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PATIENCE_S,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Talk,
    block,
    frame,
)
from tests.wire.stand import WireStand, serve_wire

#: Executions between two calls of the well-behaved client.
_BETWEEN: Final = 10
#: Calls of one execution against a mutated upstream.
_AT_ONCE: Final = 4
#: For an answer that may never come.
_SHORT: Final = (b"grpc-timeout", b"20m")
_NO_LINGER: Final = struct.pack("ii", 1, 0)


@dataclass
class Stand:
    """A wire, and one client that keeps to every rule."""

    port: int
    beside: Talk
    #: The model that it calls: where it is served answers are right.
    model_id: bytes
    upstream: Upstream | None
    context: ssl.SSLContext | None = None
    calls: int = 0

    def call(self) -> None:
        """Have a call answered rightly."""
        self.calls += 1
        stream_id = 2 * self.calls - 1
        token = b"call %d" % self.calls
        headers = request(b"/t.S/Unary", (b"mm-model-id", self.model_id))
        self.beside.send(
            frame(HEADERS, END_HEADERS, stream_id, block(headers))
            + frame(DATA, END_STREAM, stream_id, frame_message(token))
        )
        answer = self.beside.wait_end(stream_id)
        assert answer.headers.get(b"grpc-status") == b"0", answer
        assert answer.body == frame_message(b"echo:" + token), answer
        del self.beside.answers[stream_id]


def say(stand: Stand, seed: int) -> None:
    """Be a client who breaks rules, and leaves in one of several ways."""
    chance = random.Random(seed)
    talks = conversations()
    chosen = chance.randrange(len(talks))
    others = [piece for number, talk in enumerate(talks) if number != chosen for piece in talk]
    said = b"".join(mutated(talks[chosen], others, chance))
    with closing(socket.create_connection(("127.0.0.1", stand.port), PATIENCE_S)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            _send(sock, said, chance)
            _leave(sock, chance)


def shake(stand: Stand, seed: int) -> None:
    """Speak TLS, and spoil one record of it, of the handshake or after it."""
    chance = random.Random(seed)
    assert stand.context is not None
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = stand.context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    left = chance.randrange(6)
    parts = chance.choice(conversations())
    with closing(socket.create_connection(("127.0.0.1", stand.port), PATIENCE_S)) as sock:
        with contextlib.suppress(ConnectionError):
            while True:
                is_shaking = _shake_on(tls)
                if not is_shaking and parts:
                    tls.write(parts[0])
                    parts = parts[1:]
                said = outgoing.read()
                if left == 0 or not (is_shaking or parts):
                    sock.sendall(b"".join(mutated([said], [], chance)))
                    _hear_out(sock)
                    return
                left -= 1
                sock.sendall(said)
                if is_shaking:
                    incoming.write(sock.recv(65536))


def _shake_on(tls: ssl.SSLObject) -> bool:
    """Go on with a handshake; answer whether it goes on after that."""
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return True
    return False


def ask(stand: Stand, seed: int) -> None:
    """Call where answers are wrong: each call has to end all the same, by its time at least."""
    chance = random.Random(seed)
    model_id = b"h" if stand.model_id == b"m" else b"m"
    headers: HeaderList = [*request(b"/t.S/Unary", (b"mm-model-id", model_id), _SHORT)]
    with closing(_greeted(stand.port)) as sock:
        conversation = Talk(sock)
        for number in range(_AT_ONCE):
            stream_id = 2 * number + 1
            message = frame_message(b"%d of %d" % (number, seed))
            said = frame(HEADERS, END_HEADERS, stream_id, block(headers))
            conversation.send(said + frame(DATA, END_STREAM, stream_id, message))
            if chance.random() < 0.1:
                conversation.send(frame(RST_STREAM, 0, stream_id, b"\0\0\0\x08"))
                conversation.answer(stream_id).reset = 8
        for number in range(_AT_ONCE):
            conversation.wait_end(2 * number + 1)


def _greeted(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    grant = frame(WINDOW_UPDATE, 0, 0, b"\x3f\xff\xff\xff")
    sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + grant)
    return sock


def _send(sock: socket.socket, said: bytes, chance: random.Random) -> None:
    """In one piece, or in several, which the wire may get as several."""
    while said:
        size = len(said) if chance.random() < 0.5 else chance.randint(1, len(said))
        sock.sendall(said[:size])
        said = said[size:]


def _hear_out(sock: socket.socket) -> None:
    """Say that nothing follows, and listen to the end."""
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_WR)
    while sock.recv(65536):
        pass


def _leave(sock: socket.socket, chance: random.Random) -> None:
    """Hear something, or everything, or nothing, or break off."""
    way = chance.randrange(4)
    if way == 0:
        _hear_out(sock)
    elif way == 1:
        sock.recv(65536)
    elif way == 2:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


#: What is fuzzed, and how one execution of it goes.
KINDS: Final[dict[str, Callable[[Stand, int], None]]] = {
    "clients": say,
    "python": say,
    "records": shake,
    "peers": ask,
    "runtimes": ask,
}


def run(stand: Stand, kind: str, seeds: Sequence[int]) -> None:
    """One execution a seed, and the oracle's questions."""
    execute = KINDS[kind]
    for count, seed in enumerate(seeds):
        try:
            execute(stand, seed)
            if count % _BETWEEN == 0:
                stand.call()
        except BaseException as error:
            error.add_note(f"{kind}, seed {seed}")
            raise
    stand.call()


@contextmanager
def _serve_python(portal: BlockingPortal, upstream: Upstream) -> Iterator[int]:
    """The Python data plane, in which no exception may go unnoticed; yields its port."""
    strays: list[dict[str, Any]] = []

    async def listen_for_strays() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, stray: strays.append(stray))

    portal.call(listen_for_strays)
    address = f"127.0.0.1:{upstream.port}"
    with portal.wrap_async_context_manager(serve_proxy(runtime_address=address)) as proxy:
        yield proxy.port
    assert (proxy.server.held_bytes, len(proxy.server.calls), strays) == (0, 0, [])


@contextmanager
def serve(kind: str, contexts: Contexts, client: ssl.SSLContext, seed: int = 0) -> Iterator[Stand]:
    """What one kind is run against. At the end nothing is open, and the table is whole."""
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal("asyncio"))
        upstream, good = None, stack.enter_context(serve_upstream())
        if kind in ("peers", "runtimes"):
            upstream = stack.enter_context(serve_upstream(seed))
        if kind == "python":
            port = stack.enter_context(_serve_python(portal, good))
        else:
            runtime = upstream if upstream and kind == "runtimes" else good
            peer = (good if kind == "runtimes" else upstream) if upstream else None
            tls = WireTls(contexts.clients) if kind == "records" else WireTls()
            port = stack.enter_context(_serve_wire(portal, runtime, peer, tls))
        sock = _greeted(port) if kind != "records" else _secured(port, client)
        beside = Talk(stack.enter_context(closing(sock)))
        stand = Stand(port, beside, b"h" if kind == "runtimes" else b"m", upstream)
        stand.context = client if kind == "records" else None
        stand.call()
        yield stand


@contextmanager
def _serve_wire(
    portal: BlockingPortal, runtime: Upstream, peer: Upstream | None, tls: WireTls
) -> Iterator[int]:
    """A wire with model "m" at a runtime and "h" at a peer; yields its port."""
    with portal.wrap_async_context_manager(serve_wire(runtime_port=runtime.port)) as wire:
        if peer is not None:
            portal.call(wire.add_peer, "h", peer.port)
        named = Method(injection_path=(2,), extraction_path=(1,))
        portal.call(lambda: wire.configure(methods={NAMED: named}, tls=tls))
        yield wire.port
        _settle(portal, wire)


def identities(directory: Path) -> tuple[Contexts, ssl.SSLContext]:
    """What the wire shows in TLS, and a client that takes it."""
    server = make("server")
    key, certificate = server.write(directory).values()
    settings = TlsSettings(key_path=key, certificate_path=certificate, peers=True)
    client = ssl.create_default_context(cadata=server.certificate_pem.decode())
    client.set_alpn_protocols(["h2"])
    return make_contexts(settings, read_files(settings)), client


def _secured(port: int, client: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    sock = client.wrap_socket(plain, server_hostname="localhost")
    grant = frame(WINDOW_UPDATE, 0, 0, b"\x3f\xff\xff\xff")
    sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + grant)
    return sock


def _settle(portal: BlockingPortal, wire: WireStand) -> None:
    """Wait until everything is back where it was."""

    async def settle() -> None:
        await wire.settle(calls_open=0, connections_open=0, hits_open=0)

    portal.call(settle)
