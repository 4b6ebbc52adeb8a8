"""One model loaded, or on its way, in this instance (the "CE" of spec core 3.3)."""

from __future__ import annotations

import enum

import anyio

from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.errors import MeshError


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

    Invariants: 1. it is in the table and in ``Copies`` from creation until GONE; 2. once LOADING
    its weight is claimed
    in the accounting, before it is borrowed; 3. ``settled`` with ``failure`` None and phase GONE
    means "ask again":
    the copy was evicted, or the registry turned out different.
    """

    __slots__ = (
        "concurrency_max",
        "enqueued_ms",
        "failure",
        "has_answered",
        "info",
        "last_used_ms",
        "load_id",
        "loading_since_s",
        "model_id",
        "phase",
        "priority",
        "ready_s",
        "registered",
        "scope",
        "settled",
        "started",
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
    ) -> None:
        self.model_id = model_id
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
        self.scope = anyio.CancelScope()

    def __repr__(self) -> str:
        return f"<LocalCopy {self.model_id} {self.phase.value}, {self.weight_units} units>"

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
