"""What ``run.py`` starts under ThreadSanitizer: two threads of the wire, and Python beside them.

No grpcio in here: what is not instrumented would be taken for racing. The runtime is a process
(``bench/upstream.c``); tier 2 and the clients are Python.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys

from mm._lru import Table
from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer, IncomingCall
from mm.edge.h2.listening import listening_socket
from mm.edge.h2.messages import frame_message
from mm.edge.wired import Tier2
from mm.errors import MeshError, StatusCode
from mm.table import CopyState
from mm.wire import Method, Role, Wire, WireSettings
from mm.wire.addresses import Target, inet_sockaddr
from tests.edge.raw_h2 import REQUEST, connect

MODELS = [f"model-{each:02}" for each in range(12)]


async def cold(_call: IncomingCall) -> None:
    """What tier 2 says of every call."""
    raise MeshError("cold", code=StatusCode.UNAVAILABLE)


async def call_all(port: int, chance: random.Random, count: int) -> int:
    """Make calls one after the other; answer how many were served."""
    served = 0
    async with connect(port) as client:
        for _ in range(count):
            stream_id = client.begin([*REQUEST, (b"mm-model-id", chance.choice(MODELS).encode())])
            if chance.random() < 0.1:
                client.h2.reset_stream(stream_id)
                client.flush()
                continue
            length = chance.randrange(128)
            message = b"\x12" + bytes([length]) + bytes(length)  # an id is put behind it at times
            client.send(stream_id, frame_message(message), end=True)
            headers, _ = await client.wait_answer(stream_id)
            assert headers[b"grpc-status"] in (b"0", b"14"), headers
            served += headers[b"grpc-status"] == b"0"
    return served


async def disturb(table: Table, wire: Wire, settings: WireSettings, chance: random.Random) -> None:
    """Load and unload, configure, name peers, read counters, without end."""
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
            wire.configure(settings)
        elif step == 1:
            handle = table.add_instance("peer")
            wire.set_peers([Target("127.0.0.1:1", inet_sockaddr("127.0.0.1", 1), handle)])
        elif step == 2:
            wire.statistics()
            table.take_busy()
        await turn()


async def turn() -> None:
    """Let the others run."""
    await asyncio.wait((asyncio.get_running_loop().create_future(),), timeout=0.0005)


async def run(upstream_port: int, steps: int) -> int:
    """Answer how many calls were served from the table."""
    chance = random.Random(steps)
    table = Table(1000)
    server = GrpcServer(cold, limits=EXTERNAL_LIMITS, external=True)
    wire = Wire(2, Tier2({Role.EXTERNAL: server}).connect)
    settings = WireSettings(table=table, methods={b"/t.S/Echo": Method(injection_path=(1,))})
    wire.start(WireSettings(table=table))
    wire.set_runtime(Target("upstream", inet_sockaddr("127.0.0.1", upstream_port)))
    listener = listening_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    wire.listen(listener, Role.EXTERNAL)
    disturber = asyncio.ensure_future(disturb(table, wire, settings, chance))
    served = await asyncio.gather(*(call_all(port, chance, steps) for _ in range(4)))
    disturber.cancel()
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
