"""Lists of models and vmodels, a page at a time, as this instance knows them.

Answered from the mirrors: no store and no peer is asked, so nobody minds how often it is done. A
page costs what is on it, however many there are; one that looks for the few among many ends after
so many records, and says where the next one goes on. Pages follow the order of ids, and a place in
them is an id: what is there from the first page to the last is told once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from mm.core.ids import UNIT_BYTES, InstanceId, ModelId, VModelId
from mm.core.model_policy import ModelPolicy
from mm.core.records import ModelRecord, RecordError, VModelRecord
from mm.errors import InvalidRequestError, LimitError
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Item, ModelStatus
from mm.mesh.registry import Registry
from mm.mesh.statuses import Statuses
from mm.mesh.vmodels import VModels

#: Entries on a page that does not say, and at most: one that is there in a few tens of
#: milliseconds.
PAGE_SIZE: Final = 100
PAGE_SIZE_MAX: Final = 1_000
#: Bytes of the records on a page, ids counted, so that it stays far below the 4 MiB that gRPC
#: clients take unless told otherwise.
PAGE_BYTES_MAX: Final = 1024 * 1024
#: Records looked at for a page, on it or not: a tenth of a second at the worst.
PAGE_LOOKED_AT_MAX: Final = 2_000
#: Records looked at in a row. Between these, calls are served: 50 take a millisecond or two.
IN_A_ROW: Final = 50
#: Lists wait for each other, so that calls stand behind one of them at most. Beyond this number
#: somebody lists all the time.
WAITING_MAX: Final = 100

T = TypeVar("T", bound="ListedModel | ListedVModel")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """What a page tells. The next one begins behind ``next_after``; empty: there is none."""

    entries: tuple[T, ...]
    next_after: str


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page: its entries are behind ``after`` and begin with ``prefix``. 0: as many as usual.

    Raises ``InvalidRequestError``.
    """

    size: int = 0
    after: str = ""
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise InvalidRequestError(f"page_size is {self.size}; allowed: 0 and more")


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A registered model. One that is gone has the status NOT_FOUND and nothing else."""

    model_id: ModelId
    status: ModelStatus
    model_type: str = ""
    path: str = ""
    last_used_ms: int = 0
    size_bytes: int = 0
    references: int = 0
    vmodel_ids: tuple[VModelId, ...] = ()
    policy: ModelPolicy = field(default_factory=ModelPolicy)

    @property
    def names_bytes(self) -> int:
        """What it tells besides its record, nearly: an id has 4 KiB at most, a model 100 of
        them.
        """
        return sum(map(len, self.vmodel_ids))


@dataclass(frozen=True, slots=True)
class ListedVModel:
    """A vmodel, with its status in the words of the API (spec core 6.1). The others are empty for
    one that is gone.
    """

    vmodel_id: VModelId
    status: str
    active_model_id: str = ""
    target_model_id: str = ""
    owner: str = ""

    @property
    def names_bytes(self) -> int:
        """All is in its record."""
        return 0


class Listing:
    """Pages of both tables."""

    def __init__(self, registry: Registry, vmodels: VModels, statuses: Statuses) -> None:
        self._registry = registry
        self._vmodels = vmodels
        self._statuses = statuses
        self._references = vmodels.references
        self._turn = anyio.Semaphore(1)

    async def models(
        self, page: PageRequest, *, model_type: str = "", status: str = ""
    ) -> Page[ListedModel]:
        """Answer models, those of a type or with a status if one is given. Raises ``MeshError``."""

        def look(key_id: str, _item: Item) -> ListedModel | None:
            record = self._registry.peek(ModelId(key_id))
            if record is None or (model_type and record.info.model_type != model_type):
                return None
            listed = self._listed(ModelId(key_id), record)
            return listed if status in ("", listed.status.status) else None

        return await self._page(self._registry.mirror, page, look)

    async def vmodels(
        self, page: PageRequest, *, owner: str = "", status: str = ""
    ) -> Page[ListedVModel]:
        """Answer vmodels, those of an owner or with a status if one is given. Raises
        ``MeshError``.
        """

        def look(key_id: str, item: Item) -> ListedVModel | None:
            listed = _listed_vmodel(key_id, item)
            if listed is None or (owner and listed.owner != owner):
                return None
            return listed if status in ("", listed.status) else None

        return await self._page(self._vmodels.mirror, page, look)

    def model(self, model_id: ModelId) -> ListedModel:
        """Answer one model as it is now."""
        record = self._registry.peek(model_id)
        if record is None:
            return ListedModel(model_id, ModelStatus("NOT_FOUND"))
        return self._listed(model_id, record)

    def vmodel(self, vmodel_id: VModelId) -> ListedVModel:
        """Answer one vmodel as it is now."""
        item = self._vmodels.mirror.get(vmodel_id)
        listed = None if item is None else _listed_vmodel(vmodel_id, item)
        return listed or ListedVModel(vmodel_id, "NOT_FOUND")

    async def _page(
        self, mirror: Mirror, page: PageRequest, look: Callable[[str, Item], T | None]
    ) -> Page[T]:
        if self._turn.statistics().tasks_waiting >= WAITING_MAX:
            raise LimitError(
                f"{WAITING_MAX} lists are waiting already, the limit", retry_after_ms=1000
            )
        async with self._turn:
            gathered = _Gathered(page, look)
            after = page.after
            for _ in range(0, PAGE_LOOKED_AT_MAX, IN_A_ROW):
                key_ids = mirror.ids.following(after, IN_A_ROW, prefix=page.prefix)
                if not gathered.take(mirror, key_ids) or len(key_ids) < IN_A_ROW:
                    break
                after = key_ids[-1]
                await checkpoint()
        last = gathered.last
        more = bool(last) and bool(mirror.ids.following(last, 1, prefix=page.prefix))
        return Page(tuple(gathered.entries), last if more else "")

    def _listed(self, model_id: ModelId, record: ModelRecord) -> ListedModel:
        sizes = [_size_units(record, instance_id) for instance_id in record.copies]
        vmodel_ids = self._references.of(model_id) if record.references else ()
        return ListedModel(
            model_id,
            self._statuses.known(model_id, record),
            model_type=record.info.model_type,
            path=record.info.path,
            last_used_ms=record.last_used_ms,
            size_bytes=max(sizes, default=0) * UNIT_BYTES,
            references=record.references,
            vmodel_ids=vmodel_ids,
            policy=record.policy,
        )


class _Gathered(Generic[T]):
    """The entries of a page, until it is full."""

    def __init__(self, page: PageRequest, look: Callable[[str, Item], T | None]) -> None:
        self.entries: list[T] = []
        #: The last id that was looked at: the next page goes on behind it.
        self.last = ""
        self._size_max = min(page.size or PAGE_SIZE, PAGE_SIZE_MAX)
        self._size_bytes = 0
        self._look = look

    def take(self, mirror: Mirror, key_ids: Iterable[str]) -> bool:
        """Look at the next ids; answers whether there is room for more."""
        for key_id in key_ids:
            item = mirror.get(key_id)
            assert item is not None, "the index has what the mirror has"
            entry = self._look(key_id, item)
            if entry is not None:
                self._size_bytes += len(key_id) + len(item.value) + entry.names_bytes
                if self.entries and self._size_bytes > PAGE_BYTES_MAX:
                    return False
                self.entries.append(entry)
            self.last = key_id
            if len(self.entries) >= self._size_max:
                return False
        return True


def _listed_vmodel(vmodel_id: str, item: Item) -> ListedVModel | None:
    try:
        record = VModelRecord.decode(item.value)
    except RecordError:
        return None  # the log has it where it is used
    return ListedVModel(
        VModelId(vmodel_id),
        _vmodel_status(record),
        record.active_model_id,
        record.target_model_id,
        record.owner,
    )


def _vmodel_status(record: VModelRecord) -> str:
    if record.active_model_id == record.target_model_id:
        return "DEFINED"
    return "TRANSITION_FAILED" if record.failed else "TRANSITIONING"


def _size_units(record: ModelRecord, instance_id: InstanceId) -> int:
    state = record.copy_state(instance_id)
    return 0 if state is None else state.size_units
