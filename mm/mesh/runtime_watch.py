"""A runtime that went away and came back (issue 9 part 8).

Owns what follows from it: which copies are gone, and what the capacity is now. How it is noticed,
and that nothing is loaded meanwhile, is the ``Runtime``'s.
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace

from mm.core.sizing import CacheSizing
from mm.errors import RuntimeUnavailableError
from mm.mesh.copies import Copies
from mm.mesh.loader import Loader
from mm.mesh.ports import Runtime, RuntimeParameters

logger = logging.getLogger(__name__)

#: Of what a runtime says of itself, what may change while this instance runs, and what means
#: nothing to it.
_FOLLOWED = ("capacity_bytes", "runtime_version")


class RuntimeWatch:
    """Its copies leave the records as soon as a runtime is gone, so that others load them; they are
    loaded here again by whoever calls them once it is back.
    """

    def __init__(
        self,
        runtime: Runtime,
        parameters: RuntimeParameters,
        sizing: CacheSizing,
        copies: Copies,
        loader: Loader,
    ) -> None:
        self._runtime = runtime
        self._parameters = parameters
        self._copies = copies
        self._loader = loader
        #: The present one.
        self.sizing = sizing
        self.is_away = False

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            reason = await self._runtime.wait_lost()
            self.is_away = True
            self._copies.counters.runtime_losses += 1
            failure = RuntimeUnavailableError(f"the model runtime is gone: {reason}")
            count = self._copies.runtime_lost(failure)
            self._copies.unloader.runtime_lost()
            logger.warning("the model runtime is gone, and %d copies with it: %s", count, reason)
            parameters = await self._runtime.wait_back(self._sizing_with)
            # Without an await in between: the first load goes by the new capacity.
            self.is_away = False
            self._take_over(parameters)

    def _sizing_with(self, parameters: RuntimeParameters) -> CacheSizing:
        return sizing_of(replace(self._parameters, capacity_bytes=parameters.capacity_bytes))

    def _take_over(self, parameters: RuntimeParameters) -> None:
        before = self._parameters
        changed = [
            f"{each.name} {getattr(before, each.name)} -> {getattr(parameters, each.name)}"
            for each in fields(parameters)
            if getattr(before, each.name) != getattr(parameters, each.name)
        ]
        told = f": {', '.join(changed)}" if changed else ""
        logger.warning("the model runtime is back%s", told)
        if parameters.capacity_bytes != before.capacity_bytes:
            self.sizing = self._sizing_with(parameters)
            self._parameters = replace(before, capacity_bytes=parameters.capacity_bytes)
            self._loader.resized(self.sizing)
            self._copies.resize(self.sizing.capacity_units, self.sizing.reserve_units)
        fixed = [each for each in changed if not each.startswith(_FOLLOWED)]
        if fixed:
            logger.error(
                "the model runtime says something else than at the start of this instance, which"
                " goes by that until it is restarted: %s",
                ", ".join(fixed),
            )


def sizing_of(parameters: RuntimeParameters) -> CacheSizing:
    """Answer the sizing of a cache for a runtime; raises ``StartupError``."""
    return CacheSizing.from_runtime(
        capacity_bytes=parameters.capacity_bytes,
        default_model_size_bytes=parameters.default_model_size_bytes,
        loading_concurrency_max=parameters.loading_concurrency_max,
        load_timeout_ms=parameters.load_timeout_ms,
    )
