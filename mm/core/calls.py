"""One call on its way through the mesh, and the one question asked about it (design section 2).

``Router.route(call)`` answers a ``Route`` (where the bytes go) or raises a ``MeshError`` (the
status for the client).
Whoever moves the bytes then tells what became of it with ``Router.finished`` and, where the answer
is "again", asks
once more. The data plane never decides; the router never touches a byte.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from mm.core.ids import InstanceId, ModelId
from mm.errors import MeshError, StatusCode

#: Refusals for one call. Each costs a hop, and each makes the sender's view right where it was
#: wrong; after three the next choice is one of four, known exactly. With two, one burst in twelve
#: of 50 cold models still gave an instance more than twice its share (`mm sim cold-burst`).
REFUSALS_MAX: Final = 3
#: Models of one vmodel that may turn out to be missing during one call: switches are rare.
MOVES_MAX: Final = 5
_WORTH_A_RETRY: Final = frozenset({StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED})


class Hop(enum.Enum):
    """How a call came here, and so what may be done with it (spec core 2.2, design section 5)."""

    #: From a client, or made by this instance itself: may go anywhere.
    EXTERNAL = "external"
    #: From a peer that believes a copy is here: serve it here or say "not here".
    HIT_ONLY = "hit-only"
    #: From a peer that chose this instance to load the model: load it here, or forward to a copy
    #: that appeared.
    LOAD_LOCAL = "load-local"


class NamedBy(NamedTuple):
    """The vmodel by which a client named the model of a call."""

    vmodel_id: str
    #: The record of this revision says so, or a later one; 0: the one that is mirrored here.
    revision: int = 0


@dataclass(slots=True)
class Call:
    """What the router needs to know of a call, and remembers between its attempts.

    ``deadline_s`` is on the clock of ``anyio.current_time()``; None means that the client set none.
    """

    model_id: ModelId
    #: Full method path, "/pkg.Service/Method"; empty for ensure-loaded.
    method: str = ""
    hop: Hop = Hop.EXTERNAL
    deadline_s: float | None = None
    balanced: bool = False
    #: None: by no vmodel, or it is not to be followed any more.
    named_by: NamedBy | None = None
    #: Copies that were tried for this call and failed it.
    tried: set[InstanceId] = field(default_factory=set)
    #: Of these, copies to which there was no way from here; empty once another way was tried.
    unreached: set[InstanceId] = field(default_factory=set)
    #: Instances where loading was tried for this call, or may not be tried.
    excludes: set[InstanceId] = field(default_factory=set)
    #: Hops that may still follow; a client's call starts with two.
    hops_left: int = 2
    #: Size hint for a load, in units; 0 when unknown.
    known_size_units: int = 0
    #: Last use to record, ms; 0 means now.
    last_used_ms: int = 0
    #: Loading it somewhere may help; not after a runtime that has it said UNAVAILABLE.
    may_load: bool = True
    #: The peer that passed it on, which hears how busy the copy is; none if it did not say.
    sender: InstanceId | None = None
    #: How busy the copy here is besides this call, as its reply told the sender.
    load_told: int | None = None
    #: When it got the copy here, if its time is taken.
    timed_s: float | None = None
    #: It has the copy here.
    is_here: bool = False
    #: The sender could use another copy, and has not been sent away yet.
    may_redirect: bool = False
    #: The copy that was too busy for it, and sent it away.
    busy: InstanceId | None = None
    #: How often a runtime answered RESOURCE_EXHAUSTED.
    exhausted_count: int = 0
    #: How many instances failed to load it for this call.
    load_failures_count: int = 0
    #: Somebody could not write to the store that it loads.
    is_store_away: bool = False
    #: The sender would rather have it loaded elsewhere if this instance is not what it seemed.
    may_refuse: bool = False
    #: Instances that refused to load it: they could, but others can do it better.
    refused_by: set[InstanceId] = field(default_factory=set)
    refusals_count: int = 0
    #: It waited here for a load: a miss of the cache.
    has_waited: bool = False
    #: When it began to wait here for a load, the first one if there were several.
    waiting_since_s: float | None = None
    #: It waits now, here or at a peer, and counts among those that do.
    waits: bool = False
    #: Made by this instance, one a model, to see a load through that nobody waits for.
    is_own: bool = False
    #: Bytes of its request that are kept here, as far as they have come; whoever waits answers for
    #: them.
    request_bytes: int = 0
    #: Told once when the call ends that was let go after a wait, or begins to wait again.
    on_turn_ended: Callable[[], None] | None = None
    #: Passes so far; bounded by ``Config.retry_iterations_max``.
    attempts: int = 0
    #: The most telling failure so far: what the client hears when nothing else is left.
    failure: MeshError | None = None
    #: The soonest useful retry, as the peers told that refused it.
    retry_after_ms: int | None = None

    def moved_to(self, model_id: ModelId) -> Call:
        """Answer the same call for another model, of which nothing was tried yet. If this one was
        let go after a wait, it still is that one's turn.
        """
        on_turn_ended, self.on_turn_ended = self.on_turn_ended, None
        return Call(
            model_id,
            method=self.method,
            balanced=self.balanced,
            named_by=self.named_by,
            deadline_s=self.deadline_s,
            request_bytes=self.request_bytes,
            on_turn_ended=on_turn_ended,
        )

    def hear_retry(self, retry_after_ms: int | None) -> None:
        """A peer refused it, and may have told when a retry makes sense."""
        if retry_after_ms is not None:
            known_ms = self.retry_after_ms
            self.retry_after_ms = (
                retry_after_ms if known_ms is None else min(retry_after_ms, known_ms)
            )

    def tell_retry(self, error: MeshError) -> None:
        """Pass that on with an error of ours that is worth a retry."""
        heard_ms, own_ms = self.retry_after_ms, error.retry_after_ms
        if heard_ms is not None and error.code in _WORTH_A_RETRY:
            error.retry_after_ms = heard_ms if own_ms is None else min(heard_ms, own_ms)

    def end_turn(self) -> None:
        """Let the next one go, if this call was let go after a wait."""
        if self.on_turn_ended is not None:
            on_turn_ended, self.on_turn_ended = self.on_turn_ended, None
            on_turn_ended()


class Outcome(enum.Enum):
    """What became of one attempt, as the data plane saw it."""

    #: An answer came (whatever its status) and was, or will be, passed to the client.
    ANSWERED = "answered"
    #: The client went away, or its deadline passed; nobody is to blame.
    ABANDONED = "abandoned"
    #: All connections to the upstream are full; it never got there. Not worth a try elsewhere: a
    #: model that is there would be loaded twice for it.
    CROWDED = "crowded"
    #: The peer says that it has no copy (trailer ``mm-hop-result: not-here``).
    NOT_HERE = "not-here"
    #: The peer says that it should not load it: its state differs from what the sender believed.
    STALE = "stale"
    #: The peer could not write to the store that it loads.
    STORE_AWAY = "store-away"
    #: The peer is shutting down.
    DRAINING = "draining"
    #: The runtime beside the copy says that it does not have the model (NOT_FOUND and its
    #: disguises, spec core 2.8.4).
    LOST = "lost"
    #: The peer has it from the store that the model is not registered any more.
    NO_MODEL = "no-model"
    #: The call waited there for a load, and its vmodel stands for another model by now.
    MOVED = "moved"
    #: No connection to the upstream (peer or runtime), or it broke before an answer. As a hop
    #: result: my runtime is gone.
    UNREACHABLE = "unreachable"
    #: The runtime answered UNAVAILABLE.
    RUNTIME_UNAVAILABLE = "runtime-unavailable"
    #: The runtime, or the limit of calls for one copy, answered RESOURCE_EXHAUSTED.
    EXHAUSTED = "exhausted"
    #: The copy is busier than its runtime likes, and the sender knows of another one.
    REDIRECT = "redirect"
    #: The load that the peer was asked for failed there (trailer ``mm-hop-result: load-failed``).
    LOAD_FAILED = "load-failed"
    #: So did this one, and it would at any other instance: the model is at fault.
    LOAD_REFUSED = "load-refused"
    #: So did this one, by taking longer than the runtime's own limit.
    LOAD_TIMEOUT = "load-timeout"


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """Send it to the runtime beside this instance; the copy is pinned until ``Router.finished``."""

    model_id: ModelId
    #: Field numbers of the id inside the request message; empty: leave the message alone (spec core
    #: 2.14).
    injection_path: tuple[int, ...] = ()
    #: Which load of the model this copy is, in this process.
    load_id: int = 0


@dataclass(frozen=True, slots=True)
class PeerRoute:
    """Send it to another instance's peer port, with these facts in the hop headers."""

    model_id: ModelId
    instance_id: InstanceId
    #: host:port of the peer listener.
    address: str
    hop: Hop
    tried: frozenset[InstanceId] = frozenset()
    excludes: frozenset[InstanceId] = frozenset()
    hops_left: int = 1
    known_size_units: int = 0
    #: Not too many have refused to load it yet: if the one there sees that others can do it better,
    #: it may send the call back, if all of it can be sent again.
    may_refuse: bool = False
    #: Who sends it.
    sender: InstanceId | None = None
    #: The copy there is on its way, or is to be made: the call must not keep hits waiting.
    may_wait: bool = False
    #: So that it is not waited for in vain there, if the whole request can be sent again.
    named_by: NamedBy | None = None
    #: There is another ready copy: the one there may send the call back, if all of it can be sent
    #: again.
    may_redirect: bool = False


Route = LocalRoute | PeerRoute
