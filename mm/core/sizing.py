"""Start-up sizing: what the runtime's status answer means for the cache (spec core 3.1).

Owns the formulas and the refusal of nonsense. Does not own the answer itself (``mm.mesh.ports``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mm.core.ids import UNIT_BYTES, units_of
from mm.errors import StartupError

#: Shorter limits cannot be met by any load and would fail every model.
LOAD_TIMEOUT_MS_MIN: Final = 100
#: However large models are by default, a cache of this size is large enough to start with.
CAPACITY_ALWAYS_ENOUGH_BYTES: Final = 512 * 2**20

#: Before any load was seen, none is assumed to be faster than this.
ASSUMED_LOAD_MS_MIN: Final = 3000


@dataclass(frozen=True, slots=True)
class CacheSizing:
    """The numbers that are fixed for the life of an instance."""

    capacity_units: int
    #: Assumed size of a model whose size nobody knows.
    default_units: int
    #: Kept free for memory that is being unloaded.
    reserve_units: int
    #: An instance with less than this remaining is "full" (spec core 3.1).
    min_space_units: int
    load_timeout_ms: int
    loading_concurrency: int

    @property
    def assumed_load_ms(self) -> int:
        """How long a load takes while none has been seen (spec core 3.1, 3.15)."""
        return max(ASSUMED_LOAD_MS_MIN, self.load_timeout_ms // 3)

    @property
    def saturated_age_ms(self) -> int:
        """A full instance whose oldest model is younger than this throws out what is in use: twice
        the age below which the Java mesh calls it churn (spec core 3.1, 4.2).
        """
        return 20 * self.assumed_load_ms

    @classmethod
    def from_runtime(
        cls,
        *,
        capacity_bytes: int,
        default_model_size_bytes: int,
        loading_concurrency_max: int,
        load_timeout_ms: int,
    ) -> CacheSizing:
        """Answer the sizing; raises ``StartupError`` naming the value and its limit."""
        _check_positive("capacityInBytes", capacity_bytes)
        _check_positive("defaultModelSizeInBytes", default_model_size_bytes)
        _check_positive("maxLoadingConcurrency", loading_concurrency_max)
        if load_timeout_ms < LOAD_TIMEOUT_MS_MIN:
            raise StartupError(
                f"model runtime reports modelLoadingTimeoutMs {load_timeout_ms}:"
                f" must be at least {LOAD_TIMEOUT_MS_MIN}"
            )
        default = units_of(default_model_size_bytes)
        _check_capacity(capacity_bytes, default * UNIT_BYTES)
        capacity = capacity_bytes // UNIT_BYTES
        return cls(
            capacity_units=capacity,
            default_units=default,
            reserve_units=_reserve_units(capacity, default, loading_concurrency_max),
            min_space_units=max(default, min(default * loading_concurrency_max, capacity // 20)),
            load_timeout_ms=load_timeout_ms,
            loading_concurrency=loading_concurrency_max,
        )


def _reserve_units(capacity_units: int, default_units: int, concurrency: int) -> int:
    """Room for a good part of the loads that may run at once, but at most a tenth of everything."""
    wanted = concurrency * default_units // (2 if concurrency <= 2 else 4)
    return max(min(wanted, capacity_units // 10), capacity_units // 100)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise StartupError(f"model runtime reports {name} {value}: must be at least 1")


def _check_capacity(capacity_bytes: int, default_bytes: int) -> None:
    needed = max(2 * default_bytes, min(CAPACITY_ALWAYS_ENOUGH_BYTES, 10 * default_bytes))
    if capacity_bytes < needed:
        raise StartupError(
            f"model runtime reports capacityInBytes {capacity_bytes}: must be at least {needed}"
            f" for its defaultModelSizeInBytes (rounded up to {default_bytes});"
            " give it more memory or state a smaller default size"
        )
