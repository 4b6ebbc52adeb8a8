"""The leader counts again how many vmodels refer to each model, and puts wrong numbers right.

No change made here can make a number wrong (``core.vmodel_changes``). Those of Java instances do,
and people who write to the store by hand: a number that is too high keeps a model for ever, one
that is too low lets go of it while it serves.

What does not agree in the mirrors is only suspected: they may be behind. A record of a model that
comes with another number than the mirror of vmodels has is looked at some seconds later, if they
still differ: so what a writer counted from a mirror that was behind does not stay for long. All the
others are looked at in turn.

What is suspected is counted in a table of all vmodels as of one revision. Every change of what is
referred to changes the model's record too; so the number holds as long as that record is the one of
that revision or an older one, and it is written on the condition that it still is.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import anyio
import anyio.lowlevel

from mm.config import Config
from mm.core.ids import ModelId
from mm.core.records import ModelRecord, RecordError, VModelRecord
from mm.core.vmodel_changes import references
from mm.errors import StoreUnavailableError
from mm.mesh.leader import Leader
from mm.mesh.ports import Item, Store
from mm.mesh.registry import Registry
from mm.mesh.seldom import FAILURES_LOUD_MAX, Seldom
from mm.mesh.statistics import Counters
from mm.mesh.vmodels import VModels

logger = logging.getLogger(__name__)

#: After an election: nothing is urgent here, and a new leader has other things to do.
FIRST_LOOK_S: Final = 10.0
#: Records looked at before others have their turn: a millisecond or two.
AT_ONCE: Final = 200
#: The records of a model and of the vmodels that name it come by two watches. What differs for
#: longer than that is worth a question to the store.
SUSPICION_S: Final = 2.0
#: Models that are suspected at a time; those beyond wait for the look at all.
SUSPECTS_MAX: Final = 1_000
#: Numbers put right in one look; more at a time would be a storm, and the next look comes.
REPAIRS_MAX: Final = 1_000
#: In JSON no text can look like that: its quotes would be escaped.
_REFERENCES = re.compile(rb'"refs":(-?\d{1,18})')


class ReferenceCounts:
    """Looks at all some time after an election, and then every ``reaper_interval_s``; at those that
    seem wrong as they come, ``SUSPICION_S`` later.

    Invariant: ``_suspected`` holds none but models whose number was not what the mirror of vmodels
    had when their record came last, while this instance led.
    """

    def __init__(
        self,
        *,
        config: Config,
        store: Store,
        registry: Registry,
        vmodels: VModels,
        leader: Leader,
        counters: Counters,
    ) -> None:
        self._config = config
        self._store = store
        self._registry = registry
        self._vmodels = vmodels
        self._leader = leader
        self._counters = counters
        self._repairs_told = Seldom(loud_max=FAILURES_LOUD_MAX)
        #: Since when each is.
        self._suspected: dict[ModelId, float] = {}
        self._news = anyio.Event()
        registry.mirror.listen(self._model_changed)

    async def run(self) -> None:
        """Do so until cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._look_at_suspects)
            await self._look_at_all()

    def _model_changed(self, key_id: str, item: Item | None) -> None:
        model_id = ModelId(key_id)
        if not self._leads or item is None or self._agrees(model_id, item):
            self._suspected.pop(model_id, None)
        elif len(self._suspected) < SUSPECTS_MAX:
            self._suspected.setdefault(model_id, anyio.current_time())
            self._news.set()

    @property
    def _leads(self) -> bool:
        return self._leader.is_leader and not self._config.kv_read_only

    def _agrees(self, model_id: ModelId, item: Item) -> bool:
        return _number(item) == self._vmodels.references.count(model_id)

    async def _look_at_suspects(self) -> None:
        while True:
            if not self._suspected:
                self._news = anyio.Event()
                await self._news.wait()
            await anyio.sleep(SUSPICION_S)
            before_s = anyio.current_time() - SUSPICION_S
            due = [each for each, since_s in self._suspected.items() if since_s <= before_s]
            for model_id in due:
                del self._suspected[model_id]
            wrong = [each for each in due if self._differs(each)]
            if wrong and self._leads:
                await self._try_look(wrong)

    def _differs(self, model_id: ModelId) -> bool:
        item = self._registry.mirror.get(model_id)
        return item is not None and not self._agrees(model_id, item)

    async def _try_look(self, suspects: Sequence[ModelId] | None = None) -> None:
        try:
            await self.look(suspects)
        except StoreUnavailableError as exc:
            logger.debug("references are not counted: %s", exc)

    async def _look_at_all(self) -> None:
        wait_s = FIRST_LOOK_S
        while True:
            changed = self._leader.changed
            if not self._leads:
                await changed.wait()
                continue
            with anyio.move_on_after(wait_s):
                await changed.wait()
            wait_s = FIRST_LOOK_S
            if changed.is_set():
                continue
            await self._try_look()
            wait_s = self._config.reaper_interval_s

    async def look(self, suspects: Sequence[ModelId] | None = None) -> None:
        """Count, and put right what is wrong, of all models or of these. Raises
        ``StoreUnavailableError``.
        """
        if self._vmodels.mirror.unconfirmed_count or self._registry.mirror.unconfirmed_count:
            return  # the store has lost records, and is given them back
        if suspects is None:
            suspects = await self._suspects()
        if not suspects:
            return
        table = await self._store.list(self._vmodels.mirror.prefix)
        expected, is_whole = await _count(table.items)
        for model_id in suspects[:REPAIRS_MAX]:
            item = await self._registry.mirror.read(model_id)
            if item is not None and item.mod_revision <= table.revision:
                await self._repair(model_id, expected[model_id], may_lower=is_whole)

    async def _suspects(self) -> list[ModelId]:
        """Answer the models whose number is not what the mirrors say, without parsing them all."""
        expected, is_whole = await _count([item for _, item in self._vmodels.mirror.items()])
        found = []
        for number, (key_id, item) in enumerate(list(self._registry.mirror.items())):
            if not number % AT_ONCE:
                await anyio.lowlevel.checkpoint()
            count, right = _number(item), expected[ModelId(key_id)]
            is_orphan = is_whole and not right and b'"autoDel":true' in item.value
            if count < right or (count != right and is_whole) or is_orphan:
                found.append(ModelId(key_id))
        return found

    async def _repair(self, model_id: ModelId, right: int, *, may_lower: bool) -> None:
        """Write the right number, or delete what is only there as long as it is referred to."""
        seen = self._registry.get(model_id)
        if seen is None or (seen.references > right and not may_lower):
            return
        is_orphan = not right and seen.auto_delete and may_lower
        if seen.references == right and not is_orphan:
            return
        wanted = None if is_orphan else replace(seen, references=right)

        def change(present: ModelRecord | None) -> ModelRecord | None:
            # Another record may have another number; the next look will tell.
            return wanted if present == seen else present

        try:
            written = await self._registry.update(model_id, change)
        except RecordError as exc:
            logger.debug("references to model %s are not put right: %s", model_id, exc)
            return
        if written == wanted:
            self._counters.references_repaired += 1
            logger.log(
                self._repairs_told.level(anyio.current_time()),
                "model %s had %d references, %d is right: put right%s",
                model_id,
                seen.references,
                right,
                ", and deleted" if is_orphan else "",
            )


def _number(item: Item) -> int:
    """Answer the number in a model's record, without parsing all of it."""
    told = _REFERENCES.search(item.value)
    return 0 if told is None else int(told[1])


async def _count(items: Sequence[Item]) -> tuple[Counter[ModelId], bool]:
    """Answer how many vmodels refer to each model, and whether all of them could be read."""
    found: Counter[ModelId] = Counter()
    is_whole = True
    for number, item in enumerate(items):
        if not number % AT_ONCE:
            await anyio.lowlevel.checkpoint()
        try:
            found.update(references(VModelRecord.decode(item.value)))
        except RecordError:
            is_whole = False
    return found, is_whole
