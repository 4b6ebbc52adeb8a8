"""Tries again, while the first loads of an instance fail, what failed (spec core 7.3).

It is how an instance finds out by itself that what was wrong is no more: others hardly load there
meanwhile. In the Java mesh only a restart ends a probation that failed.
"""

from __future__ import annotations

import logging

import anyio

from mm.config import Config
from mm.core.ids import ModelId
from mm.errors import MeshError
from mm.mesh.first_loads import FirstLoads
from mm.mesh.loader import Loader
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)


class Trials:
    """Loads one of the models that failed after another, and goes on at once when one succeeds."""

    def __init__(
        self, *, first_loads: FirstLoads, loader: Loader, registry: Registry, config: Config
    ) -> None:
        self._first_loads = first_loads
        self._loader = loader
        self._registry = registry
        self._config = config

    async def run(self) -> None:
        """Try, for as long as it is needed; until cancelled."""
        first_loads = self._first_loads
        while True:
            while not first_loads.fail:
                await first_loads.changed.wait()
            await anyio.sleep(self._config.probation_retry_s)
            is_better = True
            while first_loads.fail and is_better:
                is_better = await self._succeeds(first_loads.models_to_try[0])

    async def _succeeds(self, model_id: ModelId) -> bool:
        """Load one model; answers whether to go on with the next at once."""
        record = self._registry.get(model_id)
        if record is None:
            self._first_loads.forget(model_id)
            return True
        try:
            copy = self._loader.ensure(
                model_id, record, last_used_ms=record.last_used_ms, awaited=False
            )
        except MeshError as exc:
            logger.debug("model %s is not tried again now: %s", model_id, exc.message)
            return False
        await copy.settled.wait()
        if copy.serves:
            self._first_loads.forget(model_id)  # also if it was loaded all along
        else:
            self._first_loads.postpone(model_id)
        return copy.serves
