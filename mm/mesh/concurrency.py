"""How many calls a copy gets at a time, where its runtime asks for a limit (spec core 2.8.5).

Owns the slots of each copy and the line before them. Which copy a call goes to is ``router``'s,
which gives out a ``LocalRoute`` only with a slot; runtimes that ask for no limit cost nothing here.

The wire takes slots by itself, as long as fewer calls are in flight at a copy than it has slots
(``pin_below`` in ``mm/_lru.pxd``). Calls in flight are all that the table has pinned, those in the
line included: so whoever waits here is never overtaken there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import anyio

from mm.core.calls import NamedBy
from mm.core.ids import ModelId
from mm.errors import ModelMovedError, QueueFullError
from mm.mesh.local_copy import LocalCopy
from mm.mesh.measures import Measures
from mm.mesh.statistics import Counters
from mm.mesh.waiters import HasMoved

#: Calls that one copy has and keeps waiting when `copy_calls_max` is 0: for each that it takes at a
#: time, but a copy that takes one at a time has a line too.
CALLS_FOR_EACH_SLOT = 8
CALLS_MIN = 16


class _Waiting:
    """A call in the line. Woken without a slot: the copy leaves, or the call's vmodel has moved."""

    __slots__ = ("has_moved", "has_slot", "named_by", "woken")

    def __init__(self, named_by: NamedBy | None) -> None:
        self.named_by = named_by
        self.has_slot = False
        self.has_moved = False
        self.woken = anyio.Event()


class _Slots:
    """The slots of one copy, and who waits for one, in order of arrival.

    Invariant: nobody waits while a slot is free; but from the moment that the wire gives one back
    until ``CallLimits.look`` is told.
    """

    __slots__ = ("calls_max", "line", "load_id", "model_id", "running_count", "slots_max")

    def __init__(
        self, model_id: ModelId, load_id: int, slots_max: int, calls_max: int | None
    ) -> None:
        self.model_id = model_id
        self.load_id = load_id
        self.slots_max = slots_max
        #: Those running and waiting together; None: any number.
        self.calls_max = calls_max
        #: Not those of the wire.
        self.running_count = 0
        self.line: OrderedDict[_Waiting, None] = OrderedDict()

    @property
    def known_count(self) -> int:
        """How many calls there are here, running and waiting."""
        return self.running_count + len(self.line)

    def grant(self) -> None:
        """Give a slot to whoever waits the longest."""
        waiting, _ = self.line.popitem(last=False)
        waiting.has_slot = True
        waiting.woken.set()


class CallLimits:
    """The slots of all copies of a runtime that asked for ``limitModelConcurrency``.

    The calls that a copy runs and keeps waiting are bounded; one more is refused at once, and may
    be served elsewhere. Those who wait for a copy that leaves are let go at once, to look again:
    what the copy runs is all that its unload waits for. So are those whose vmodel stands for
    another model by now: they go where it went.

    Invariants: 1. there are slots of a copy here exactly while calls run or wait; 2. ``_named`` has
    the calls in lines that a vmodel named.
    """

    def __init__(self, copy_calls_max: int, counters: Counters, measures: Measures) -> None:
        #: Answers the calls in flight at a copy, those here and those in whose name it is asked
        #: included; None: there are no others.
        self.in_flight: Callable[[ModelId], int] | None = None
        self._copy_calls_max = copy_calls_max
        self._counters = counters
        self._measures = measures
        #: By the number of the copy's load.
        self._slots: dict[int, _Slots] = {}
        #: By vmodel, each with the line that it stands in.
        self._named: dict[str, dict[_Waiting, _Slots]] = {}

    async def enter(self, copy: LocalCopy, named_by: NamedBy | None = None) -> bool:
        """Return with a slot of the copy, to be given back by ``leave``; False if the copy left
        while the call waited.

        Raises ``QueueFullError`` at once if there are too many already, and ``ModelMovedError``
        when the vmodel that named the model stands for another one while the call waits.
        """
        slots = self._slots.get(copy.load_id)
        if slots is None:
            slots = self._slots[copy.load_id] = self._slots_of(copy)
        others_count = self._others(slots, asking_count=1)
        if not slots.line and slots.running_count + others_count < slots.slots_max:
            slots.running_count += 1
            self._measures.slot_wait_ms.observe(0, copy.model_id)
            return True
        if slots.calls_max is not None and slots.known_count + others_count >= slots.calls_max:
            self._forget_unused(copy.load_id)
            self._counters.calls_overloaded += 1
            raise QueueFullError("Model queue overload")
        waiting = _Waiting(named_by)
        self._join(slots, waiting)
        began_s = anyio.current_time()
        try:
            await waiting.woken.wait()
        except BaseException:
            if waiting.has_slot:  # granted in the same moment: pass it on
                self.leave(copy.load_id)
            slots.line.pop(waiting, None)
            self._forget_unused(copy.load_id)
            raise
        finally:
            self._forget_named(waiting)
        if waiting.has_moved:
            raise ModelMovedError
        if waiting.has_slot and not copy.serves:
            self.leave(copy.load_id)
            return False
        if waiting.has_slot:
            waited_ms = 1000 * (anyio.current_time() - began_s)
            self._measures.slot_wait_ms.observe(waited_ms, copy.model_id)
        return waiting.has_slot

    def leave(self, load_id: int) -> None:
        """Give the slot of a call back; the next in the line gets it."""
        slots = self._slots[load_id]
        if slots.line:
            slots.grant()
            return
        slots.running_count -= 1
        self._forget_unused(load_id)

    def look(self) -> None:
        """Give out what slots the wire has given back."""
        for slots in self._slots.values():
            while slots.line and slots.running_count + self._others(slots) < slots.slots_max:
                slots.running_count += 1
                slots.grant()

    def copy_left(self, load_id: int) -> None:
        """The copy takes no more calls: who waits for it may look elsewhere."""
        slots = self._slots.get(load_id)
        while slots is not None and slots.line:
            slots.line.popitem(last=False)[0].woken.set()
        self._forget_unused(load_id)

    def vmodel_changed(self, has_moved: HasMoved, vmodel_id: str, _: object = None) -> None:
        """Let those go whose vmodel stands for another model than the one they wait for."""
        for waiting, slots in list(self._named.get(vmodel_id, {}).items()):
            assert waiting.named_by is not None, waiting
            if waiting in slots.line and has_moved(waiting.named_by, slots.model_id):
                del slots.line[waiting]
                waiting.has_moved = True
                waiting.woken.set()
                self._forget_unused(slots.load_id)

    def _join(self, slots: _Slots, waiting: _Waiting) -> None:
        slots.line[waiting] = None
        if waiting.named_by is not None:
            self._named.setdefault(waiting.named_by.vmodel_id, {})[waiting] = slots

    def _forget_named(self, waiting: _Waiting) -> None:
        if waiting.named_by is None:
            return
        named = self._named[waiting.named_by.vmodel_id]
        del named[waiting]
        if not named:
            del self._named[waiting.named_by.vmodel_id]

    def _others(self, slots: _Slots, asking_count: int = 0) -> int:
        """Answer the calls of the wire at a copy."""
        if self.in_flight is None:
            return 0
        return max(0, self.in_flight(slots.model_id) - asking_count - slots.known_count)

    def _forget_unused(self, load_id: int) -> None:
        slots = self._slots.get(load_id)
        if slots is not None and not slots.known_count:
            del self._slots[load_id]

    def _slots_of(self, copy: LocalCopy) -> _Slots:
        slots_max, calls_max = max(1, copy.concurrency_max), self._copy_calls_max
        if calls_max < 0:
            return _Slots(copy.model_id, copy.load_id, slots_max, None)
        calls_max = calls_max or max(CALLS_MIN, CALLS_FOR_EACH_SLOT * slots_max)
        return _Slots(copy.model_id, copy.load_id, slots_max, calls_max)
