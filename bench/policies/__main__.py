"""Load seconds that each eviction policy costs, beside LRU's, on generated streams of calls.

A figure is a policy's load seconds divided by LRU's on the same stream, the last three quarters of
it; "least" is what no policy can get below (bound.py says why), "LRU misses" the part of the calls
that LRU loads for. The goals are those of ``MM_EVICTION=cost``: 0.9 on average over the Zipf
streams with unequal sizes (marked *), and on no stream above 1.03. Everything comes from seeds, so
the figures are the same on every machine.

    python -m bench.policies                about three minutes
    python -m bench.policies --quick        shorter streams
    python -m bench.policies --by misses    or by size
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from bench._goals import Goal, judge
from bench.policies.bound import lowest
from bench.policies.classic import Fifo, Lru, S3Fifo, Sieve
from bench.policies.frequency import Gdsf, WTinyLfu
from bench.policies.ours import Ours
from bench.policies.replay import replay, warm_up_of
from bench.policies.shapes import Shape, held_out, tuned
from bench.policies.world import Cost, Policy

POLICIES: tuple[type[Policy], ...] = (Fifo, Sieve, S3Fifo, WTinyLfu, Gdsf, Ours)
GOAL_MEAN = 0.90
GOAL_WORST = 1.03


def figure(cost: Cost, by: str) -> float:
    """Answer the part of a cost that is compared."""
    return {"load-s": cost.load_s, "misses": float(cost.misses), "size": float(cost.size)}[by]


def ratio(cost: float, base: float) -> float:
    """Answer a cost in LRU's; nothing against nothing is equal."""
    return cost / base if base else 1.0 + cost


def compare(
    title: str,
    shapes: Iterable[Shape],
    policies: tuple[type[Policy], ...],
    size: tuple[int, int, int],
    by: str,
) -> dict[str, list[tuple[float, bool]]]:
    """Print a table; answers each policy's figures, and whether the stream is the goal's."""
    print(f"{title:<40} {'LRU misses':>10} {'least':>6}", *(f"{p.name:>10}" for p in policies))
    found: dict[str, list[tuple[float, bool]]] = {policy.name: [] for policy in policies}
    models, calls, seed = size
    for shape in shapes:
        stream = shape.stream(models, calls, seed)
        warm_up = warm_up_of(stream)
        base = replay(stream, Lru(stream.world))
        row = [ratio(figure(lowest(stream, warm_up), by), figure(base, by))]
        for policy in policies:
            cost = replay(stream, policy(stream.world))
            row.append(ratio(figure(cost, by), figure(base, by)))
            found[policy.name].append((row[-1], shape.is_goal))
        missed = base.misses / (len(stream.calls) - warm_up)
        name = f"{stream.name}{' *' if shape.is_goal else ''}"
        print(f"{name:<40} {missed:>10.1%} {row[0]:>6.3f}", *(f"{x:>10.3f}" for x in row[1:]))
        sys.stdout.flush()
    for what, goals in (("mean of those with *", True), ("worst of all", False)):
        print(f"{what:<58}", *(f"{summary(found[p.name], goals):>10.3f}" for p in policies))
    return found


def summary(figures: list[tuple[float, bool]], goals: bool) -> float:
    """Answer the mean of the goal's streams, or the worst of all."""
    if goals:
        those = [figure for figure, is_goal in figures if is_goal]
        return sum(those) / len(those)
    return max(figure for figure, _ in figures)


def main() -> int:
    """Read the arguments and print the tables; answers what the shell gets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter streams, fewer models")
    parser.add_argument("--seed", type=int, default=1, help="%(default)s")
    parser.add_argument("--by", choices=("load-s", "misses", "size"), default="load-s")
    parser.add_argument("--policies", help="names, with commas between; all if not given")
    arguments = parser.parse_args()
    models, calls = (1000, 12_000) if arguments.quick else (2000, 60_000)
    policies = POLICIES
    if arguments.policies:
        policies = tuple(p for p in POLICIES if p.name in arguments.policies.split(","))
    print(f"{arguments.by} in those of LRU; {models:,} models, {calls:,} calls")
    goals: list[Goal] = []
    for title, shapes in (("tuned on", tuned()), ("held out", held_out())):
        size = (models, calls, arguments.seed + (title == "held out"))
        found = compare(title, shapes, policies, size, arguments.by)
        if Ours in policies and arguments.by == "load-s":
            for what, is_mean, target in (("mean", True, GOAL_MEAN), ("worst", False, GOAL_WORST)):
                figure = summary(found[Ours.name], is_mean)
                text = f"{what} of {title}, {Ours.name} to LRU"
                goals.append(Goal(text, figure, "<=", target, is_full_size=not arguments.quick))
    return judge(goals)


if __name__ == "__main__":
    sys.exit(main())
