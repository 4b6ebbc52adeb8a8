"""``fleet-hit-ratio``: how near sixteen caches come to one with all their memory.

Every call goes by Zipf's law with drift to one of 20,000 models of different sizes. The fleet is
the real tables, accounting and placement, with records that are seconds old (``pure_fleet``);
beside it one LRU gets the same calls and has the same usable bytes. A shorter run with real nodes
in virtual time shows that the pure fleet decides as they do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Final

from mm.core.ids import UNIT_BYTES, ModelId
from mm.core.sizing import CacheSizing
from mm.mesh.ports import RuntimeParameters
from mm.testing.scenarios import node_fleet
from mm.testing.scenarios.pure_fleet import PooledLru, PureFleet, misses
from mm.testing.scenarios.report import Figure, ScenarioReport
from mm.testing.scenarios.zipf import ZipfCalls
from mm.testing.scheduling import run_in_virtual_time

INSTANCES_COUNT: Final = 16
MODELS_COUNT: Final = 20_000
EXPONENT: Final = 0.9
#: With the calls of one capacity some 3,000 models change their rank.
DRIFT_CALLS: Final = 100
CALLS_PER_S: Final = 400.0
#: Capacity in per cent of all models' bytes, and calls: fewer where most of them load.
RUNS: Final = ((5, 150_000), (20, 250_000), (50, 620_000))
#: Caches fill meanwhile; it is not counted.
WARM_UP_DIVISOR: Final = 4
POINTS_MAX: Final = 1.0
DEFAULT_UNITS: Final = 128
#: Sizes of models, in units of 8 KiB: 256 KiB to 4 MiB.
SIZES_UNITS: Final = (32, 512)
#: The run on nodes: fewer of all, the same in kind.
NODE_CALLS_COUNT: Final = 20_000
NODE_INSTANCES_COUNT: Final = 4
NODE_MODELS_COUNT: Final = 600
NODE_CAPACITY_PERCENT: Final = 40
NODE_CALLS_PER_S: Final = 40.0


class Work:
    """The models' sizes, and calls of them: (model, size, when)."""

    def __init__(
        self, seed: int, instances_count: int, models_count: int, calls_per_s: float
    ) -> None:
        rng = random.Random(f"fleet sizes {seed}")
        self._seed = seed
        self._calls_per_s = calls_per_s
        self.instances_count = instances_count
        self.ids = [ModelId(f"m{number}") for number in range(models_count)]
        self.sizes = [rng.randrange(*SIZES_UNITS) for _ in range(models_count)]

    def calls(self, count: int) -> Iterator[tuple[ModelId, int, float]]:
        """Iterate over the calls, the same each time."""
        rng = random.Random(f"fleet calls {self._seed}")
        numbers = ZipfCalls(len(self.ids), EXPONENT, DRIFT_CALLS, rng)
        for index, number in enumerate(islice(numbers, count)):
            yield self.ids[number], self.sizes[number], (index + 1) / self._calls_per_s

    def parameters(self, capacity_percent: int) -> RuntimeParameters:
        """Answer the runtime of one instance that has its part of so much of all bytes."""
        total_bytes = sum(self.sizes) * UNIT_BYTES * capacity_percent // 100
        return RuntimeParameters(
            capacity_bytes=total_bytes // self.instances_count,
            default_model_size_bytes=DEFAULT_UNITS * UNIT_BYTES,
            loading_concurrency_max=8,
            load_timeout_ms=90_000,
        )

    def sizing(self, capacity_percent: int) -> CacheSizing:
        """Answer what an instance makes of that."""
        parameters = self.parameters(capacity_percent)
        return CacheSizing.from_runtime(
            capacity_bytes=parameters.capacity_bytes,
            default_model_size_bytes=parameters.default_model_size_bytes,
            loading_concurrency_max=parameters.loading_concurrency_max,
            load_timeout_ms=parameters.load_timeout_ms,
        )


def run(seed: int) -> ScenarioReport:
    """Answer the figures for a seed."""
    return report(seed, RUNS, MODELS_COUNT, NODE_CALLS_COUNT)


def report(
    seed: int, runs: tuple[tuple[int, int], ...], models_count: int, node_calls_count: int
) -> ScenarioReport:
    """Answer the figures of pure runs (capacity in per cent, calls), and of one with nodes."""
    work = Work(seed, INSTANCES_COUNT, models_count, CALLS_PER_S)
    figures = []
    for capacity_percent, calls_count in runs:
        figures += _pure(work, seed, capacity_percent, calls_count)
    calls_count = sum(count for _, count in runs)
    figures.append(Figure("calls in all", "", f"{calls_count:,}", None))
    figures += _with_nodes(seed, node_calls_count)
    return ScenarioReport("fleet-hit-ratio", tuple(figures))


def _pure(work: Work, seed: int, capacity_percent: int, calls_count: int) -> list[Figure]:
    fleet_misses, pooled_misses, fleet = _compare(work, seed, capacity_percent, calls_count)
    loads = fleet.loads_counts.values()
    return [
        _nearness(f"capacity {capacity_percent} %: misses", fleet_misses, pooled_misses),
        Figure(
            f"capacity {capacity_percent} %: most loads on one instance",
            "",
            f"{max(loads) * len(loads) / sum(loads):.2f} x mean,"
            f" {100 * fleet.refusals_count / sum(loads):.1f} % refused once",
            None,
        ),
    ]


def _nearness(text: str, fleet_misses: float, pooled_misses: float) -> Figure:
    return Figure(
        text,
        f"<= {pooled_misses:.2f} % pooled + {POINTS_MAX:g}",
        f"{fleet_misses:.2f} % ({fleet_misses - pooled_misses:+.2f})",
        fleet_misses <= pooled_misses + POINTS_MAX,
    )


def _compare(
    work: Work, seed: int, capacity_percent: int, calls_count: int
) -> tuple[float, float, PureFleet]:
    rng = random.Random(f"fleet choices {seed} {capacity_percent}")
    fleet = PureFleet(work.instances_count, work.sizing(capacity_percent), rng)
    pooled = PooledLru(fleet.usable_units)
    hits, pooled_hits = [], []
    for model_id, size_units, now_s in work.calls(calls_count):
        hits.append(fleet.call(model_id, size_units, now_s))
        pooled_hits.append(pooled.call(model_id, size_units, now_s))
    fleet.check()
    counted = slice(calls_count // WARM_UP_DIVISOR, None)
    return misses(hits[counted]), misses(pooled_hits[counted]), fleet


def _with_nodes(seed: int, calls_count: int) -> list[Figure]:
    work = Work(seed, NODE_INSTANCES_COUNT, NODE_MODELS_COUNT, NODE_CALLS_PER_S)
    title = f"{calls_count:,} calls of {NODE_INSTANCES_COUNT} instances: misses"
    pure, pooled, _ = _compare(work, seed, NODE_CAPACITY_PERCENT, calls_count)
    uncounted = calls_count // WARM_UP_DIVISOR
    main = partial(
        node_fleet.loads_of,
        seed,
        work.instances_count,
        work.parameters(NODE_CAPACITY_PERCENT),
        dict(zip(work.ids, work.sizes, strict=True)),
        list(work.calls(calls_count)),
        uncounted,
    )
    loads_count, figures = run_in_virtual_time(main, f"fleet nodes {seed}")
    nodes = 100 * loads_count / (calls_count - uncounted)
    return [
        Figure(f"{title}, one LRU", "", f"{pooled:.2f} %", None),
        Figure(f"{title}, pure fleet", "", f"{pure:.2f} %", None),
        Figure(
            f"{title}, real nodes",
            f"pure fleet +- {POINTS_MAX:g}",
            f"{nodes:.2f} % ({nodes - pure:+.2f})",
            abs(nodes - pure) <= POINTS_MAX,
        ),
        *figures,
    ]
