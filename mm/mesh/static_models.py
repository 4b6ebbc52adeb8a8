"""Registers the models that the deployment itself names (spec core 7.2, around 16).

Owns when they are registered, what the start waits for, and what becomes of entries that cannot be
registered: they end a start, and are named and skipped in an instance that serves. What an entry
says is ``mm.core.static_models``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import anyio

from mm.config import Config
from mm.core.constraints import NO_INSTANCE_TEXT
from mm.core.static_models import StaticModel, changes
from mm.core.vmodel_changes import SetVModel
from mm.errors import MeshError, ModelNotFoundError, StartupError, StatusCode
from mm.mesh.models import EnsureRequest, Models
from mm.mesh.ports import ModelStatus
from mm.mesh.vmodel_manager import VModelManager

logger = logging.getLogger(__name__)

#: While the start waits for a load it says so this often, and asks anew.
PROGRESS_S: Final = 10.0
#: What is wrong for the moment only is tried again after this.
RETRY_S: Final = 5.0


class StaticModels:
    """Registers lists of entries: one at the start, and what is new in each later one.

    All instances of a deployment have the same list, so each entry is registered by many, and all
    but one find it registered. What is named no more stays registered: the instances read a new
    file at moments of their own, and one that still has the old one must not bring back, nor one
    that has the new one take away, what others are asked to serve.
    """

    def __init__(self, config: Config, models: Models, vmodels: VModelManager) -> None:
        self._config = config
        self._models = models
        self._vmodels = vmodels
        self._known = self._wanted = config.static_models
        self._told = anyio.Event()

    async def register_first(self) -> None:
        """Register what the configuration names, in this order; wait for what is to be waited for.

        Raises ``StartupError`` that names the entry. In read-only mode nothing is done.
        """
        entries = self._known
        if not entries:
            return
        _warn_of_unknown_properties(entries)
        if self._config.kv_read_only:
            logger.warning(
                "%d static models are not registered: the store is read-only (KV_READ_ONLY)",
                len(entries),
            )
            return
        registered = []
        for entry in entries:
            try:
                await self._register(entry)
                registered.append(entry)
            except MeshError as exc:
                if not (entry.is_awaited and _is_for_now(exc)):
                    raise StartupError(f"{entry}: {exc.message}") from exc
                logger.warning("%s: tried again: %s", entry, exc.message)
        awaited = [entry for entry in entries if entry.is_awaited]
        for number, entry in enumerate(awaited):
            logger.info("%d of %d static models are loaded: %s", number, len(awaited), entry)
            await self._wait_loaded(entry, is_registered=entry in registered)
        logger.info("%d static models are registered, %d loaded", len(entries), len(awaited))

    def tell(self, entries: Sequence[StaticModel]) -> None:
        """Hear what the list says from now on."""
        self._wanted = tuple(entries)
        self._told.set()

    async def run(self) -> None:
        """Register what is new, whenever something is told; until cancelled."""
        while True:
            await self._told.wait()
            self._told = anyio.Event()
            awaited = await self._follow()
            async with anyio.create_task_group() as group:
                group.start_soon(self._see_loaded, awaited)
                await self._told.wait()
                group.cancel_scope.cancel()

    async def _see_loaded(self, entries: Sequence[StaticModel]) -> None:
        """Tell what became of loads that nobody waits for, until another list is told."""
        for entry in entries:
            try:
                await self._wait_loaded(entry, is_registered=True)
            except StartupError as exc:
                logger.error("%s", exc)

    async def _follow(self) -> Sequence[StaticModel]:
        """Register what is new; answers what is to be loaded of it."""
        entries = self._wanted
        news = changes(self._known, entries)
        _warn_of_unknown_properties(news.wanted)
        self._known = entries
        for entry in news.removed:
            logger.info(
                'model "%s" is named no more; it stays registered until somebody unregisters it',
                entry.model_id,
            )
        if self._config.kv_read_only:
            return ()
        registered: list[StaticModel] = []
        left = list(news.wanted)
        while left and self._wanted is entries:
            left = [entry for entry in left if not await self._is_done(entry, registered)]
            if left:
                with anyio.move_on_after(RETRY_S):
                    await self._told.wait()
        # What could not be registered yet is as if it had not been named yet.
        self._known = tuple(entry for entry in entries if entry not in left)
        return [entry for entry in registered if entry.is_awaited]

    async def _is_done(self, entry: StaticModel, registered: list[StaticModel]) -> bool:
        """Answer whether no further try is needed; what is registered is added."""
        try:
            await self._register(entry)
        except MeshError as exc:
            if _is_for_now(exc):
                logger.warning("%s: tried again: %s", entry, exc.message)
                return False
            logger.error("%s is skipped: %s", entry, exc.message)
        else:
            logger.info("%s is registered", entry)
            registered.append(entry)
        return True

    async def _register(self, entry: StaticModel) -> None:
        if entry.vmodel_id:
            request = SetVModel(
                entry.vmodel_id,
                entry.model_id,
                entry.info,
                auto_delete=not entry.is_retained,
                load_now=entry.is_awaited,
            )
            await self._vmodels.set(request)
            return
        await self._models.register(
            entry.model_id, entry.info, load_now=entry.is_awaited, sync=False, last_used_ms=0
        )

    async def _wait_loaded(self, entry: StaticModel, *, is_registered: bool) -> None:
        """Return when a copy serves. Only a load that failed ends the start before its time limit:
        room, the store or an instance with the right labels may still come.

        It is registered once: whoever sets its vmodel to something else meanwhile means it.
        """
        limit_s = self._config.ensure_loaded_sync_timeout_s
        reason = "it is being loaded"
        with anyio.move_on_after(limit_s):
            while True:
                with anyio.move_on_after(PROGRESS_S) as scope:
                    try:
                        if not is_registered:
                            await self._register(entry)
                            is_registered = True
                        request = EnsureRequest(entry.model_id, sync=True)
                        status = await self._models.ensure_loaded(request)
                    except ModelNotFoundError:
                        logger.warning("%s is not waited for: somebody took it away", entry)
                        return
                    except MeshError as exc:
                        if not _is_for_now(exc):
                            raise StartupError(f"{entry}: {exc.message}") from exc
                        reason = exc.message
                    else:
                        if status.status == "LOADED":
                            return
                        reason = _reason(entry, status)
                    await anyio.sleep(RETRY_S)
                if scope.cancelled_caught:
                    logger.info("still waiting for %s: %s", entry, reason)
        raise StartupError(f"{entry} is not loaded after {limit_s:g} s: {reason}")


def _warn_of_unknown_properties(entries: Sequence[StaticModel]) -> None:
    for entry in entries:
        if entry.unknown_properties:
            names = ", ".join(entry.unknown_properties)
            logger.warning("%s: these mean nothing, and are not read: %s", entry, names)


def _reason(entry: StaticModel, status: ModelStatus) -> str:
    """Answer why it is not loaded yet; raises ``StartupError`` if it never will be."""
    text = status.errors[0] if status.errors else f"its status is {status.status}"
    if status.status == "LOADING_FAILED" and not text.startswith(NO_INSTANCE_TEXT):
        raise StartupError(f"{entry} cannot be loaded: {text}")
    return text


def _is_for_now(error: MeshError) -> bool:
    return error.code is StatusCode.UNAVAILABLE
