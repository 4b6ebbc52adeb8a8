"""The losses of models that one instance heard of: when its runtime's NOT_FOUND is the answer.

Owns decision 8 as a client may rely on it, told by what happened and not by what the mesh made of
it: the mesh's own rule is ``copies``', and ``invariants`` excuses no more than this.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from mm.core.ids import ModelId

#: So long a loss counts.
REMEMBERED_S: Final = 60.0
#: So many losses in that time are mended, and only one of a copy that has not answered since.
MENDED_MAX: Final = 2


class LossesHeard:
    """What one process remembers; another one in its place knows nothing of it."""

    def __init__(self) -> None:
        #: When which load of a model was first found to be lost.
        self._lost_s: defaultdict[ModelId, dict[int, float]] = defaultdict(dict)
        self._answered: dict[ModelId, int] = {}

    def answered(self, model_id: ModelId, load_id: int) -> None:
        """Note that this load of a model answered a call."""
        self._answered[model_id] = max(load_id, self._answered.get(model_id, 0))

    def lost(self, model_id: ModelId, load_id: int, now_s: float) -> bool:
        """Note that the runtime does not have it; answer whether the client may hear that."""
        lost_s = self._lost_s[model_id]
        for other, at_s in list(lost_s.items()):
            if now_s - at_s >= REMEMBERED_S:
                del lost_s[other]
        lost_s.setdefault(load_id, now_s)
        mended_count = len(lost_s) - 1
        has_answered = self._answered.get(model_id) == load_id
        return mended_count >= (MENDED_MAX if has_answered else 1)
