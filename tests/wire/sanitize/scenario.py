"""What ``run.py`` starts under a sanitizer: two threads of the wire, Python beside them.

Some of the calls go over TLS to another instance, of one thread; all are measured, and that is read
meanwhile.

No grpcio in here: what is not instrumented would be taken for racing. The runtime is a process
(``bench/upstream.c``); tier 2 and the clients are Python.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mm._lru import Table
from mm.core.access import parse_access
from mm.core.histograms import MESSAGE_BYTES, TIME_MS
from mm.edge.h2 import EXTERNAL_LIMITS, PEER_LIMITS, GrpcServer, IncomingCall
from mm.edge.h2.listening import listening_socket
from mm.edge.h2.messages import frame_message
from mm.edge.tls import make_contexts
from mm.edge.tls_files import read_files
from mm.edge.wire_access import wire_access
from mm.edge.wired import Tier2
from mm.errors import MeshError, StatusCode
from mm.table import CopyState
from mm.tls_settings import TlsSettings
from mm.wire import Measures, Method, Role, Wire, WireSettings, WireTls
from mm.wire.addresses import Target, inet_sockaddr
from tests.edge.raw_h2 import REQUEST, connect
from tests.identities import make

MODELS = [f"model-{each:02}" for each in range(12)]
#: At the other instance.
FAR_MODELS = [f"far-{each:02}" for each in range(4)]
MEASURES = Measures(
    tuple(int(bound * 1000) for bound in TIME_MS), tuple(map(int, MESSAGE_BYTES)), models_max=8
)
#: Of clients; whoever shows another one is refused.
TOKEN = "shop-token"
SHOP = {"roles": ["infer"], "tokenSha256": [hashlib.sha256(TOKEN.encode()).hexdigest()]}
OPS = {"roles": ["manage"], "certificateNames": ["CN:ops"]}
ACCESSES = [
    wire_access(parse_access(json.dumps(each)))
    for each in (
        {"identities": {"shop": SHOP}},
        {"identities": {"ops": OPS, "shop": SHOP}, "passTokens": True},
    )
]


async def cold(_call: IncomingCall) -> None:
    """What tier 2 says of every call."""
    raise MeshError("cold", code=StatusCode.UNAVAILABLE)


async def call_all(port: int, chance: random.Random, count: int) -> int:
    """Make calls one after the other; answer how many were served."""
    served = 0
    async with connect(port) as client:
        for _ in range(count):
            token = TOKEN if chance.random() < 0.95 else "another"
            stream_id = client.begin(
                [
                    *REQUEST,
                    (b"mm-model-id", chance.choice(MODELS + FAR_MODELS).encode()),
                    (b"authorization", f"Bearer {token}".encode()),
                ]
            )
            if chance.random() < 0.1:
                client.reset(stream_id)
                continue
            length = chance.randrange(128)
            message = b"\x12" + bytes([length]) + bytes(length)  # an id is put behind it at times
            client.send(stream_id, frame_message(message), end=True)
            headers, _ = await client.wait_answer(stream_id)
            expected = (b"0", b"14") if token == TOKEN else (b"16",)
            assert headers[b"grpc-status"] in expected, headers
            served += headers[b"grpc-status"] == b"0"
    return served


async def disturb(
    table: Table, wire: Wire, settings: WireSettings, there: Target, chance: random.Random
) -> None:
    """Load and unload, configure, name peers, read whatever the threads tell, without end."""
    while True:
        model_id = chance.choice(MODELS)
        if table.state(model_id) is CopyState.READY:
            table.begin_unload(model_id)
        elif not table.in_flight(model_id):
            table.put(model_id, 1, 1)
            table.set_flags(model_id, chance.randrange(100) << 8)
            table.set_state(model_id, CopyState.READY)
        table.set_alias("v", chance.choice(MODELS))
        step = chance.randrange(20)
        if step == 0:
            wire.configure(replace(settings, access=chance.choice(ACCESSES)))
        elif step == 1:
            handle = table.add_instance("peer")
            nobody = Target("127.0.0.1:1", inet_sockaddr("127.0.0.1", 1), handle)
            wire.set_peers([nobody, there] if chance.random() < 0.9 else [nobody])
        elif step == 2:
            wire.statistics()
            table.take_busy()
        elif step == 3:
            for row in wire.calls():
                assert row.path in ("", "/t.S/Echo"), row.path
            wire.peer_traffic([there.handle])
            wire.take_reports()
        elif step == 4:
            wire.take_failures()
            wire.take_flood()
            wire.take_crowded_address()
            wire.take_tls_failure()
        await turn()


async def turn() -> None:
    """Let the others run."""
    await asyncio.wait((asyncio.get_running_loop().create_future(),), timeout=0.0005)


@contextmanager
def other_instance(upstream: Target, tls: WireTls) -> Iterator[tuple[Table, int]]:
    """Another instance with copies of its own; answers its port for peers, which speak TLS."""
    table = Table(1000)
    for model_id in FAR_MODELS:
        table.put(model_id, 1, 1)
        table.set_state(model_id, CopyState.READY)
    server = GrpcServer(cold, limits=PEER_LIMITS, external=False)
    wire = Wire(1, Tier2({Role.PEER: server}).connect, MEASURES)
    wire.start(WireSettings(table=table, instance=b"there", tls=tls))
    wire.set_runtime(upstream)
    listener = listening_socket("127.0.0.1", 0)
    wire.listen(listener, Role.PEER)
    try:
        yield table, listener.getsockname()[1]
    finally:
        wire.close()


def make_tls(directory: Path) -> WireTls:
    """Between instances alone: clients speak plain text."""
    key, certificate = make("peer").write(directory).values()
    settings = TlsSettings(key_path=key, certificate_path=certificate, peers=True)
    contexts = make_contexts(settings, read_files(settings))
    return WireTls(None, contexts.peers, contexts.to_peers)


async def run(upstream_port: int, steps: int) -> int:
    """Answer how many calls were served from the table."""
    upstream = Target("upstream", inet_sockaddr("127.0.0.1", upstream_port))
    with tempfile.TemporaryDirectory() as name:
        tls = make_tls(Path(name) / "tls")
    with other_instance(upstream, tls) as (far_table, far_port):
        served = await call_both(upstream, tls, far_port, steps)
    assert not any(far_table.in_flight(model_id) for model_id in FAR_MODELS)
    return served


async def call_both(upstream: Target, tls: WireTls, far_port: int, steps: int) -> int:
    """Answer how many calls were served from the table."""
    chance = random.Random(steps)
    table = Table(1000)
    server = GrpcServer(cold, limits=EXTERNAL_LIMITS, external=True)
    wire = Wire(2, Tier2({Role.EXTERNAL: server}).connect, MEASURES)
    methods = {b"/t.S/Echo": Method(injection_path=(1,))}
    settings = WireSettings(
        table=table, methods=methods, instance=b"here", tls=tls, access=ACCESSES[0]
    )
    wire.start(replace(settings, methods={}))
    wire.set_runtime(upstream)
    handle = table.add_instance("there")
    for model_id in FAR_MODELS:
        table.set_peers(model_id, [handle])
    there = Target(f"127.0.0.1:{far_port}", inet_sockaddr("127.0.0.1", far_port), handle)
    wire.set_peers([there])
    listener = listening_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    wire.listen(listener, Role.EXTERNAL)
    disturber = asyncio.ensure_future(disturb(table, wire, settings, there, chance))
    served = await asyncio.gather(*(call_all(port, chance, steps) for _ in range(4)))
    disturber.cancel()
    told = wire.statistics()
    assert told.calls_there, "no call went to the other instance"
    assert told.handshakes, "and none over TLS"
    wire.drain()
    while wire.statistics().calls_open:
        await turn()
    await asyncio.to_thread(wire.close)
    await server.stop(0)
    assert not any(table.in_flight(model_id) for model_id in MODELS)
    table.check_invariants()
    return sum(served)


def main() -> int:
    """Answer 0 if calls were served; a sanitizer's own finding exits otherwise."""
    binary, steps = sys.argv[1], int(sys.argv[2])
    with subprocess.Popen([binary], stdout=subprocess.PIPE, text=True, env={}) as upstream:
        assert upstream.stdout is not None
        try:
            served = asyncio.run(run(int(upstream.stdout.readline()), steps))
        finally:
            upstream.kill()
    print(f"{served} calls served from the table")
    return 0 if served else 1


if __name__ == "__main__":
    sys.exit(main())
