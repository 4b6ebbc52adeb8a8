"""How fast the table answers a call, beside a plain C hash, two LRUs of Python, and its twin.

One lookup is what a hit costs: find, pin, touch, unpin. The models are popular by Zipf's law in
an order that has nothing to do with where they lie; each lookup brings its own copy of the id, so
no key is in the CPU's caches. "16 at a time" is how the data plane will look up: all calls that one
turn of its loop brought. All contenders run in each round; a figure is the median of its rounds, in
the thread's own CPU time (cores may be shared). Rates of other machines do not compare; ratios do.
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import statistics
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cachetools  # noqa: E402  (the root must be on the path first)

from bench._goals import Goal, judge  # noqa: E402
from bench.building import load  # noqa: E402
from mm import _lru, _lru_py  # noqa: E402
from mm.table import CopyState  # noqa: E402

#: Lookups a second of one thread, with so many models; in those of an OrderedDict (issue 3).
RATE_GOAL, RATE_GOAL_MODELS = 20e6, 100_000
RATIO_GOAL = 10
#: Of each model, with so many.
MEMORY_GOAL_BYTES, MEMORY_GOAL_MODELS = 300, 1_000_000
SEED = 5

Contender = Callable[[], float]


def model_ids(count: int, chance: random.Random) -> list[str]:
    """Answer ids as KServe makes them."""
    return [f"model-{each:06}__isvc-{chance.getrandbits(40):010x}" for each in range(count)]


def zipf(count: int, lookups: int, chance: random.Random) -> list[int]:
    """Answer which model each lookup asks for: the n-th popular 1/n as often as the first."""
    cumulative = list(itertools.accumulate(1 / rank for rank in range(1, count + 1)))
    models = list(range(count))
    chance.shuffle(models)
    return chance.choices(models, cum_weights=cumulative, k=lookups)


def fill(table: Any, ids: list[str]) -> Any:
    """Give each model a ready copy here."""
    for now_ms, model_id in enumerate(ids):
        table.put(model_id, 1, now_ms)
        table.set_state(model_id, CopyState.READY)
    return table


class Bench:
    """The contenders, each a function that answers its lookups a second."""

    def __init__(self, ids: list[str], order: list[int], loops: Any) -> None:
        self.loops = loops
        keys = [each.encode() for each in ids]
        self.stream = loops.Stream(keys, order)
        # Python's contenders get fewer lookups, and a new string (no hash kept) for each.
        self.few = order[: max(1, len(order) // 10)]
        self.keys = keys
        self.ids = ids
        self.table = fill(_lru.Table(len(ids)), ids)
        self.twin = fill(_lru_py.Table(len(ids)), ids)
        self.plain = loops.PlainHash(keys)
        self.ordered = OrderedDict.fromkeys(ids, 0)
        self.cachetools: Any = cachetools.LRUCache(len(ids))
        self.cachetools.update(dict.fromkeys(ids, 0))
        self.now_ms = 10**9

    def contenders(self) -> dict[str, Contender]:
        """Answer them by the name under which they are printed."""
        return {
            "table, 16 at a time": lambda: self._loop(batched=True),
            "table, one at a time": lambda: self._loop(batched=False),
            "plain C hash, 16 at a time": lambda: self._plain(batched=True),
            "plain C hash, one at a time": lambda: self._plain(batched=False),
            "OrderedDict": lambda: self._python(self._use_ordered),
            "cachetools.LRUCache": lambda: self._python(self._use_cachetools),
            "table, from Python": lambda: self._python(lambda keys: self._use(self.table, keys)),
            "twin": lambda: self._python(lambda keys: self._use(self.twin, keys)),
        }

    def both_cores(self, thread_count: int) -> float:
        """Answer the rate of one of so many threads that look up at the same time."""
        self.now_ms += 1_000
        took_s: list[float] = []

        def run() -> None:
            took_s.append(self.loops.look_up(self.table, self.stream, self.now_ms, True))

        threads = [threading.Thread(target=run) for _ in range(thread_count)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return float(self.stream.count / statistics.mean(took_s))

    def _loop(self, *, batched: bool) -> float:
        self.now_ms += 1_000
        took_s = self.loops.look_up(self.table, self.stream, self.now_ms, batched)
        return float(self.stream.count / took_s)

    def _plain(self, *, batched: bool) -> float:
        self.now_ms += 1_000
        took_s = self.plain.look_up(self.stream, self.now_ms, batched)
        return float(self.stream.count / took_s)

    def _python(self, use: Callable[[list[str]], None]) -> float:
        self.now_ms += 1_000
        keys = [self.keys[each].decode() for each in self.few]
        began_s = time.thread_time()
        use(keys)
        return len(keys) / (time.thread_time() - began_s)

    def _use_ordered(self, keys: list[str]) -> None:
        ordered, move_to_end = self.ordered, self.ordered.move_to_end
        for key in keys:
            if key in ordered:
                move_to_end(key)

    def _use_cachetools(self, keys: list[str]) -> None:
        cache = self.cachetools
        for key in keys:
            cache.get(key)

    def _use(self, table: Any, keys: list[str]) -> None:
        pin, touch, unpin, now_ms = table.pin, table.touch, table.unpin, self.now_ms
        for key in keys:
            if pin(key):
                touch(key, now_ms)
                unpin(key)


def resident_bytes() -> int:
    """Answer the memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory_a_model(count: int, id_length: int) -> tuple[float, float]:
    """Answer bytes a model, as the table counts them and as the process grew."""
    table = _lru.Table(count)
    before, empty = resident_bytes(), table.memory_bytes()
    for each in range(count):
        table.put(f"{each:0{id_length}}", 1, each)
    counted = (table.memory_bytes() - empty) / count
    return counted, (resident_bytes() - before) / count


def main() -> int:
    """Print the table of figures; answers what the shell gets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer lookups, rounds and models")
    parser.add_argument("--models", type=int, default=100_000, help="%(default)s")
    parser.add_argument("--lookups", type=int, default=2_000_000, help="a round: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="%(default)s")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lookups, arguments.rounds = 400_000, 3

    chance = random.Random(SEED)
    ids = model_ids(arguments.models, chance)
    order = zipf(arguments.models, arguments.lookups, chance)
    bench = Bench(ids, order, load("mm_bench_lru_loops", ROOT / "bench" / "lru_loops.pyx"))
    contenders = bench.contenders()
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    pairs: list[float] = []
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            rates[name].append(contender())
        pairs.append(bench.both_cores(2))

    medians = {name: statistics.median(each) for name, each in rates.items()}
    base = medians["OrderedDict"]
    print(
        f"{arguments.models:,} models, Zipf, {arguments.lookups:,} lookups a round, "
        f"median of {arguments.rounds}"
    )
    print(f"{'find + pin + touch + unpin':<28} {'million/s':>9} {'ns':>7} {'x OrderedDict':>14}")
    for name, rate in medians.items():
        print(f"{name:<28} {rate / 1e6:9.2f} {1e9 / rate:7.1f} {rate / base:14.1f}")
    two = statistics.median(pairs)
    print(f"{'table, 2 threads, each':<28} {two / 1e6:9.2f} {1e9 / two:7.1f} {two / base:14.1f}")
    best = medians["table, 16 at a time"]
    is_full = arguments.models >= RATE_GOAL_MODELS
    goals = [
        Goal(what, figure, ">=", target, unit, is_full_size=is_full)
        for what, figure, target, unit in (
            ("lookups of one thread, 16 at a time", best / 1e6, RATE_GOAL / 1e6, "million/s"),
            ("lookups to OrderedDict's", best / base, RATIO_GOAL, "x"),
        )
    ]
    count = 100_000 if arguments.quick else MEMORY_GOAL_MODELS
    for id_length in (36, 64):
        counted, grown = memory_a_model(count, id_length)
        for what, figure in (("counted", counted), ("the process grew", grown)):
            text = f"{count:,} ids of {id_length} bytes: {what}, each"
            is_full = count >= MEMORY_GOAL_MODELS
            goals.append(Goal(text, figure, "<=", MEMORY_GOAL_BYTES, "bytes", is_full_size=is_full))
    return judge(goals)


if __name__ == "__main__":
    sys.exit(main())
