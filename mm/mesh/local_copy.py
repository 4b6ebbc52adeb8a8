"""One model loaded, or on its way, in this instance (the "CE" of spec core 3.3)."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

import anyio

from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.records import ModelInfo
from mm.errors import MeshError

#: Priorities are last-use times in ms, so that preloads are ordered by recency; an awaited load is
#: ahead of all of them, and a queued one becomes awaited when somebody begins to wait for it (spec
#: core 3.7). Awaited loads are equals, in order of arrival: in the Java mesh the latest goes first,
#: so that under load those who waited longest wait in vain.
AWAITED: Final = NEVER_MS


#: The table's flags of a copy: whether it has answered a call, then so many bits of ``load_id``.
#: Threads that read the table set the first, and tell of the others what they tried.
ANSWERED_FLAG: Final = 1
LOAD_SHIFT: Final = 8
LOAD_BITS: Final = 0xFFFFFF


class Phase(enum.Enum):
    """Where a copy is in its life. Only SIZING and ACTIVE serve calls."""

    NEW = "new"
    QUEUED = "queued"
    WAITING = "waiting for space"
    LOADING = "loading"
    SIZING = "sizing"
    ACTIVE = "active"
    #: Evicted, unregistered, lost or failed: no longer in the table. Final.
    GONE = "gone"


_SERVING = frozenset({Phase.SIZING, Phase.ACTIVE})
_CLAIMED = frozenset({Phase.LOADING, Phase.SIZING, Phase.ACTIVE})


class CopyGoneError(Exception):
    """The copy left while its load was between two steps: the load ends, nothing is to be told."""


class LocalCopy:
    """The life of one copy. ``settled`` is set once it serves or never will.

    Invariants: 1. it is in ``Copies`` from creation until GONE, and in the table from QUEUED on:
    what waits for its place takes none, and cannot be evicted; 2. once LOADING its weight is
    claimed in the accounting, before it is borrowed; 3. ``settled`` with ``failure`` None and phase
    GONE means "ask again": the copy was evicted, or the registry turned out different.
    """

    __slots__ = (
        "concurrency_max",
        "enqueued_ms",
        "failure",
        "has_answered",
        "info",
        "is_kept",
        "is_letting_go",
        "last_used_ms",
        "load_id",
        "loading_since_s",
        "model_id",
        "on_settled",
        "phase",
        "priority",
        "ready_s",
        "registered",
        "scope",
        "settled",
        "started",
        "twins",
        "weight_units",
    )

    def __init__(
        self,
        model_id: ModelId,
        info: ModelInfo,
        *,
        load_id: int,
        enqueued_ms: int,
        last_used_ms: int,
        priority: int,
        twins: frozenset[InstanceId] = frozenset(),
    ) -> None:
        self.model_id = model_id
        #: Copies there are no reason against this one, which is wanted beside them.
        self.twins = twins
        self.info = info
        #: Distinguishes this copy from later ones of the same model in this process.
        self.load_id = load_id
        #: The registration's value, ``instanceIds[me]``.
        self.enqueued_ms = enqueued_ms
        self.last_used_ms = last_used_ms
        self.priority = priority
        self.phase = Phase.NEW
        self.weight_units = 1
        self.concurrency_max = 0
        self.registered = False
        #: The runtime has answered a call to this very copy, so it did have the model.
        self.has_answered = False
        self.loading_since_s: float | None = None
        self.ready_s: float | None = None
        self.failure: MeshError | None = None
        #: Set when the copy is registered and queued, or settled: enough for an answer LOADING.
        self.started = anyio.Event()
        self.settled = anyio.Event()
        #: Told the same, for those who wait in lines rather than for the event.
        self.on_settled: Callable[[LocalCopy], None] | None = None
        #: It serves, and calls that waited for it in a line have not had their turn yet.
        self.is_letting_go = False
        #: It does not make room for others.
        self.is_kept = False
        self.scope = anyio.CancelScope()

    def __repr__(self) -> str:
        return f"<LocalCopy {self.model_id} {self.phase.value}, {self.weight_units} units>"

    @property
    def load_bits(self) -> int:
        """What the table keeps of ``load_id``."""
        return self.load_id & LOAD_BITS

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for it, so that its load is a use."""
        return self.priority >= AWAITED

    @property
    def serves(self) -> bool:
        """Whether calls may be sent to it."""
        return self.phase in _SERVING

    @property
    def has_claimed(self) -> bool:
        """Whether its memory is in use, so that leaving means an unload."""
        return self.phase in _CLAIMED

    def enter(self, phase: Phase) -> None:
        """Go on to the next phase; raises ``CopyGoneError`` when it left in the same moment as a
        wait ended.
        """
        if self.phase is Phase.GONE:
            raise CopyGoneError
        self.phase = phase

    def settle(self, failure: MeshError | None = None) -> None:
        """Wake everyone who waits; the first verdict stands."""
        if not self.settled.is_set():
            self.failure = failure
            self.started.set()
            self.settled.set()
            if self.on_settled is not None:
                self.on_settled(self)
