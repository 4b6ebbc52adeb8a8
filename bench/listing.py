"""What lists of models and vmodels cost: whoever asks, and the calls meanwhile.

One process: an instance with a registry of so many models and 10,000 vmodels, its listener, and a
client that asks for page after page as `mm vmodel list` does. "page" is the time of one page, "cpu"
the processor time for it, client and server together, and "loop" the most of that between two turns
of the event loop. "search" is a filter that finds nothing: a page of it looks at 2,000 records. How
fast the machine was, a bare grpclib echo tells that is measured first.

    .venv/bin/python bench/listing.py            1,000,000 models, about two minutes
    .venv/bin/python bench/listing.py --quick    100,000 models
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

import anyio  # noqa: E402  (the root must be on the path first)
from _goals import Goal, judge  # noqa: E402
from registry import item  # noqa: E402
from waiting import measure_echo  # noqa: E402

from mm.cli.mesh import connected, pages  # noqa: E402
from mm.core.ids import ModelId  # noqa: E402
from mm.core.records import VModelRecord  # noqa: E402
from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer  # noqa: E402
from mm.edge.listing import add_listing  # noqa: E402
from mm.edge.protobuf import message_class  # noqa: E402
from mm.edge.unary import ServiceTable  # noqa: E402
from mm.mesh.composition import Parts  # noqa: E402
from mm.mesh.ports import Item, Put, Resync  # noqa: E402
from mm.testing.cluster import running_cluster  # noqa: E402

#: With so many of them the goals are to be reached.
VMODELS, MODELS = 10_000, 1_000_000
VMODELS_S_MAX = 1.0
LOOP_MS_MAX = 20.0
TIMEOUT_S = 60.0
#: Of a list of all models, so many pages are timed.
PAGES = 100


class Ticker:
    """How much processor time passed between two turns of the event loop at most: that does not
    depend on what else the machine does.
    """

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def run(self) -> None:
        """Look at the time in each turn."""
        before = time.thread_time()
        while True:
            await anyio.sleep(0.001)
            now = time.thread_time()
            self.worst_s, before = max(self.worst_s, now - before), now


async def timed(
    address: str, method: str, reply: str, request: Any, pages_max: int
) -> tuple[list[float], float, float, int]:
    """Answer the time of each page, the processor time of all, the worst stand-still, and the
    entries.
    """
    times: list[float] = []
    entries, began_cpu = 0, time.thread_time()
    ticker = Ticker()
    async with connected(address, TIMEOUT_S) as channel, anyio.create_task_group() as group:
        group.start_soon(ticker.run)
        began = time.perf_counter()
        async for page in pages(channel, method, reply, request, TIMEOUT_S):
            times.append(time.perf_counter() - began)
            entries += len(page.models if method == "listModels" else page.vmodels)
            if len(times) >= pages_max:
                break
            began = time.perf_counter()
        group.cancel_scope.cancel()
    return times, time.thread_time() - began_cpu, ticker.worst_s, entries


def fill(parts: Parts, count: int) -> float:
    """Give the instance its records; answers the time that the index took of it, for one id."""
    mirror = parts.registry.mirror
    items: Sequence[Item] = [item(number, with_copies=True) for number in range(count)]
    moved = [Item(mirror.key(each.key.rpartition("/")[2]), each.value, 10**9) for each in items]
    began = time.perf_counter()
    mirror.fold([Resync(moved, 10**9)])
    took_us = (time.perf_counter() - began) / count * 1e6
    vmodels = parts.vmodels.mirror
    ids = mirror.ids.following("", VMODELS)
    vmodels.fold(
        [
            Put(Item(vmodels.key(each.partition("__")[0]), _vmodel(each), 10**9 + number))
            for number, each in enumerate(ids)
        ]
    )
    return took_us


def _vmodel(model_id: str) -> bytes:
    return VModelRecord(ModelId(model_id), ModelId(model_id), "isvc").encode()


async def measure(count: int) -> list[Goal]:
    """Print the table; answers the goals."""
    goals: list[Goal] = []
    async with running_cluster("a") as cluster:
        parts = cluster["a"].node.parts
        fold_us = fill(parts, count)
        gc.collect()
        gc.freeze()  # as the process does after its start, and no full collection (mm.edge.garbage)
        gc.set_threshold(*gc.get_threshold()[:2], 1_000_000_000)
        table = ServiceTable()
        add_listing(table, parts)
        server = GrpcServer(table, limits=EXTERNAL_LIMITS, external=True)
        address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
        models = message_class("mmesh.ListModelsRequest")
        vmodels = message_class("mmesh.ListVModelsRequest")
        print(f"{count:,} models, {VMODELS:,} vmodels; read at the start in {fold_us:.2f} us each")
        print(
            "                          pages  entries   all s   page ms   worst  cpu ms   loop ms"
        )
        for name, method, request in (
            ("all vmodels", "listVModels", vmodels(page_size=1000)),
            ("vmodels, pages of 100", "listVModels", vmodels(page_size=100)),
            ("models", "listModels", models(page_size=1000)),
            ("models, pages of 100", "listModels", models(page_size=100)),
            ("models by prefix", "listModels", models(page_size=100, id_prefix="predictor-00099")),
            ("search", "listModels", models(page_size=100, type="none")),
        ):
            reply = f"mmesh.{method[0].upper()}{method[1:]}Response"
            times, cpu_s, worst_s, entries = await timed(address, method, reply, request, PAGES)
            times.sort()
            middle_s, cpu_s = times[len(times) // 2], cpu_s / len(times)
            if name == "all vmodels":
                goals.append(Goal(f"{name}: entries", entries, ">=", VMODELS, ""))
                goals.append(Goal(name, sum(times), "<=", VMODELS_S_MAX, "s"))
            what, is_full = f"{name}: the loop stands still", count >= MODELS
            goals.append(Goal(what, 1000 * worst_s, "<=", LOOP_MS_MAX, "ms", is_full_size=is_full))
            print(
                f"{name:<25} {len(times):>5} {entries:>8} {sum(times):>7.2f}"
                f" {1000 * middle_s:>9.1f} {1000 * times[-1]:>7.1f} {1000 * cpu_s:>7.1f}"
                f" {1000 * worst_s:>9.1f}",
                flush=True,
            )
        await server.stop(0)
    return goals


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer models")
    count = 100_000 if parser.parse_args().quick else MODELS
    logging.getLogger("mm").addHandler(logging.NullHandler())
    print(f"bare grpclib echo: {measure_echo():.0f} calls/s")
    sys.exit(judge(anyio.run(measure, count)))


if __name__ == "__main__":
    main()
