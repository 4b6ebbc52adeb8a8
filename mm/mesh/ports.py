"""What the mesh needs of the world, as Protocols: clock, store, runtime, peers; and what the data
plane needs of the mesh.

``edge`` implements the first four, ``mm.testing`` fakes them, ``mm.mesh.router`` implements
``Router``. Every error of
the world that can be answered to a client is a ``MeshError``; anything else that escapes is a bug.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from mm.core.calls import Call, Outcome, PeerRoute, Route
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelInfo


class Clock(Protocol):
    """Wall time. Waiting and time limits use ``anyio.current_time()`` instead."""

    def now_ms(self) -> int:
        """Answer milliseconds since the epoch."""
        ...


# --- store ---


@dataclass(frozen=True, slots=True)
class Item:
    """A stored value. ``mod_revision`` is its version for compare-and-set (spec core 1.4)."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int = 0
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Put:
    """The key was created or changed."""

    item: Item


@dataclass(frozen=True, slots=True)
class Delete:
    """The key is gone, as of ``mod_revision``."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Resync:
    """The whole table at one revision: first event of every watch, and again when events were
    missed.

    ``is_of_other_store``: it does not continue what this watch told before. The store was emptied,
    restored from a backup or exchanged; revisions of before mean nothing there, and what is not in
    it may never have been deleted.
    """

    items: Sequence[Item]
    revision: int
    is_of_other_store: bool = False


WatchEvent = Put | Delete | Resync


@dataclass(frozen=True, slots=True)
class Write:
    """One conditional write. ``value`` None deletes. ``if_revision`` 0 means "must not exist", None
    "whatever is there".

    ``lease_id`` binds the key to a lease; 0 for none.
    """

    key: str
    value: bytes | None
    if_revision: int | None
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """What must hold of a key that a transaction depends on and does not write; 0 means "must not
    exist".
    """

    key: str
    if_revision: int


#: Of a transaction, each of another key.
Part: TypeAlias = Write | Check


@dataclass(frozen=True, slots=True)
class WriteResult:
    """``succeeded``, and what is stored now: the item just written, or the one that stood in the
    way; None if absent.
    """

    succeeded: bool
    item: Item | None


class Session(Protocol):
    """A lease that is kept alive and re-created after a loss; keys bound to it vanish when it
    expires.
    """

    @property
    def lease_id(self) -> int:
        """The current lease, 0 while there is none."""
        ...

    async def wait_change(self, lease_id: int) -> int:
        """Return the current lease as soon as it differs from ``lease_id``."""
        ...


#: Keys whose revisions are read at once: etcd takes no more operations in a transaction.
REVISIONS_MAX: Final = 128


class Store(Protocol):
    """The ports of spec core 1.4 over etcd or memory. Keys are whole logical paths; root prefixes
    are the store's affair.

    Every method raises ``StoreUnavailableError`` within ``Config.store_timeout_s`` when the store
    cannot be reached. So do reads and writes once the store is another one, until every open watch
    has told so: nobody is to take what is missing there for deleted.
    """

    @property
    def connected(self) -> bool:
        """Whether the last contact succeeded and is recent (10 s); never blocks."""
        ...

    @property
    def out_of_space(self) -> bool:
        """Whether it refused a write because it is full, and has taken none since; never blocks.

        Reads, watches and leases go on; writes raise ``StoreUnavailableError``.
        """
        ...

    async def check(self) -> None:
        """Return if the store answers."""
        ...

    async def get(self, key: str) -> Item | None:
        """Read linearizably."""
        ...

    async def revisions(self, keys: Sequence[str]) -> Sequence[int]:
        """Read the revision of each key linearizably, all at one moment; 0 for one that is not
        there. At most ``REVISIONS_MAX`` keys.
        """
        ...

    async def list(self, prefix: str) -> Resync:
        """Read a table in pages at one revision."""
        ...

    async def write(self, write: Write) -> WriteResult:
        """One compare-and-set. Concurrent writes may travel in one transaction; results are per key
        regardless.
        """
        ...

    async def transact(self, parts: Sequence[Part]) -> tuple[bool, Sequence[Item | None]]:
        """All writes if every condition holds, or none; then what is stored under each key, in the
        order given.
        """
        ...

    def watch(
        self, prefix: str
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[WatchEvent]]]:
        """Follow a table: batches of events, a ``Resync`` first. Survives outages; a batch is never
        empty.
        """
        ...

    def session(self, ttl_s: int) -> AbstractAsyncContextManager[Session]:
        """Hold a lease; revoked on the way out (bounded by ``Config.store_timeout_s``)."""
        ...


# --- the runtime beside this instance ---


@dataclass(frozen=True, slots=True)
class RuntimeParameters:
    """What the runtime said of itself when it became READY (spec core 3.1, around 8)."""

    capacity_bytes: int
    default_model_size_bytes: int
    loading_concurrency_max: int
    load_timeout_ms: int
    #: Full method name without leading slash -> id injection path; empty mapping: every method is
    #: allowed.
    methods: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    allow_any_method: bool = False
    limit_model_concurrency: bool = False
    runtime_version: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The answer to a load. ``size_bytes`` 0: ask ``model_size``."""

    size_bytes: int
    concurrency_max: int


class RuntimeCallError(Exception):
    """The runtime answered a management call with an error. ``code`` is a ``StatusCode`` number."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Runtime(Protocol):
    """The management half of the runtime SPI (around 8). Calls are cancelled on cancellation."""

    async def wait_ready(self) -> RuntimeParameters:
        """Poll until READY; raises ``StartupError`` after ``Config.runtime_start_timeout_s`` or on
        nonsense.
        """
        ...

    async def wait_lost(self) -> str:
        """Return why once the runtime is gone, and with it what it had loaded. From then on nothing
        but ``wait_back`` reaches it: unloads succeed, all else raises ``RuntimeUnavailableError``.
        """
        ...

    async def wait_back(self, check: Callable[[RuntimeParameters], object]) -> RuntimeParameters:
        """Poll until it is READY again, and ``check`` does not raise ``StartupError``, however
        long that takes. From then on it can be called.
        """
        ...

    async def load(self, model_id: ModelId, info: ModelInfo) -> Loaded:
        """Load it; raises ``RuntimeCallError`` or ``RuntimeUnavailableError``."""
        ...

    async def unload(self, model_id: ModelId) -> None:
        """NOT_FOUND counts as success."""
        ...

    async def predict_size(self, model_id: ModelId, info: ModelInfo) -> int:
        """Answer bytes; 0 when the runtime cannot tell (UNIMPLEMENTED is remembered)."""
        ...

    async def model_size(self, model_id: ModelId) -> int:
        """Answer bytes; 0 when the runtime cannot tell."""
        ...


# --- other instances ---


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who answers at an address."""

    instance_id: InstanceId
    start_time_ms: int


@dataclass(frozen=True, slots=True)
class CopyStatus:
    """One copy in a status answer (around 5): a ``ModelStatus`` name, where, since when."""

    instance_id: InstanceId
    status: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The answer to register, ensure-loaded and get-status: NOT_FOUND, NOT_LOADED, LOADING, LOADED,
    LOADING_FAILED, UNKNOWN.
    """

    status: str
    errors: tuple[str, ...] = ()
    copies: tuple[CopyStatus, ...] = ()


class Peers(Protocol):
    """Calls to other instances other than proxied ones. ``address`` is the ``addr`` of their
    record.
    """

    async def identify(self, address: str, timeout_s: float) -> PeerIdentity | None:
        """Answer who is there, None if nobody answers in time."""
        ...

    async def ensure_loaded(
        self, route: PeerRoute, *, sync: bool, last_used_ms: int, timeout_s: float
    ) -> ModelStatus:
        """Forward an ensure-loaded by a ``PeerRoute``; raises ``PeerCallError`` if it did not do
        it.
        """
        ...

    async def model_status(self, route: PeerRoute, timeout_s: float) -> ModelStatus:
        """Forward a get-status by a ``PeerRoute``; raises ``PeerCallError``."""
        ...

    async def push_loads(
        self, address: str, me: InstanceId, loads: Mapping[ModelId, int], timeout_s: float
    ) -> None:
        """Tell a peer how many calls copies of ours have in flight; it may get lost on the way.

        Raises ``PeerCallError`` if the peer does not take such news.
        """
        ...

    async def tell_demand(
        self,
        address: str,
        me: InstanceId,
        demands: Mapping[ModelId, tuple[int, int]],
        timeout_s: float,
    ) -> None:
        """Tell the instance that decides about models how many calls came to copies of ours since
        it was told last, and how many are in flight. Raises ``PeerCallError``.
        """
        ...

    async def withdraw_copy(self, address: str, model_id: ModelId, timeout_s: float) -> bool:
        """Ask a peer to give up its copy; answers whether it does. Raises ``PeerCallError``."""
        ...


class PeerCallError(Exception):
    """A peer could not be reached or refused; ``outcome`` says which, for the router.

    ``hop_state``: what the peer told of itself with a refusal (``mm-hop-state``).
    ``retry_after_ms``: when it thinks that a retry makes sense (``grpc-retry-pushback-ms``).
    ``answered``: it said something itself, whatever it was.
    """

    def __init__(
        self,
        outcome: Outcome,
        message: str,
        hop_state: str | None = None,
        retry_after_ms: int | None = None,
        *,
        answered: bool = True,
    ) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.hop_state = hop_state
        self.retry_after_ms = retry_after_ms
        self.answered = answered and outcome is not Outcome.UNREACHABLE


# --- what the data plane asks of the mesh ---


class Router(Protocol):
    """The one question (design section 2)."""

    async def route(self, call: Call) -> Route:
        """Answer where to send the call now; waits for loads, places, counts. Raises ``MeshError``.

        A cancelled wait leaves the load running. Each answered route must be given back by
        ``finished``.
        """
        ...

    def finished(self, call: Call, route: Route, outcome: Outcome, message: str = "") -> bool:
        """Give the route back and say what became of it; answers whether asking again makes sense.

        ``message`` is the failure's own text, for the error if nothing else works. False after a
        failed attempt means:
        pass on what the upstream said.
        """
        ...

    def route_there(
        self, model_id: ModelId, handle: int, *, may_redirect: bool
    ) -> PeerRoute | None:
        """Answer the route that the wire took to a copy; None if that instance is gone."""
        ...

    def tried(self, call: Call, route: Route, outcome: Outcome, message: str) -> bool:
        """Hear of an attempt that the wire made on its own; answers like ``finished``."""
        ...

    def request_grew(self, call: Call, size_bytes: int) -> None:
        """Hear of more bytes of a request while the call ``waits``; raises ``MeshError`` if that
        is too much.
        """
        ...

    def request_passed_on(self, call: Call) -> None:
        """Hear that nothing of a request is kept here any more."""
        ...

    def answer_began(self, call: Call) -> None:
        """Hear that an answer comes: if the call waited at a peer, that is over."""
        ...

    async def resolve(
        self, vmodel_id: str, missing: Collection[ModelId] = (), *, fresh: bool = False
    ) -> ModelId:
        """Answer the model that calls of a vmodel go to, once some were found ``missing`` one that
        was not; with ``fresh`` as the store says. Raises ``MeshError``.
        """
        ...

    def report_state(self, call: Call, route: PeerRoute, state: str) -> None:
        """Note what a peer told of itself as it refused a load (``mm-hop-state``)."""
        ...

    def report_load(self, route: PeerRoute, in_flight: int) -> None:
        """Note the calls in flight that a peer's copy told of in its reply (``mm-hop-load``)."""
        ...

    def tell_load(self, call: Call) -> int:
        """Answer the calls that the local copy has in flight besides this one, for ``mm-hop-load``;
        the sender is taken to know it from now on.
        """
        ...
