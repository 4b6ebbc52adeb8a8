"""Numbers of the demo that the command line knows too; imports nothing."""

from __future__ import annotations

from typing import Final

#: Fewer evictions would not show that models come and go.
EVICTIONS_MIN: Final = 50

#: Models for each instance, at least: with fewer, too much would fit for anything to be evicted.
MODELS_PER_INSTANCE_MIN: Final = 8

#: One is killed, and another one has to answer meanwhile.
INSTANCES_MIN: Final = 2
