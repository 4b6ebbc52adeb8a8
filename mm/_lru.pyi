"""The table of models: time-ordered weighted LRU of local copies, and where ready copies are.

The interface that the extension ``mm/_lru.pyx`` and its twin ``mm/_lru_py.py`` both have (design
section 4). Import it from ``mm.table``, which picks one of them.
"""

from collections.abc import Collection, Iterable, Iterator

from mm._lru_words import ID_BYTES_MAX as ID_BYTES_MAX
from mm._lru_words import LOCAL as LOCAL
from mm._lru_words import NONE as NONE
from mm._lru_words import CopyState, Evicted

class Table:
    """One writer (this object's methods, under the GIL), many readers (``_lru.pxd``, without it).

    What is asked of an unknown model is answered as for one without copies; what is demanded of it
    is a KeyError. An id that is empty or too long, or a number outside its limits, is a ValueError
    that names the limit; no room is MemoryError.
    """

    def __init__(self, capacity_units: int) -> None: ...

    # Slots: a model with a copy somewhere, or known for another reason. `put`, `set_peers` (with
    # one) and `set_alias` add by themselves, and take back an earlier `discard`.
    def add(self, model_id: str) -> None:
        """Make the model known (again); a model already known stays as it is."""

    def discard(self, model_id: str) -> None:
        """Forget the model and its peers as soon as nothing holds it; until then it stays known.

        What holds: a copy that counts, a state other than ABSENT, a call in flight, an alias.
        """

    def __contains__(self, model_id: object) -> bool: ...
    def __len__(self) -> int: ...

    # The order of local copies, oldest first by the time given; of equal times, the copy put first.
    # What leaves is returned, oldest first, and is UNLOADING then if it was LOADING or READY.
    @property
    def capacity_units(self) -> int: ...
    @property
    def used_units(self) -> int: ...
    @property
    def count(self) -> int:
        """How many copies count."""

    def put(self, model_id: str, weight_units: int, last_used_ms: int) -> list[Evicted]:
        """Count a copy here; of one that counts already set the weight and raise the time.

        The copy put is itself a candidate: one too large for the table leaves at once, the last.
        """

    def set_weight(self, model_id: str, weight_units: int) -> list[Evicted]:
        """Change the weight of a copy that counts (else KeyError); growing may evict it itself."""

    @property
    def kept_units(self) -> int:
        """What the weights of those kept sum up to."""

    def keep(self, model_id: str, kept: bool) -> bool:
        """Let a copy go only when no other is left, or in its turn again; False if none counts.

        Those kept stand last in the order, in which they were kept; whatever takes a copy out of it
        ends that.
        """

    def is_kept(self, model_id: str) -> bool:
        """Answer whether the copy is kept."""

    def set_capacity(self, capacity_units: int) -> list[Evicted]:
        """Change the capacity, evicting what no longer fits."""

    def remove(self, model_id: str) -> Evicted | None:
        """Take one copy out of the order, as eviction does; None if it does not count."""

    def weight(self, model_id: str) -> int:
        """Answer the weight of the copy, 0 if none counts."""

    def touch(self, model_id: str, now_ms: int) -> bool:
        """Raise the time of last use, never lower it; False if no copy counts."""

    def last_used(self, model_id: str) -> int | None:
        """Answer the time of last use, None if no copy counts."""

    def oldest(self) -> tuple[str, int] | None:
        """Answer the copy that would go next and its time, None if there is none but those kept."""

    def cached(self) -> Iterator[tuple[str, int, int]]:
        """Iterate (model id, weight, last used) over a snapshot, oldest first, those kept last."""

    # The life of the local copy; a call pins it. Counting in the order and state are two things.
    def state(self, model_id: str) -> CopyState:
        """Answer the state of the copy here, ABSENT for an unknown model."""

    def set_state(self, model_id: str, state: CopyState) -> None:
        """Store the state; which step may follow which is the caller's to know."""

    def begin_unload(self, model_id: str) -> int:
        """Store UNLOADING, so that no call pins any more; answer the calls still in flight."""

    def pin(self, model_id: str) -> bool:
        """Count a call in flight on a copy that is READY; False, and nothing counted, otherwise."""

    def unpin(self, model_id: str) -> None:
        """End a call that ``pin`` counted; ValueError if none is in flight."""

    def in_flight(self, model_id: str) -> int:
        """Answer the calls that hold the copy here."""

    def set_concurrency_max(self, model_id: str, calls_max: int) -> None:
        """Store how many calls the copy takes at a time, 0 for no limit; ``pin`` ignores it."""

    def concurrency_max(self, model_id: str) -> int:
        """Answer what ``set_concurrency_max`` stored, else 0."""

    def set_flags(self, model_id: str, flags: int) -> None:
        """Store 32 bits whose meaning is the caller's."""

    def flags(self, model_id: str) -> int:
        """Answer what ``set_flags`` stored, else 0."""

    def take_busy(self) -> list[tuple[str, int, int]]:
        """Answer (model id, calls pinned since last asked, calls in flight) of those with either.

        Of copies that count, in any order; up to 2**31 - 1 calls. The walk takes 10,000 copies in
        a fraction of a millisecond: those without calls cost no Python.
        """

    # Other instances, and which of them hold a ready copy.
    def add_instance(self, instance_id: str) -> int:
        """Answer the handle of the instance (above 0), a new one if it has none."""

    def remove_instance(self, handle: int) -> None:
        """End the handle everywhere at once; it never comes back. An ended one is left alone."""

    def instance_of(self, handle: int) -> str | None:
        """Answer whose handle it is, None for one that has ended or never was."""

    def set_peers(self, model_id: str, handles: Iterable[int]) -> None:
        """Say which instances hold a ready copy; a model with one becomes known.

        Loads told before are kept; handles that have ended, and doubles, are dropped.
        """

    def peers(self, model_id: str) -> list[int]:
        """Answer the live handles in the order given."""

    def peer_loads(self, model_id: str) -> list[tuple[int, int]]:
        """Answer (handle, calls in flight as that copy told last) of the live peers, in order."""

    def report_load(self, handle: int, model_id: str, in_flight: int) -> None:
        """Note the calls in flight that a copy told of; one that is no peer is left alone."""

    def choose(self, model_id: str, random: int, exclude: Collection[int] = ()) -> int:
        """Pick a ready copy: of two drawn with ``random`` (64 bits) the one with fewer calls.

        The copy here (LOCAL) wins a tie, else the first drawn; NONE if there is no candidate.
        """

    # VModel ids: a second key space, each naming the slot of its active model.
    def set_alias(self, vmodel_id: str, model_id: str) -> None:
        """Let the vmodel id name this model, which it makes known and holds."""

    def remove_alias(self, vmodel_id: str) -> None:
        """Forget the vmodel id; one that is unknown is left alone."""

    def resolve(self, vmodel_id: str) -> str | None:
        """Answer the id of the vmodel's active model, None if it is unknown."""

    # Readers in other threads: those without the GIL use the functions of `_lru.pxd`.
    def register_reader(self) -> int:
        """Answer the number of a new reader, which is offline."""

    def unregister_reader(self, reader: int) -> None:
        """Give the number back; the reader must not read any more."""

    def reader_online(self, reader: int) -> None:
        """Pass a quiescent point: the reader has forgotten all it saw before, and reads on."""

    def reader_offline(self, reader: int) -> None:
        """Pass a quiescent point, and read nothing until ``reader_online``."""

    def reclaim(self) -> int:
        """Forget discarded models that calls have left; answer how many slots readers let go."""

    def memory_bytes(self) -> int:
        """Answer what the table takes, everything counted."""

    def check_invariants(self) -> None:
        """Walk everything and raise AssertionError at the first thing that is not as it must be."""
