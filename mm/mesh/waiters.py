"""Calls that wait for loads: who may wait, how long, and who goes on when (spec core 2.8).

Owns the lines before copies that are on their way, the bounds on all who stand in them, and the
pace at which they are let go. Which copy a call waits for is ``router``'s decision, when a copy is
settled ``loader``'s.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

import anyio
import anyio.lowlevel

from mm.core.calls import Call, NamedBy
from mm.core.ids import ModelId
from mm.errors import LoadTimeoutError, ModelMovedError, WaitersFullError
from mm.limits import Limits
from mm.mesh.local_copy import LocalCopy
from mm.mesh.statistics import Counters

#: Calls for one copy that are let go together. Each takes about half a millisecond of Python here,
#: which a hit that comes just then waits for.
BATCH_CALLS = 2
#: Calls that begin to wait for one copy within this time of each other have one deadline: that of
#: the first.
JOIN_S = 0.05


#: Answers whether a vmodel that named a model is seen to have left it since.
HasMoved = Callable[[NamedBy, ModelId], bool]


class Batch:
    """Calls for one copy, named by the same vmodel or by none, that began to wait together, and go
    on together: one event for all.
    """

    __slots__ = (
        "copy",
        "has_moved",
        "is_running",
        "line",
        "named_by",
        "opened_s",
        "present_count",
        "released_s",
        "woken",
    )

    def __init__(
        self, copy: LocalCopy, named_by: NamedBy | None, line: Line, opened_s: float
    ) -> None:
        self.copy = copy
        self.named_by = named_by
        self.line = line
        self.opened_s = opened_s
        #: The vmodel stands for another model by now.
        self.has_moved = False
        #: Calls in it that neither gave up nor, once let go, ended.
        self.present_count = 0
        #: Let go, and not slow yet: those in it count among those under way.
        self.is_running = False
        self.released_s = 0.0
        self.woken = anyio.Event()


Line = OrderedDict[Batch, None]


class Waiters:
    """Everyone at this instance who waits for a load; ``on_let_go`` hears when all who waited for a
    copy that came have had their turn.

    *Why in batches.* A thousand calls that wait for one model become runnable in the same moment.
    Let go at once, they would keep the event loop, and then the runtime, from everyone else for as
    long as a thousand calls take: calls to other models would stand behind them. So at most
    ``released_calls_max`` of them are under way, and the next go on when those are answered, or
    are slow (``release_pause_s``). Copies take turns; the calls for one copy go in their order.

    Invariants: 1. a batch is in ``_ages`` and in its line until it is let go or nobody is left in
    it; 2. ``calls`` and ``request_bytes`` tell of those between ``enter`` and ``leave``; 3.
    ``_running_count`` counts the calls of the batches in ``_running`` that did not end.
    """

    def __init__(
        self,
        limits: Limits,
        counters: Counters,
        *,
        wait_timeout_s: float,
        on_let_go: Callable[[LocalCopy], None],
    ) -> None:
        self._limits = limits
        self._counters = counters
        self._on_let_go = on_let_go
        #: How long a call waits at most (spec core 2.8).
        self.wait_timeout_s = wait_timeout_s
        #: Calls of clients and peers that wait now, and the bytes of their requests so far.
        self.calls = 0
        self.request_bytes = 0
        self._lines: dict[LocalCopy, Line] = {}
        #: Those of calls that a vmodel named, by vmodel.
        self._named: dict[str, Line] = {}
        #: All batches that are not let go, in the order of their deadlines.
        self._ages: OrderedDict[Batch, None] = OrderedDict()
        #: Lines of copies that are settled.
        self._ready: deque[Line] = deque()
        #: Let go within ``release_pause_s``, in that order.
        self._running: deque[Batch] = deque()
        self._running_count = 0
        #: Set, and replaced, when ``run`` has something new to look at.
        self._changed = anyio.Event()

    async def wait(self, copy: LocalCopy, call: Call) -> None:
        """Return when the copy is settled and it is the call's turn; a route, or an error, of the
        router must follow at once.

        Raises ``LoadTimeoutError`` after ``wait_timeout_s``, ``WaitersFullError`` at once, and
        ``ModelMovedError`` when the vmodel that named the model stands for another one.
        """
        call.end_turn()
        if copy.settled.is_set():
            return
        self.enter(call)
        if call.waiting_since_s is None:
            call.waiting_since_s = anyio.current_time()
        batch = self._join(copy, call.named_by)
        try:
            await batch.woken.wait()
        except BaseException:
            self._left(batch)
            raise
        finally:
            self.leave(call)
        if not copy.settled.is_set() and not batch.has_moved:
            raise LoadTimeoutError(f"Timeout waiting for load of model {copy.model_id}")
        call.on_turn_ended = lambda: self._left(batch)
        if batch.has_moved:
            raise ModelMovedError

    def has_time(self, call: Call) -> bool:
        """Answer whether a call that waited in vain may wait for another load."""
        assert call.waiting_since_s is not None, call
        return anyio.current_time() < call.waiting_since_s + self.wait_timeout_s

    def grew(self, call: Call, size_bytes: int) -> None:
        """Hear of more request bytes of a call that waits; raises ``WaitersFullError``."""
        assert call.waits, call
        if self.request_bytes + size_bytes > self._limits.waiting_bytes_max:
            raise self._full("waiting_bytes_max", self._limits.waiting_bytes_max, "request bytes")
        self.request_bytes += size_bytes
        call.request_bytes += size_bytes

    def passed_on(self, call: Call) -> None:
        """Hear that nothing of its request is kept here any more."""
        if call.waits:
            self.request_bytes -= call.request_bytes
        call.request_bytes = 0

    # --- who waits ---

    def enter(self, call: Call) -> None:
        """Count a call that begins to wait, here or at a peer: it holds its stream and its request
        here all the same. Raises ``WaitersFullError``.

        Nobody counts those that this instance makes itself, one a model.
        """
        if call.is_own:
            return
        limits = self._limits
        if self.calls >= limits.waiting_calls_max:
            raise self._full("waiting_calls_max", limits.waiting_calls_max, "calls")
        if self.request_bytes + call.request_bytes > limits.waiting_bytes_max:
            raise self._full("waiting_bytes_max", limits.waiting_bytes_max, "request bytes")
        call.waits = True
        self.calls += 1
        self.request_bytes += call.request_bytes

    def leave(self, call: Call) -> None:
        """Count it no more, if it was counted."""
        if call.waits:
            call.waits = False
            self.calls -= 1
            self.request_bytes -= call.request_bytes

    def _full(self, name: str, limit: int, unit: str) -> WaitersFullError:
        self._counters.waiting_refused += 1
        return WaitersFullError(
            f"too many calls wait for models to load here: {self.calls} calls with"
            f" {self.request_bytes} request bytes; the limit is {limit} {unit} ({name});"
            " retry later, or load models before they are called (ensureLoaded)"
        )

    def _join(self, copy: LocalCopy, named_by: NamedBy | None) -> Batch:
        line = self._lines.get(copy)
        if line is None:
            line = self._lines[copy] = OrderedDict()
            copy.on_settled = self._settled
        now_s = anyio.current_time()
        batch = next(reversed(line), None)
        if (
            batch is None
            or batch.present_count >= BATCH_CALLS
            or now_s - batch.opened_s >= JOIN_S
            or batch.named_by != named_by
        ):
            batch = Batch(copy, named_by, line, now_s)
            line[batch] = None
            if named_by is not None:
                self._named.setdefault(named_by.vmodel_id, OrderedDict())[batch] = None
            if not self._ages:
                self._wake_up()  # to keep the deadline
            self._ages[batch] = None
        batch.present_count += 1
        return batch

    def _left(self, batch: Batch) -> None:
        """One call of a batch gave up waiting, or ended after it was let go."""
        batch.present_count -= 1
        if not batch.woken.is_set():
            if not batch.present_count:
                self._remove(batch)
        elif batch.is_running:
            self._running_count -= 1
            self._wake_up()

    def _remove(self, batch: Batch) -> None:
        del self._ages[batch]
        if batch.named_by is not None:
            named = self._named[batch.named_by.vmodel_id]
            del named[batch]
            if not named:
                del self._named[batch.named_by.vmodel_id]
        self._take_out(batch)
        if not batch.line and batch.copy.is_letting_go and not batch.has_moved:
            batch.copy.is_letting_go = False
            self._on_let_go(batch.copy)

    def _take_out(self, batch: Batch) -> None:
        del batch.line[batch]
        if not batch.line and self._lines.get(batch.copy) is batch.line:
            del self._lines[batch.copy]

    # --- who goes on ---

    def vmodel_changed(self, has_moved: HasMoved, vmodel_id: str, _: object = None) -> None:
        """Let those go whose vmodel stands for another model than the one they wait for."""
        line: Line = OrderedDict()
        for batch in list(self._named.get(vmodel_id, ())):
            assert batch.named_by is not None, batch
            if batch.has_moved or batch.copy.settled.is_set():
                continue
            if has_moved(batch.named_by, batch.copy.model_id):
                batch.has_moved = True
                self._take_out(batch)
                batch.line = line
                line[batch] = None
        if line:
            self._ready.append(line)
            self._wake_up()

    def _settled(self, copy: LocalCopy) -> None:
        line = self._lines.pop(copy, None)
        if line:
            copy.is_letting_go = copy.serves
            self._ready.append(line)
            self._wake_up()

    def _wake_up(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Let go whose copy is settled and whose time is over, until cancelled."""
        try:
            while True:
                self._expire()
                self._pass_slow()
                if self._ready and self._running_count < self._limits.released_calls_max:
                    self._release(self._ready.popleft())
                    await anyio.lowlevel.checkpoint()
                else:
                    await self._sleep()
        finally:
            for batch in list(self._ages):
                self._let_go(batch)

    def _release(self, line: Line) -> None:
        """Let the first batch of a line go; the others come after those of other copies."""
        batch = next(iter(line), None)
        if batch is None:
            return  # all of them gave up
        self._let_go(batch)
        batch.is_running = True
        batch.released_s = anyio.current_time()
        self._running.append(batch)
        self._running_count += batch.present_count
        if line:
            self._ready.append(line)

    def _let_go(self, batch: Batch) -> None:
        self._remove(batch)
        batch.woken.set()

    def _pass_slow(self) -> None:
        """Stop counting calls that take their time in the runtime: they keep nobody else."""
        now_s, pause_s = anyio.current_time(), self._limits.release_pause_s
        while self._running and self._running[0].released_s + pause_s <= now_s:
            batch = self._running.popleft()
            batch.is_running = False
            self._running_count -= batch.present_count

    def _expire(self) -> None:
        now_s = anyio.current_time()
        while self._ages:
            batch = next(iter(self._ages))
            if batch.opened_s + self.wait_timeout_s > now_s:
                return
            self._let_go(batch)

    async def _sleep(self) -> None:
        """Return when something changed, a time is over, or those let go last are slow."""
        until_s = slow_s = float("inf")
        if self._ages:
            until_s = next(iter(self._ages)).opened_s + self.wait_timeout_s
        if self._ready:
            slow_s = self._running[0].released_s + self._limits.release_pause_s
        with anyio.move_on_after(max(0.0, min(until_s, slow_s) - anyio.current_time())):
            await self._changed.wait()
        self._changed = anyio.Event()
