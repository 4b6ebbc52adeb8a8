"""What is known of one transition that the leader works on; the work is ``transitions``'s."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import anyio

from mm.core.ids import InstanceId, ModelId
from mm.core.transitions import Pair

#: So long an instance that says nothing may have a place: by then it is back, or its record is
#: gone with its lease, unless only the leader cannot reach it.
SILENCE_MAX_S: Final = 60.0


@dataclass(slots=True)
class TransitionWorker:
    """One transition at work."""

    pair: Pair
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    #: Set, and replaced, when a record that it depends on changed.
    woken: anyio.Event = field(default_factory=anyio.Event)
    #: To be left as soon as the target could take over; None: it does not wait for a slot.
    line: anyio.CancelScope | None = None
    #: Where copies of the target were asked for, and when, until the record tells of them.
    asked_s: dict[InstanceId, float] = field(default_factory=dict)
    #: Askings for a further copy in a row that came to nothing.
    refusals_count: int = 0
    #: Since when an instance that might have a place says nothing; None: none is like that.
    silent_since_s: float | None = None
    #: Since when the target serves at all; None: it does not.
    serves_since_s: float | None = None
    #: There was no record of the target; and set when one comes back, until that is seen to.
    is_missing: bool = False
    came_back: anyio.Event = field(default_factory=anyio.Event)

    def wake(self) -> None:
        """Have it look again."""
        self.woken.set()
        self.woken = anyio.Event()

    def heard_nothing(self, now_s: float, *, is_open: bool) -> None:
        """No instance took a further copy; ``is_open``: not each of them was heard."""
        if not is_open:
            self.silent_since_s = None
        elif self.silent_since_s is None:
            self.silent_since_s = now_s
        since_s = self.silent_since_s
        self.refusals_count += since_s is None or now_s - since_s > SILENCE_MAX_S

    def hear_that_there_is(self, model_id: ModelId) -> None:
        """Have it look again if that is the target, and was missing."""
        if self.is_missing and model_id == self.pair.target_id:
            self.came_back.set()
            self.wake()
