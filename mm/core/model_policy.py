"""What a model's record says of how the mesh is to keep it: the attribute ``policy``.

Owns its meaning and its JSON. Where it can be met, and who sees to that, is not known here. Java
instances keep the attribute as they keep everything that they do not understand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

#: More copies than this no mesh has instances for: a number above it is a mistake.
COPIES_MIN_MAX: Final = 10_000

#: Of each instance's memory what is pinned takes a half at most, and so does what all policies
#: keep of all instances': what is left must be worth to be called a cache for the others.
PINNED_DIVISOR: Final = 2


@dataclass(frozen=True, slots=True)
class ModelPolicy:
    """How many ready copies there are to be at least, and whether others' loads may evict one."""

    copies_min: int = 0
    pinned: bool = False

    @property
    def copies_needed(self) -> int:
        """Answer how many copies the mesh keeps, called or not: of what is pinned at least one."""
        return max(self.copies_min, int(self.pinned))

    @classmethod
    def read(cls, details: Mapping[str, object]) -> ModelPolicy:
        """Read the attribute. What is no policy counts as none said: models are served anyway."""
        copies_min, pinned = details.get("min_copies"), details.get("pinned")
        # JSON's true is an int to Python, and no number of copies.
        copies_min = copies_min if type(copies_min) is int else 0
        if not 0 <= copies_min <= COPIES_MIN_MAX:
            copies_min = 0
        return cls(copies_min, pinned is True)

    def written(self, before: Mapping[str, object]) -> dict[str, object]:
        """Answer the attribute in place of the one before, what others wrote into it included."""
        kept = {name: v for name, v in before.items() if name not in ("min_copies", "pinned")}
        said = {"min_copies": self.copies_min, "pinned": self.pinned}
        return {**kept, **{name: value for name, value in said.items() if value}}
