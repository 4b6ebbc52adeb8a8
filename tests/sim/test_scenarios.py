"""The scenarios of `mm sim`, scaled down: they meet their targets, can miss them, and repeat.

Each whole scenario takes up to a minute; here each takes a second or so, with fewer calls.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from mm.core.absences import Absences
from mm.core.calls import REFUSALS_MAX
from mm.core.ids import InstanceId, ModelId
from mm.core.placement import Placement, PlacementReason
from mm.mesh.drain import Drain
from mm.mesh.instance_index import InstanceIndex
from mm.mesh.members import Members
from mm.mesh.ports import Item
from mm.mesh.registry import Registry
from mm.mesh.unloader import Unloader
from mm.testing.losses import LossesHeard
from mm.testing.scenarios import (
    SCENARIOS,
    Figure,
    ScenarioReport,
    big_load,
    cold_burst,
    crash,
    day,
    drain,
    fleet_hit_ratio,
    hot,
    join,
    lost_victim,
    pure_fleet,
    rolling,
    store_outage,
    sweep,
    tail,
)
from mm.testing.scenarios.growth import growing_tables
from mm.testing.scenarios.queues import Job, Shape, simulate
from mm.testing.scenarios.zipf import ZipfCalls
from mm.testing.table_sizes import table_sizes


@cache
def small_report(name: str) -> ScenarioReport:
    """A scenario, scaled down."""
    return SMALL[name](1)


def small_fleet(seed: int) -> ScenarioReport:
    return fleet_hit_ratio.report(seed, ((20, 6_000),), 4_000, 200)


SMALL: dict[str, Callable[[int], ScenarioReport]] = {
    "cold-burst": lambda seed: cold_burst.report(seed, 1, cold_burst.KINDS[:1]),
    "big-load": lambda seed: big_load.report(seed, 1),
    "tail": lambda seed: tail.report(seed, 8_000),
    "fleet-hit-ratio": small_fleet,
    "sweep": lambda seed: sweep.report(seed, 1),
    "lost-victim": lambda seed: lost_victim.report(seed, 1_000),
    "rolling": lambda seed: rolling.report(seed, 2, 20.0, 500),
    "day": lambda seed: day.report(seed, 4, 600.0),
    "drain": lambda seed: drain.report(seed, 80, 10.0),
    "crash": lambda seed: crash.report(seed, 48, 5.0),
    "join": lambda seed: join.join_report(seed, 15.0),
    "flap": lambda seed: join.flap_report(seed, 240.0),
    "store-outage": lambda seed: store_outage.report(seed, 300, 25.0),
    "hot": lambda seed: hot.report(seed, 6.0, 0.5),
}


def test_every_scenario_has_a_small_one() -> None:
    assert list(SMALL) == list(SCENARIOS)


@pytest.mark.parametrize("name", SMALL)
def test_a_scenario_meets_its_targets(name: str) -> None:
    report = small_report(name)
    assert report.name == name
    assert report.is_met, "\n".join(report.lines())


#: The others are made of the same parts.
COMPARED = ("cold-burst", "tail", "fleet-hit-ratio", "lost-victim")

_LINES = """
from tests.sim.test_scenarios import COMPARED, small_report
for name in COMPARED:
    print(*small_report(name).lines(), sep="\\n")
"""


def test_a_seed_gives_the_same_figures_in_every_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LINES],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [line for name in COMPARED for line in small_report(name).lines()]
    assert done.stdout.splitlines() == here
    assert len(here) > 20


def test_another_seed_gives_other_figures() -> None:
    assert tail.report(1, 400) != tail.report(2, 400)


# --- they can miss --------------------------------------------------------------------------------


def test_a_mesh_that_goes_by_its_own_counts_misses_the_tail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def senders_count(routers_count: int, *_: object) -> tail.SendersCount:
        return tail.SendersCount(routers_count)

    monkeypatch.setattr(tail, "MeshRule", senders_count)
    assert not tail.report(1, 4_000).is_met


def test_a_fleet_that_loads_wherever_it_is_asked_misses_the_pooled_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first(view: object, request: object, rng: random.Random) -> Placement:
        name = f"i{min(int(rng.expovariate(0.5)), 15):02}"
        return Placement(InstanceId(name), PlacementReason.OLDEST)

    monkeypatch.setattr(pure_fleet, "choose_instance", first)
    monkeypatch.setattr(pure_fleet, "is_still_right", lambda view, request: True)
    work = fleet_hit_ratio.Work(1, 16, 4_000, fleet_hit_ratio.CALLS_PER_S)
    fleet, pooled, _ = fleet_hit_ratio._compare(work, 1, 20, 8_000)
    assert fleet > pooled + fleet_hit_ratio.POINTS_MAX


def test_victims_that_are_unloaded_under_their_calls_answer_wrongly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def at_once(self: Unloader, model_id: ModelId, wait_max_s: float) -> None:
        self._table.begin_unload(model_id)

    monkeypatch.setattr(Unloader, "_wait_idle", at_once)
    report = lost_victim.report(1, 1_000)
    [wrong] = [figure for figure in report.figures if figure.text == "wrong answers"]
    assert wrong.is_met is False, report.lines()


def test_instances_that_all_restore_at_once_write_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Members, "place", lambda self: 0)
    report = store_outage.report(1, 300, 1.0)
    missed = [figure.text for figure in report.figures if figure.is_met is False]
    assert missed == ["wiped: writes a record", "wiped, the first one crashed: writes a record"]


def test_loads_that_nobody_refuses_are_spread_less_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REFUSALS_MAX > 0
    monkeypatch.setattr("mm.mesh.placer.is_still_right", lambda view, request: True)
    report = cold_burst.report(1, 2, cold_burst.KINDS[:1])
    assert not report.is_met, report.lines()


def test_instances_that_stop_at_once_forget_what_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    async def move_nothing(self: Drain) -> None:
        """Leave all at once."""

    monkeypatch.setattr(Drain, "run", move_nothing)
    report = rolling.report(1, 2, 10.0, 300)
    assert [figure.text for figure in report.figures if figure.is_met is False] == [
        "hits of the worst 300 calls in it"
    ]


def test_a_table_that_nobody_empties_is_found_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = Registry._changed

    def leak(self: Any, key_id: str, item: Item | None) -> None:
        self.__dict__.setdefault("_leak", []).append(item)
        changed(self, key_id, item)

    monkeypatch.setattr(Registry, "_changed", leak)
    [grown, *_] = day.report(1, 4, 300.0).figures
    assert grown.is_met is False
    assert "node.parts.registry._leak" in grown.reached


def test_a_leak_of_what_hangs_only_on_a_task_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Absences.look

    def leak(self: Any, *args: Any, **values: Any) -> Any:
        self.__dict__.setdefault("_leak", []).append(args)
        return look(self, *args, **values)

    monkeypatch.setattr(Absences, "look", leak)
    grown = join.flap_report(1, 240.0).figures[-1]
    assert grown.is_met is False
    # At those that do not lead, too.
    for name in ("node", "other"):
        assert re.search(rf"\b{name}\.[^,]*<Keeper>\._absences\._leak", grown.reached)


# --- what they are made of ------------------------------------------------------------------------


def test_a_report_says_plainly_what_was_missed() -> None:
    report = ScenarioReport(
        "x",
        (
            Figure("calls", "", "7", None),
            Figure("good", "<= 2", "1", True),
            Figure("bad", "<= 2", "3", False),
        ),
    )
    assert not report.is_met
    assert [line.split() for line in report.lines()] == [
        ["x", "target", "reached"],
        ["calls", "7"],
        ["good", "<=", "2", "1", "met"],
        ["bad", "<=", "2", "3", "MISSED"],
    ]


class Alternate:
    """Sends to each copy in turn; sends back what it is told to."""

    def __init__(self, redirects: set[int] | None = None) -> None:
        self.count = 0
        self.redirects = redirects or set()
        self.told: list[int] = []

    def choose(self, job: Job, now_s: float) -> int:
        self.count += 1
        return self.count % 2

    def is_redirected(self, job: Job, in_flight: int) -> bool:
        return job.busy < 0 and self.count in self.redirects

    def counted(self, copy: int, in_flight: int, now_s: float) -> None:
        self.told.append(in_flight)

    def replied(self, job: Job, copy: int, in_flight: int, now_s: float) -> None:
        pass


def test_queues_hold_what_queueing_theory_says() -> None:
    # Calls alternate, so each copy is a queue of its own with half the calls: a copy of half speed
    # takes twice as long when hardly anybody waits.
    shape = Shape(1, (1.0, 2.0), 1, 0.01, 0.001, load=0.01)
    policy = Alternate()
    times_s = simulate(shape, policy, 20_000, "x")
    assert len(times_s) == 20_000
    assert sum(times_s) / len(times_s) == pytest.approx(0.002 + (0.01 + 0.02) / 2, rel=0.05)
    assert min(policy.told) == 0
    # M/M/1: the mean time in the system is service / (1 - load).
    busy = simulate(Shape(1, (1.0,), 1, 0.01, 0.0, load=0.5), One(), 40_000, "x")
    assert sum(busy) / len(busy) == pytest.approx(0.02, rel=0.05)


class One(Alternate):
    """There is one copy."""

    def choose(self, job: Job, now_s: float) -> int:
        return 0


def test_a_call_that_is_sent_back_takes_two_hops_more() -> None:
    shape = Shape(1, (1.0, 1.0), 1, 1e-9, 1.0, load=1e-12)
    times_s = simulate(shape, Alternate(redirects={1}), 2, "x")
    assert sorted(round(each) for each in times_s) == [2, 4]


def test_calls_follow_zipf_and_drift() -> None:
    calls = iter(ZipfCalls(100, 1.0, 10**9, random.Random(1)))
    counts = [0] * 100
    for _ in range(20_000):
        counts[next(calls)] += 1
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)
    drifting = ZipfCalls(100, 1.0, 10, random.Random(1))
    calls = iter(drifting)
    for _ in range(2_000):
        next(calls)
    assert sorted(drifting._models) == list(range(100))
    assert sum(model != rank for rank, model in enumerate(drifting._models)) > 50


def test_sizes_are_found_by_walking_and_have_the_shortest_path() -> None:
    index = InstanceIndex()
    for model_id in ("m", "n"):
        index.set(ModelId(model_id), frozenset({InstanceId("a"), InstanceId("b")}))
    sizes = table_sizes({"one": [index], "other": (index, LossesHeard())}, "x")
    assert sizes == {
        "x": 2,
        # The same object is no second one, and a fake is no part of the mesh.
        "x[]": 3,
        "x[][]._models": 2,
        "x[][]._models[]": 4,
        "x[][]._instances": 2,
        "x[][]._instances[]": 4,
    }


def test_what_hangs_on_a_method_is_found() -> None:
    index = InstanceIndex()
    index.set(ModelId("m"), frozenset({InstanceId("a")}))
    for tasks in ([index.set], [partial(index.set)], [partial(print, index)]):
        entries = [size for path, size in table_sizes(tasks, "x").items() if "_models" in path]
        assert entries == [1, 1], tasks


def test_what_grows_is_told_from_what_varies() -> None:
    flat = [Counter(a=size, b=5) for size in (100, 140, 90, 120, 130, 80, 110, 120)]
    assert growing_tables(flat) == []
    slow = [Counter(a=100, b=hour) for hour in range(24)]
    assert growing_tables(slow) == ["b"]
    late = [Counter(a=100), *[Counter(a=100, b=20)] * 3]
    assert growing_tables(late) == ["b"]
