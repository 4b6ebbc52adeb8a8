"""Which models are called: by Zipf's law, with favourites that change.

Owns the sequence of calls, the same for a seed, whoever is called.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Final

#: Drawn at once; it only saves time.
BATCH_COUNT: Final = 1_000


class ZipfCalls:
    """An endless sequence of model numbers.

    The chance of a model is its rank to the power of ``-exponent``. After every ``drift_calls`` a
    model drawn by chance from all changes its rank with one drawn by rank: what was cold becomes
    hot, and what was hot cold.
    """

    def __init__(
        self, models_count: int, exponent: float, drift_calls: int, rng: random.Random
    ) -> None:
        self._rng = rng
        self._drift_calls = drift_calls
        self._models = list(range(models_count))
        self._ranks = range(models_count)
        chances = (1 / (rank + 1) ** exponent for rank in self._ranks)
        self._cumulative = list(itertools.accumulate(chances))

    def __iter__(self) -> Iterator[int]:
        until_drift = self._drift_calls
        while True:
            for rank in self._draw(BATCH_COUNT):
                yield self._models[rank]
                until_drift -= 1
                if until_drift == 0:
                    self._drift()
                    until_drift = self._drift_calls

    def _draw(self, count: int) -> list[int]:
        return self._rng.choices(self._ranks, cum_weights=self._cumulative, k=count)

    def _drift(self) -> None:
        one, other = self._rng.choice(self._ranks), self._draw(1)[0]
        self._models[one], self._models[other] = self._models[other], self._models[one]
