"""What roles cost a hit: processor time of the wire's thread for a call, with and without them.

One thread of the wire before a runtime of the test's kind; batches of calls by one client, in turn
without the header, with it but nobody asked, and with both. Medians of the thread's own clock, so
that other work on the machine adds cache misses and no time.

    .venv/bin/python bench/access.py            some seconds
    .venv/bin/python bench/access.py --quick    fewer rounds
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import sys
from pathlib import Path

from _goals import Goal, judge

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm.core.access import parse_access
from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from mm.edge.wire_access import wire_access
from tests.edge.raw_h2 import REQUEST, RawPeer, connect
from tests.wire.stand import serve_wire

CALLS = 100
ROUNDS = 31
ROUNDS_QUICK = 5
#: What a token or a name of a certificate may cost.
GOAL = 1.05
TOKEN = "f3" * 32
HEAD: HeaderList = [(n, b"/t.S/Unary" if n == b":path" else v) for n, v in REQUEST]
SHOWN = (b"authorization", b"Bearer " + TOKEN.encode())


async def batch(peer: RawPeer, headers: HeaderList) -> None:
    """Make calls, a few at a time, and wait until all have their answers."""
    for _ in range(CALLS // 20):
        ids = []
        for _ in range(20):
            ids.append(peer.begin(headers))
            peer.send(ids[-1], frame_message(b"x" * 100), end=True)
        for stream_id in ids:
            answer, _ = await peer.wait_answer(stream_id)
            assert answer[b"grpc-status"] == b"0"


async def measure(rounds: int) -> int:
    """Measure, print a line for each kind, and answer what the shell gets."""
    shop = {"roles": ["infer"], "tokenSha256": [hashlib.sha256(TOKEN.encode()).hexdigest()]}
    asked = wire_access(parse_access(json.dumps({"identities": {"shop": shop}})))
    own = [*HEAD, (b"mm-model-id", b"m")]
    kinds = {
        "no header, nobody asked": (own, None),
        "header, nobody asked (it goes on)": ([*own, SHOWN], None),
        "header, asked (it ends here)": ([*own, SHOWN], asked),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    async with serve_wire() as stand, connect(stand.port) as peer:
        clock = f"/proc/self/task/{stand.wire._threads[0].native_id}/schedstat"

        def spent_ns() -> int:
            with open(clock) as file:
                return int(file.read().split()[0])

        await batch(peer, own)
        for _ in range(rounds):
            for kind, (headers, access) in kinds.items():
                stand.configure(access=access)
                before = spent_ns()
                await batch(peer, headers)
                found[kind].append((spent_ns() - before) / CALLS)
                stand.runtime.metadata.clear()
                stand.runtime.requests.clear()
                stand.runtime.remaining_s.clear()
    first = statistics.median(next(iter(found.values())))
    for kind, values in found.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(
            f"{kind:36} {median / 1000:6.1f} us a call ({low / 1000:.1f} to {high / 1000:.1f}),"
            f" {median / first:.3f}"
        )
    _, passed, ended = found.values()
    ratio = statistics.median(mine / other for mine, other in zip(ended, passed, strict=True))
    return judge([Goal("asked, beside the same call that nobody asked", ratio, "<=", GOAL)])


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    return asyncio.run(measure(ROUNDS_QUICK if parser.parse_args().quick else ROUNDS))


if __name__ == "__main__":
    sys.exit(main())
