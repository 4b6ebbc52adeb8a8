"""How slow the machine is while a test times something: bare round trips to the same etcd.

A limit in seconds that a user depends on is asserted on whatever machine there is. So it is held
against what a write to etcd took at that very moment, from the process of the test: no code of the
mesh has a part in that, and work of others slows both.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.system.etcd import Keys

#: A call of the mesh is a few such round trips one after the other, by more processes, and some
#: milliseconds of work in each: what a stall of one round trip is, is a few for a call.
ROUND_TRIPS: Final = 20
PAUSE_S: Final = 0.02
#: Remembered: two minutes of a quiet machine, more of a slow one.
ROUNDS_MAX: Final = 6_000
_KEY: Final = "/yardstick"


class Yardstick:
    """Measures as long as it runs; use ``yardstick_of``."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._rounds: deque[tuple[float, float]] = deque(maxlen=ROUNDS_MAX)
        self._stopping = threading.Event()
        self._turned = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self, began_s: float, ended_s: float, limit_s: float, what: str) -> None:
        """Fail if this took longer than ``limit_s`` and what the machine took for itself."""
        took_s = ended_s - began_s
        if took_s < limit_s:
            return
        slowest_s = max(
            (end_s - start_s for start_s, end_s in self._until(ended_s) if end_s >= began_s),
            default=0.0,
        )
        assert took_s < limit_s + ROUND_TRIPS * slowest_s, (
            f"{what}: {took_s:.3f} s, and a write to etcd {slowest_s:.3f} s at most meanwhile"
        )

    def close(self) -> None:
        """Measure no more."""
        self._stopping.set()
        self._thread.join()

    def _until(self, ended_s: float) -> list[tuple[float, float]]:
        """Answer the rounds that began before; one that is under way then is waited for."""
        with self._turned:
            while self._thread.is_alive() and not (self._rounds and self._rounds[-1][1] > ended_s):
                assert self._turned.wait(60.0), "etcd does not answer"
            return [each for each in self._rounds if each[0] <= ended_s]

    def _run(self) -> None:
        while not self._stopping.is_set():
            began_s = time.monotonic()
            self._keys.put(_KEY, "")
            with self._turned:
                self._rounds.append((began_s, time.monotonic()))
                self._turned.notify_all()
            self._stopping.wait(PAUSE_S)


@contextmanager
def yardstick_of(keys: Keys) -> Iterator[Yardstick]:
    """A yardstick that ends with the block."""
    yardstick = Yardstick(keys)
    try:
        yield yardstick
    finally:
        yardstick.close()
