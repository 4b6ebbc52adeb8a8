"""A stream through a policy, and what that cost."""

from __future__ import annotations

from bench.policies.world import Cost, Policy, Stream

#: The part of a stream that only fills the caches: what is counted begins after it.
WARM_UP = 0.25


def warm_up_of(stream: Stream) -> int:
    """Answer how many calls are not counted."""
    return int(len(stream.calls) * WARM_UP)


def replay(stream: Stream, policy: Policy) -> Cost:
    """Answer what the calls after the warm-up cost."""
    warm_up = warm_up_of(stream)
    sizes, load_s = stream.world.sizes, stream.world.load_s
    misses, size, seconds = 0, 0, 0.0
    use = policy.use
    for now, model in enumerate(stream.calls):
        if not use(model, now) and now >= warm_up:
            misses += 1
            size += sizes[model]
            seconds += load_s[model]
    return Cost(misses, size, seconds)
