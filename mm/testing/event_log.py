"""What happened in a simulated run, in order: for its story, and for its fingerprint.

Owns the last events and a digest of all of them. Who tells them is ``simulated_cluster``'s and the
faults' affair.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from typing import Final

import anyio

#: Events kept. A run of a minute has some ten thousand; an involved model's last thirty are
#: wanted, which may lie far back.
EVENTS_MAX: Final = 100_000


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened: when, at which instance, to which model. Empty: to none, or all."""

    at_s: float
    instance: str
    model: str
    text: str

    def __str__(self) -> str:
        return f"{self.at_s:10.3f}  {self.instance or '-':<4} {self.model or '-':<6} {self.text}"

    def concerns(self, instances: frozenset[str], models: frozenset[str]) -> bool:
        """Answer whether it belongs to the story of these: what has no model concerns any."""
        if self.model:
            return self.model in models
        return not self.instance or self.instance in instances


class EventLog:
    """The events of one run."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._hash = hashlib.sha256()
        self.count = 0
        self._is_closed = False

    def tell(self, instance: str, model: str, text: str) -> None:
        """Note what happens now."""
        if self._is_closed:
            return
        event = Event(anyio.current_time(), instance, model, text)
        self._events.append(event)
        self._hash.update(f"{event}\n".encode())
        self.count += 1

    def close(self) -> None:
        """Note nothing more: what an end leads to is not part of how it came to it."""
        self._is_closed = True

    @property
    def digest(self) -> str:
        """Answer the fingerprint of everything told so far."""
        return self._hash.hexdigest()

    def about(self, instances: frozenset[str], models: frozenset[str], count: int) -> list[Event]:
        """Answer the last events that concern these, oldest first."""
        found: list[Event] = []
        for event in reversed(self._events):
            if event.concerns(instances, models):
                found.append(event)
                if len(found) == count:
                    break
        return found[::-1]
