"""The streams of calls, each from a seed: what popular models, bursts, sweeps and loops look like.

Owns how they are made; which of them are compared, with which parameters, is ``shapes``'s.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from bench.policies.world import World

Calls = Iterator[int]


def worlds(kind: str, count: int, share: float, chance: random.Random) -> World:
    """Answer models whose sizes and load times have this relation, and room for a share of them.

    ``equal``: all alike. ``fixed``: log-normal sizes, one load time. ``with-size``: the larger,
    the longer, and two seconds for nothing. ``apart``: independent. ``against``: the smaller, the
    longer (many small files, a compilation).
    """
    sigma = 0.0 if kind == "equal" else 1.0
    sizes = [max(1, min(4000, round(100 * chance.lognormvariate(0, sigma)))) for _ in range(count)]
    noise = [chance.lognormvariate(0, 0.3) for _ in range(count)]
    load_s = {
        "equal": lambda: [5.0] * count,
        "fixed": lambda: [5.0] * count,
        "with-size": lambda: [2 + 0.05 * s * n for s, n in zip(sizes, noise, strict=True)],
        "apart": lambda: [5 * chance.lognormvariate(0, 1.0) for _ in range(count)],
        "against": lambda: [1 + 500 / s * n for s, n in zip(sizes, noise, strict=True)],
    }[kind]()
    capacity = max(int(sum(sizes) * share), 2 * max(sizes))
    return World(sizes, load_s, capacity)


def zipf(count: int, alpha: float, calls: int, chance: random.Random, swaps: float = 0.0) -> Calls:
    """Yield models by popularity; ``swaps``: how many of them trade places in all, by turns."""
    weights = list(itertools.accumulate(rank**-alpha for rank in range(1, count + 1)))
    models = list(range(count))
    chance.shuffle(models)
    pieces = 100 if swaps else 1
    for _ in range(pieces):
        yield from chance.choices(models, cum_weights=weights, k=calls // pieces)
        for _ in range(int(swaps * count / pieces)):
            one, other = chance.randrange(count), chance.randrange(count)
            models[one], models[other] = models[other], models[one]


def bursts(
    count: int, calls: int, chance: random.Random, *, active: int, length: int, alpha: float
) -> Calls:
    """Yield calls to a few active models; each is on for about ``length`` calls, then off."""
    weights = list(itertools.accumulate(rank**-alpha for rank in range(1, count + 1)))
    on = chance.choices(range(count), cum_weights=weights, k=active)
    for _ in range(calls):
        place = chance.randrange(active)
        if chance.random() < 1 / length:
            on[place] = chance.choices(range(count), cum_weights=weights)[0]
        yield on[place]


def few_times(count: int, calls: int, chance: random.Random, *, times: int, active: int) -> Calls:
    """Yield each model so many times within a while, then not until all others had their turn."""
    order = itertools.cycle(chance.sample(range(count), count))
    left = [[next(order), times] for _ in range(active)]
    for _ in range(calls):
        one = chance.choice(left)
        one[1] -= 1
        yield one[0]
        if one[1] <= 0:
            one[0], one[1] = next(order), times


def with_sweeps(base: Calls, count: int, every: int) -> Calls:
    """Yield another stream, and after so many of its calls each model once."""
    while part := list(itertools.islice(base, every)):
        yield from part
        yield from range(count)


def loop(length: int, calls: int, count: int, chance: random.Random) -> Calls:
    """Yield the same models in the same order, over and over."""
    yield from itertools.islice(itertools.cycle(chance.sample(range(count), length)), calls)


def phases(count: int, calls: int, chance: random.Random, *, working: int, length: int) -> Calls:
    """Yield models of a working set, all alike; after ``length`` calls comes another set."""
    for _ in range(0, calls, length):
        yield from chance.choices(chance.sample(range(count), working), k=length)


def by_depth(count: int, calls: int, chance: random.Random, *, alpha: float) -> Calls:
    """Yield by how long ago a model was used, nothing else: what LRU is the best policy for."""
    weights = list(itertools.accumulate(rank**-alpha for rank in range(1, count + 1)))
    stack = chance.sample(range(count), count)
    for depth in chance.choices(range(count), cum_weights=weights, k=calls):
        stack.append(stack.pop(count - 1 - depth))
        yield stack[-1]


def day_and_night(
    count: int, calls: int, chance: random.Random, *, alpha: float, days: int
) -> Calls:
    """Yield one half of the models by day and the other by night, each by its popularity."""
    half = count // 2
    length = calls // days // 2
    for _ in range(days):
        for first in (0, half):
            seeded = random.Random(first)
            order = seeded.sample(range(first, first + half), half)
            weights = list(itertools.accumulate(rank**-alpha for rank in range(1, half + 1)))
            yield from chance.choices(order, cum_weights=weights, k=length)
