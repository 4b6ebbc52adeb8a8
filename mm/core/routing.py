"""Routing: where a call goes next, and what a failed attempt means (spec core 2.4, 2.5, 2.7; design
section 4).

Owns the two decisions and the views that they are made from. Where a model is loaded is
``placement``'s; what is asked of the table, and waiting, the mesh's.

*Hits.* Of the copies that are ready two are taken at random, and the one with fewer calls in flight
gets the call: nearly as even as the least busy of all, without all senders' running to it while
their counts are old. A copy here wins a tie with either of them, and an idle one wins in any case,
because nothing can be less busy and a hop costs more than it could gain. A call that a busy copy
sent away goes to the least busy of the others.
*Loads.* A call without a ready copy waits where the model is being loaded already; only if that is
nowhere, somebody is asked to load it.
*Last resort.* A ready copy that could not be reached a moment ago is left alone, until the call
would fail: then it is tried (spec core 2.6). One that this call could not reach from here is looked
for through another instance, once: to load it there would need the store, and the wire is ours.
Once somebody could not load for want of the store, that is tried before others are asked to load.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from mm.core.calls import Hop, Outcome
from mm.core.ids import InstanceId
from mm.core.records import ModelRecord

#: A load that began elsewhere less than this ago is about as far as one here, which saves the hop
#: (spec core 2.4 b).
HEAD_START_MS: Final = 1500


class Here(enum.Enum):
    """How far the copy of this instance is."""

    ABSENT = "absent"
    COMING = "coming"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class ReadyCopy:
    """A copy elsewhere that serves calls, and the calls in flight that it last told of."""

    instance_id: InstanceId
    calls_count: int = 0


@dataclass(frozen=True, slots=True)
class ComingCopy:
    """A copy elsewhere that is queued or loading, since when."""

    instance_id: InstanceId
    since_ms: int
    is_queued: bool = False


@dataclass(frozen=True, slots=True)
class RoutingView:
    """What is known about one call and the copies of its model, at one moment.

    ``ready`` and ``coming`` hold copies of other instances that can be called now; which of them
    the call may use is decided here.
    """

    hop: Hop = Hop.EXTERNAL
    hops_left: int = 2
    here: Here = Here.ABSENT
    here_since_ms: int = 0
    here_calls_count: int = 0
    #: The copy here failed this call.
    is_here_tried: bool = False
    ready: Sequence[ReadyCopy] = ()
    coming: Sequence[ComingCopy] = ()
    #: Ready copies elsewhere that could not be reached a moment ago.
    suspects: Sequence[InstanceId] = ()
    #: Copies that failed this call.
    tried: Collection[InstanceId] = frozenset()
    #: Others that can be called now, and could pass it on to a copy that it found no way to,
    #: whether or not they could load it; none if there is no such copy.
    relays: Sequence[InstanceId] = ()
    #: A copy that sent this call away because it is busy; there is at most one.
    busy: InstanceId | None = None
    #: The sender spreads its calls over all instances already (``mm-balanced``), or asks for a
    #: load: a copy here is as good as any.
    favour_self: bool = False
    #: Not after a runtime that has the model refused the call: loading it elsewhere is no cure.
    may_load: bool = True
    #: Instances that failed to load it for this call: their records may not tell of it yet.
    load_failures_count: int = 0
    #: One of them could not reach the store: most likely nobody can.
    is_store_away: bool = False
    attempts_count: int = 0
    now_ms: int = 0


def is_ready(
    record: ModelRecord, instance_id: InstanceId, now_ms: int, assumed_load_ms: int
) -> bool:
    """Answer whether a registered copy serves calls: as it says itself; if it says nothing, being
    of Java or of an older version, once it has had the time to load (spec core 2.5, 3.15).
    """
    state = record.copy_state(instance_id)
    if state is not None:
        return state.is_ready
    return record.copies[instance_id] < now_ms - assumed_load_ms


class Action(enum.Enum):
    """What to do with a call."""

    #: Send it to the runtime here.
    SERVE = "serve here"
    #: Send it, hit-only, to the ready copy of another instance.
    FORWARD = "forward"
    #: Wait for the copy that is on its way here.
    WAIT_HERE = "wait here"
    #: Send it, hit-only, to an instance where the copy is on its way, and let it wait there.
    WAIT_THERE = "wait there"
    #: Ask placement for an instance that loads it.
    LOAD = "load"
    #: Send it to an instance that may reach a copy which cannot be reached from here.
    RELAY = "relay"
    #: Nothing is left to try.
    FAIL = "fail"


class Reason(enum.Enum):
    """Why."""

    HERE_IDLE = "the copy here is idle"
    HERE_FAVOURED = "the copy here is as good as any"
    HERE_ONLY = "the copy here is the only one that can be used"
    FEWEST_CALLS = "it has the fewest calls in flight of those drawn"
    ONLY_COPY = "it is the only copy that can be used"
    COMING = "its load is the furthest"
    NO_COPY = "there is no copy to use"
    NOT_HERE = "there is no copy here, and the sender asked for nothing else"
    ATTEMPTS_SPENT = "too many attempts"
    COPIES_FAILED = "too many copies failed it"
    NOTHING_LEFT = "no copy is left, and another load is no cure"
    LOADS_FAILED = "too many instances failed to load it"
    LAST_RESORT = "it could not be reached a moment ago, and nothing else is left"
    OTHER_WAY = "the copy cannot be reached from here, and nothing else is left"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer. ``instance_id`` is there for FORWARD, WAIT_THERE and RELAY."""

    action: Action
    reason: Reason
    instance_id: InstanceId | None = None
    #: There is another ready copy, so a busy one may send the call back, once.
    may_redirect: bool = False


@dataclass(frozen=True, slots=True)
class RoutingLimits:
    """How long it is worth to try."""

    attempts_max: int
    copies_tried_max: int
    load_failures_max: int


def decide(view: RoutingView, limits: RoutingLimits, rng: Random) -> Decision:
    """Answer what to do with a call now; the first that is possible of: a ready copy, a copy that
    is on its way, a load.

    Invariants: 1. a hit-only call is never forwarded and never causes a load; 2. without hops left
    nothing is forwarded; 3. a copy that failed the call is not asked again, and of those that did
    not, one is always found as long as attempts are left.
    """
    if view.attempts_count >= limits.attempts_max:
        return Decision(Action.FAIL, Reason.ATTEMPTS_SPENT)
    is_here_ready = view.here is Here.READY and not view.is_here_tried
    others = _usable(view)
    if is_here_ready:
        reason = _reason_to_stay(view, others)
        if reason is not None:
            return Decision(Action.SERVE, reason)
    elif others and len(view.tried) >= limits.copies_tried_max:
        return Decision(Action.FAIL, Reason.COPIES_FAILED)
    if others:
        return _choose(view, others, is_here_ready, rng)
    waiting = _wait(view)
    if waiting is not None:
        return waiting
    if view.hop is Hop.HIT_ONLY:
        return Decision(Action.FAIL, Reason.NOT_HERE)
    if not view.may_load:
        return last_resort(view, Reason.NOTHING_LEFT, rng)
    if view.load_failures_count >= limits.load_failures_max:
        return last_resort(view, Reason.LOADS_FAILED, rng)
    if view.is_store_away:
        resort = last_resort(view, Reason.NO_COPY, rng)
        if resort.action is not Action.FAIL:
            return resort
    return Decision(Action.LOAD, Reason.NO_COPY)


def last_resort(view: RoutingView, reason: Reason, rng: Random) -> Decision:
    """Answer where a call goes that would fail for this reason, or that it does.

    Only the instance that the client called asks: what others cannot reach, it may.
    """
    if view.hop is not Hop.EXTERNAL:
        return Decision(Action.FAIL, reason)
    suspects = [name for name in view.suspects if name not in view.tried]
    if suspects and view.hops_left > 0:
        return Decision(Action.FORWARD, Reason.LAST_RESORT, rng.choice(suspects))
    if view.relays and view.hops_left > 1:
        return Decision(Action.RELAY, Reason.OTHER_WAY, rng.choice(view.relays))
    return Decision(Action.FAIL, reason)


def stays(hop: Hop, favour_self: bool, here_calls_count: int) -> bool:
    """Answer whether a ready copy here takes the call without a look at the others."""
    return hop is not Hop.EXTERNAL or favour_self or here_calls_count == 0


def _usable(view: RoutingView) -> list[ReadyCopy]:
    """Answer the ready copies elsewhere that may get the call; the busy one only if it is all."""
    if view.hop is Hop.HIT_ONLY or view.hops_left <= 0:
        return []
    untried = [copy for copy in view.ready if copy.instance_id not in view.tried]
    return [copy for copy in untried if copy.instance_id != view.busy] or untried


def _reason_to_stay(view: RoutingView, others: list[ReadyCopy]) -> Reason | None:
    if not others:
        return Reason.HERE_ONLY
    if stays(view.hop, view.favour_self, view.here_calls_count):
        return Reason.HERE_IDLE if view.here_calls_count == 0 else Reason.HERE_FAVOURED
    return None


def _choose(
    view: RoutingView, others: list[ReadyCopy], is_here_ready: bool, rng: Random
) -> Decision:
    counts: list[tuple[InstanceId | None, int]] = [(c.instance_id, c.calls_count) for c in others]
    if is_here_ready:
        counts.insert(0, (None, view.here_calls_count))
    told = [count for _, count in counts]
    if view.busy is None:
        index = choose_of_two(told, rng.getrandbits(64), is_here_ready)
    else:
        index = _least_busy(told, rng)
    chosen = counts[index][0]
    reason = Reason.FEWEST_CALLS if len(counts) > 1 else Reason.ONLY_COPY
    if chosen is None:
        return Decision(Action.SERVE, reason)
    return Decision(Action.FORWARD, reason, chosen, len(counts) > 1 and view.busy is None)


def choose_of_two(counts: Sequence[int], random: int, is_first_here: bool = False) -> int:
    """Answer which of the copies with these calls in flight gets it, as ``Table.choose`` does.

    Two are drawn, the first by the low half of 64 random bits, the second among the rest by the
    high half; the one with fewer calls gets it. A tie is the local copy's, else the first drawn's.
    """
    if len(counts) < 2:
        return 0
    first = (random & 0xFFFF_FFFF) * len(counts) >> 32
    second = (random >> 32) * (len(counts) - 1) >> 32
    second += second >= first
    is_tie_second = is_first_here and second == 0 and counts[second] == counts[first]
    return second if counts[second] < counts[first] or is_tie_second else first


def _least_busy(counts: Sequence[int], rng: Random) -> int:
    """Answer one of the copies with the fewest calls, by chance.

    For a call that a busy copy sent away: there are few of these, so they do not herd, and two more
    at random may be as busy. It takes p99 with one call a copy at a time from 1.42 times that of
    the shortest queue to 1.05 (``mm sim tail``).
    """
    fewest = min(counts)
    return rng.choice([index for index, count in enumerate(counts) if count == fewest])


def _wait(view: RoutingView) -> Decision | None:
    """Answer where the load is to be waited for, None if there is none on its way.

    Where it began first, loading before queued; but here, if that is about as good.
    """
    here = view.here is Here.COMING and not view.is_here_tried
    coming = []
    if view.hop is not Hop.HIT_ONLY and view.hops_left > 0:
        coming = [copy for copy in view.coming if copy.instance_id not in view.tried]
    if not coming:
        return Decision(Action.WAIT_HERE, Reason.COMING) if here else None
    best = min(coming, key=lambda copy: (copy.is_queued, copy.since_ms, copy.instance_id))
    if here and (
        view.hop is not Hop.EXTERNAL
        or view.here_since_ms <= best.since_ms
        or view.now_ms - best.since_ms < HEAD_START_MS
    ):
        return Decision(Action.WAIT_HERE, Reason.COMING)
    return Decision(Action.WAIT_THERE, Reason.COMING, best.instance_id)


# --- what a failed attempt means ---


class Again(enum.Enum):
    """Whether asking the router again makes sense."""

    YES = "yes"
    #: Only if another copy, ready or on its way, can be had.
    IF_COPY = "if there is another copy"
    NO = "no"


@dataclass(frozen=True, slots=True)
class Retry:
    """What an outcome means for the rest of the call."""

    again: Again
    #: The copy there is out of the question for this call.
    is_copy_out: bool = True
    #: That instance is not asked to load it either.
    is_instance_out: bool = True
    #: Another load is worth a try.
    may_load: bool = True


_ELSEWHERE: Final = Retry(Again.YES)
_NO_MORE: Final = Retry(Again.NO)
#: The runtime's own answer: worth another copy, never another load (spec core 10.6).
_OTHER_COPY: Final = Retry(Again.IF_COPY, is_instance_out=False, may_load=False)

_RETRIES: Final = {
    # It may load it yet; only as a copy it is out of the question.
    Outcome.NOT_HERE: Retry(Again.YES, is_instance_out=False),
    Outcome.STALE: _ELSEWHERE,
    # Its way to the store may be all that is broken.
    Outcome.STORE_AWAY: _ELSEWHERE,
    Outcome.DRAINING: _ELSEWHERE,
    Outcome.UNREACHABLE: _ELSEWHERE,
    Outcome.LOAD_FAILED: _ELSEWHERE,
    Outcome.LOAD_TIMEOUT: _ELSEWHERE,
    Outcome.RUNTIME_UNAVAILABLE: _OTHER_COPY,
    # It is as good as before, only busier than others.
    Outcome.REDIRECT: Retry(Again.YES, is_copy_out=False, is_instance_out=False),
    # The model is at fault: whoever loads it hears the same. A copy that is loaded still serves.
    Outcome.LOAD_REFUSED: Retry(Again.IF_COPY, may_load=False),
    # The peer has reloaded a lost model, if that could help: it is the model's own answer.
    Outcome.LOST: _NO_MORE,
    Outcome.NO_MODEL: _NO_MORE,
    Outcome.MOVED: _NO_MORE,
}


def retry_after(outcome: Outcome, hop: Hop, *, is_here: bool, exhausted_count: int = 0) -> Retry:
    """Answer what an outcome means (spec core 2.7). ``hop`` is how the call came here, ``is_here``
    whether the attempt went to the runtime here, ``exhausted_count`` how often it was
    RESOURCE_EXHAUSTED before.

    A peer does not retry what its sender can do better: a hit-only call goes back at once, and a
    runtime here that does not answer at all is the sender's to go round.
    """
    # A full connection is no reason to go elsewhere: a model that is there would be loaded twice.
    if outcome in (Outcome.ANSWERED, Outcome.ABANDONED, Outcome.CROWDED):
        return Retry(Again.NO, is_copy_out=False, is_instance_out=False)
    if outcome is Outcome.EXHAUSTED:
        # One other copy is tried; a second that says so is believed for all of them.
        retry = _OTHER_COPY if exhausted_count == 0 else replace(_OTHER_COPY, again=Again.NO)
    else:
        retry = _RETRIES[outcome]
    is_senders = is_here and outcome is Outcome.UNREACHABLE and hop is not Hop.EXTERNAL
    if hop is Hop.HIT_ONLY or is_senders:
        return replace(retry, again=Again.NO)
    return retry
