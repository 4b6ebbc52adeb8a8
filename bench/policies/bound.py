"""What no policy can get below, even one that knows all calls to come."""

from __future__ import annotations

from collections.abc import Callable

from bench.policies.world import Cost, Stream


def lowest(stream: Stream, warm_up: int) -> Cost:
    """Answer lower bounds of misses, size and load seconds, each by itself.

    Berger, Beckmann, Harchol-Balter: "Practical bounds on optimal caching with variable object
    sizes", SIGMETRICS 2018 (PFOO-L). A hit needs the model's size from one call to the next. All
    that room over all that time is one budget: the hits that are worth most for what they need are
    taken until it is spent. A real cache must besides have the room at each single moment.
    """
    sizes, load_s = stream.world.sizes, stream.world.load_s
    last: dict[int, int] = {}
    hits: list[tuple[int, int]] = []  # room x time that a hit needs, model
    total_misses, total_size, total_s = 0, 0, 0.0
    for now, model in enumerate(stream.calls):
        if now >= warm_up:
            total_misses += 1
            total_size += sizes[model]
            total_s += load_s[model]
            if model in last:
                hits.append((sizes[model] * (now - max(last[model], warm_up)), model))
        last[model] = now
    budget = stream.world.capacity * (len(stream.calls) - warm_up)

    def saved(worth: Callable[[int], float]) -> float:
        rest, gain = budget, 0.0
        for need, model in sorted(hits, key=lambda hit: hit[0] / worth(hit[1])):
            rest -= need
            if rest < 0:
                break
            gain += worth(model)
        return gain

    return Cost(
        round(total_misses - saved(lambda model: 1.0)),
        round(total_size - saved(lambda model: sizes[model])),
        max(0.0, total_s - saved(lambda model: load_s[model])),  # sums of floats
    )
