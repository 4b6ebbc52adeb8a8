"""Which streams are compared: those that the policy was tuned on, and others kept for the end.

The second list has other seeds, shares, exponents and lengths, and more that is nasty: nothing of
it was looked at while the constants of ``mm.core.eviction`` were chosen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.policies import streams
from bench.policies.streams import Calls
from bench.policies.world import Stream

Make = Callable[[int, int, random.Random], Calls]


@dataclass(frozen=True, slots=True)
class Shape:
    """A stream to be made: how the models are, what part of them fits, and who calls which."""

    name: str
    world: str
    share: float
    make: Make
    #: Whether the goal of fewer load seconds holds for it, besides that of never being worse.
    is_goal: bool = False

    def stream(self, models: int, calls: int, seed: int) -> Stream:
        """Answer the stream; the same for the same arguments."""
        chance = random.Random(f"{seed} {self.name} {self.world} {self.share}")
        world = streams.worlds(self.world, models, self.share, chance)
        name = f"{self.name}, {self.world}"
        return Stream(name, world, list(self.make(models, calls, chance)))


def _zipf(alpha: float, swaps: float = 0.0) -> Make:
    return lambda models, calls, chance: streams.zipf(models, alpha, calls, chance, swaps)


def _bursts(active: float, length: int, alpha: float) -> Make:
    return lambda models, calls, chance: streams.bursts(
        models, calls, chance, active=max(2, int(models * active)), length=length, alpha=alpha
    )


def _few(times: int, active: float) -> Make:
    return lambda models, calls, chance: streams.few_times(
        models, calls, chance, times=times, active=max(2, int(models * active))
    )


def _sweeps(alpha: float, parts: int) -> Make:
    return lambda models, calls, chance: streams.with_sweeps(
        streams.zipf(models, alpha, calls, chance), models, calls // parts
    )


def _loop(share: float) -> Make:
    return lambda models, calls, chance: streams.loop(int(models * share), calls, models, chance)


def _phases(working: float, parts: int) -> Make:
    return lambda models, calls, chance: streams.phases(
        models, calls, chance, working=int(models * working), length=calls // parts
    )


def _depth(alpha: float) -> Make:
    return lambda models, calls, chance: streams.by_depth(models, calls, chance, alpha=alpha)


def _days(alpha: float, days: int) -> Make:
    return lambda models, calls, chance: streams.day_and_night(
        models, calls, chance, alpha=alpha, days=days
    )


def _each(name: str, worlds: str, share: float, make: Make, goal: bool = False) -> Iterator[Shape]:
    for world in worlds.split():
        yield Shape(name, world, share, make, goal)


def tuned() -> Iterator[Shape]:
    """Yield what the constants were chosen on."""
    for alpha in (0.7, 0.9, 1.1):
        yield from _each(f"Zipf {alpha}", "fixed with-size apart against", 0.1, _zipf(alpha), True)
        drift = _zipf(alpha, 2.0)
        yield from _each(f"Zipf {alpha} drifting", "with-size apart", 0.1, drift, True)
    yield from _each("Zipf 0.9 in turmoil", "apart", 0.1, _zipf(0.9, 20.0))
    yield from _each("Zipf 0.9", "equal", 0.1, _zipf(0.9))
    yield from _each("Zipf 0.9, little room", "apart", 0.02, _zipf(0.9), True)
    yield from _each("Zipf 0.9, much room", "apart", 0.4, _zipf(0.9), True)
    yield from _each("bursts", "equal with-size apart", 0.1, _bursts(0.05, 30, 0.7))
    yield from _each("too many bursts", "apart", 0.1, _bursts(0.125, 20, 0.3))
    yield from _each("long bursts", "equal", 0.1, _bursts(0.075, 100, 0.3))
    yield from _each("5 times", "equal with-size apart", 0.1, _few(5, 0.05))
    yield from _each("3 times", "equal with-size apart", 0.1, _few(3, 0.075))
    yield from _each("20 times", "apart", 0.1, _few(20, 0.075))
    yield from _each("Zipf 0.9 and 12 sweeps", "equal apart", 0.1, _sweeps(0.9, 12))
    yield from _each("loop just too long", "equal apart", 0.1, _loop(0.11))
    yield from _each("loop twice too long", "equal apart", 0.1, _loop(0.2))
    yield from _each("phases", "equal with-size apart", 0.1, _phases(0.075, 40))
    yield from _each("phases that just fit", "equal with-size apart", 0.1, _phases(0.095, 15))
    yield from _each("recency alone", "equal with-size apart against", 0.1, _depth(0.9))
    yield from _each("much recency alone", "apart", 0.1, _depth(1.2))
    yield from _each("little recency alone", "equal", 0.1, _depth(0.6))
    yield from _each("day and night", "equal with-size apart", 0.1, _days(0.9, 6))


def held_out() -> Iterator[Shape]:
    """Yield what was looked at afterwards only."""
    for alpha, share in ((0.8, 0.05), (1.0, 0.2)):
        room = f"{share:.0%}"
        yield from _each(
            f"Zipf {alpha} in {room}", "fixed with-size apart against", share, _zipf(alpha), True
        )
        drift = _zipf(alpha, 1.0)
        yield from _each(f"Zipf {alpha} drifting in {room}", "with-size apart", share, drift, True)
    yield from _each("Zipf 1 in turmoil", "equal with-size", 0.05, _zipf(1.0, 30.0))
    yield from _each("bursts", "equal with-size against", 0.15, _bursts(0.1, 50, 0.5))
    yield from _each("many bursts", "equal with-size", 0.2, _bursts(0.25, 15, 0.0))
    yield from _each("long bursts", "equal with-size", 0.05, _bursts(0.035, 200, 0.5))
    yield from _each("4 times", "equal with-size against", 0.15, _few(4, 0.1))
    yield from _each("8 times", "equal with-size", 0.05, _few(8, 0.03))
    yield from _each("twice", "equal with-size", 0.1, _few(2, 0.04))
    yield from _each("Zipf 0.7 and 5 sweeps", "equal with-size", 0.15, _sweeps(0.7, 5))
    yield from _each("loop", "equal with-size", 0.15, _loop(0.16))
    yield from _each("loop three times too long", "with-size", 0.1, _loop(0.3))
    yield from _each("phases", "equal with-size against", 0.2, _phases(0.17, 25))
    yield from _each("short phases", "equal with-size", 0.1, _phases(0.06, 80))
    yield from _each("phases too large", "equal with-size", 0.1, _phases(0.12, 20))
    yield from _each("recency alone", "equal with-size", 0.05, _depth(1.0))
    yield from _each("recency alone, much room", "equal with-size apart", 0.3, _depth(0.8))
    yield from _each("day and night", "equal with-size", 0.2, _days(1.0, 10))
