"""How fast the store writes, beside bare aetcd transactions against the same etcd.

Conditional creates, 64 at once, from one process: aetcd's own `client.transaction`, our `write` on
its own, and our `write` with concurrent ones grouped into one transaction. All contenders run in
each round, in changing order, and a figure is the median of its rounds. Then one table is read in
pages. Rates of other machines do not compare; ratios do.

    .venv/bin/python bench/store.py            about half a minute
    .venv/bin/python bench/store.py --quick    a smaller one, to see that it works
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aetcd  # noqa: E402  (the root must be on the path first)

from bench._goals import Goal, judge  # noqa: E402
from mm.edge.embedded_etcd import embedded_etcd  # noqa: E402
from mm.edge.etcd_store import EtcdStore  # noqa: E402
from mm.mesh.ports import Write  # noqa: E402

#: Of grouped writes, in bare transactions (issue 3).
RATIO_GOAL = 0.5
VALUE = b'{"type":"example","mPath":"models/some-model","lu":1764000000000}'

Put = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rounds: int
    writes_a_round: int
    at_once: int


FULL = Sizes(rounds=9, writes_a_round=4_000, at_once=64)
QUICK = Sizes(rounds=3, writes_a_round=500, at_once=64)


async def rate_of(put: Put, prefix: str, sizes: Sizes) -> float:
    """Answer writes/s of one round."""
    numbers = iter(range(sizes.writes_a_round))

    async def worker() -> None:
        for number in numbers:
            await put(f"{prefix}/{number}")

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(sizes.at_once)))
    return sizes.writes_a_round / (time.perf_counter() - began)


def bare(client: aetcd.Client) -> Put:
    """Create by aetcd's own transaction."""

    async def put(key: str) -> None:
        name = key.encode()
        succeeded, _ = await client.transaction(
            compare=[client.transactions.version(name) == 0],
            success=[client.transactions.put(name, VALUE)],
            failure=[client.transactions.get(name)],
        )
        assert succeeded

    return put


def ours(store: EtcdStore) -> Put:
    """Create by the store's ``write``."""

    async def put(key: str) -> None:
        result = await store.write(Write(key, VALUE, if_revision=0))
        assert result.succeeded

    return put


async def run(sizes: Sizes) -> int:
    """Measure and print everything; answers what the shell gets."""
    async with (
        embedded_etcd() as etcd,
        aetcd.Client(host=etcd.endpoint.host, port=etcd.endpoint.port) as client,
        EtcdStore(etcd.target, timeout_s=30, group_writes=False) as single,
        EtcdStore(etcd.target, timeout_s=30) as grouping,
    ):
        contenders = {
            "bare aetcd transactions": bare(client),
            "store, each on its own": ours(single),
            "store, grouped": ours(grouping),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        order = list(contenders)
        for number in range(-1, sizes.rounds):
            order.append(order.pop(0))
            for name in order:
                rate = await rate_of(contenders[name], f"/{number}/{name}", sizes)
                if number >= 0:  # the first round warms up
                    rates[name].append(rate)

        medians = {name: statistics.median(each) for name, each in rates.items()}
        base = medians["bare aetcd transactions"]
        print(f"{'creates, ' + str(sizes.at_once) + ' at once':<32}{'/s':>8}{'ratio':>8}")
        for name, median in medians.items():
            print(f"{name:<32}{median:8.0f}{median / base:8.2f}")

        began = time.perf_counter()
        table = await grouping.list("/")
        took_ms = (time.perf_counter() - began) * 1000
        print(f"reading a table of {len(table.items)} records in pages: {took_ms:.0f} ms")
        grouped = medians["store, grouped"] / base
        return judge([Goal("grouped writes to bare transactions", grouped, ">=", RATIO_GOAL)])


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller numbers")
    arguments = parser.parse_args()
    return asyncio.run(run(QUICK if arguments.quick else FULL))


if __name__ == "__main__":
    sys.exit(main())
