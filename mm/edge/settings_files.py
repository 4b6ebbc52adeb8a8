"""The settings files that an instance follows while it runs (around 7.1, 14, 16).

Owns which there are, and what becomes of one that cannot be used at the start. How a file is
watched is ``mm.edge.watched_file``'s.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.access_settings import ACCESS
from mm.config import Config
from mm.core.access import Access, parse_access
from mm.core.constraints import NO_CONSTRAINTS, TypeConstraints, parse_type_constraints
from mm.core.dataplane import DataplaneConfig, parse_dataplane_config
from mm.core.static_models import StaticModel, joined, parse_static_models
from mm.edge.access import remarks_of
from mm.edge.watched_file import BadFileError, WatchedFile

logger = logging.getLogger(__name__)


class SettingsFiles:
    """The files that the configuration names, if any."""

    def __init__(self, config: Config) -> None:
        self._constraints: WatchedFile[TypeConstraints] | None = None
        if config.type_constraints_path:
            self._constraints = WatchedFile(
                "type constraints", config.type_constraints_path, parse_type_constraints
            )
        self._access: WatchedFile[Access] | None = None
        if config.access_path:
            self._access = WatchedFile("access configuration", config.access_path, parse_access)
        self._dataplane: WatchedFile[DataplaneConfig] | None = None
        if config.dataplane_config_path:
            self._dataplane = WatchedFile(
                "data-plane configuration", config.dataplane_config_path, parse_dataplane_config
            )

        self._static_models: WatchedFile[tuple[StaticModel, ...]] | None = None
        if config.static_models_path:
            path, others = config.static_models_path, config.static_models
            self._static_models = WatchedFile(
                "static models",
                path,
                # Those of the file first, as in the Java mesh; together they must make sense.
                lambda content: joined(parse_static_models(content, path), others),
            )

    async def read_into(self, config: Config) -> Config:
        """Answer the configuration with what the files say; raises ``BadFileError``."""
        if self._dataplane is not None:
            # Without it either every method would be open or none; the Java mesh starts all the
            # same, and fails every call.
            config = replace(config, dataplane_config=await self._dataplane.first())
        _log_remarks(config.dataplane_config)  # of the variable, if there is no file
        if self._constraints is not None:
            config = replace(config, type_constraints=await self._first_constraints())
        if self._static_models is not None:
            config = replace(config, static_models=await self._static_models.first())
        return config

    async def first_access(self) -> Access | None:
        """Answer who may do what, None: anybody; raises ``BadFileError``: else all could."""
        return None if self._access is None else await self._access.first()

    async def _first_constraints(self) -> TypeConstraints:
        """Without constraints an instance places loads anywhere, as the Java mesh does: a mesh that
        serves is worth more than one that places well.
        """
        assert self._constraints is not None
        try:
            return await self._constraints.first()
        except BadFileError as exc:
            logger.error("%s: until it is put right, models of every type are loaded anywhere", exc)
            return NO_CONSTRAINTS

    def look(self, config: Config) -> Iterator[tuple[str, str, bool]]:
        """Read each once; answer what is odd about it: the variable, the text, and whether an
        instance would not start with it. One that is not there is told with the variable.
        """
        files: tuple[tuple[str, str, WatchedFile[Any] | None], ...] = (
            ("MM_DATAPLANE_CONFIG_PATH", config.dataplane_config_path, self._dataplane),
            (ACCESS, config.access_path, self._access),
            ("MM_TYPE_CONSTRAINTS_PATH", config.type_constraints_path, self._constraints),
            ("MM_AUTO_REGISTER_MODEL_PATH", config.static_models_path, self._static_models),
        )
        for variable, path, file in files:
            if file is None or not Path(path).is_file():
                continue
            try:
                found = file.once()
            except BadFileError as exc:
                yield variable, str(exc), file is not self._constraints
                continue
            if isinstance(found, DataplaneConfig):
                yield from ((variable, each, False) for each in found.remarks)
            if isinstance(found, Access):
                yield from ((variable, each, False) for each in remarks_of(found, config))

    @asynccontextmanager
    async def followed(
        self,
        *,
        access: Callable[[Access], None],
        constraints: Callable[[TypeConstraints], None],
        dataplane: Callable[[DataplaneConfig], None],
        static_models: Callable[[tuple[StaticModel, ...]], None],
    ) -> AsyncIterator[None]:
        """Tell of every change, as long as the context is open."""

        def configure(config: DataplaneConfig) -> None:
            _log_remarks(config)
            dataplane(config)

        async with AsyncExitStack() as stack:
            if self._access is not None:
                await stack.enter_async_context(self._access.followed(access))
            if self._constraints is not None:
                await stack.enter_async_context(self._constraints.followed(constraints))
            if self._dataplane is not None:
                await stack.enter_async_context(self._dataplane.followed(configure))
            if self._static_models is not None:
                await stack.enter_async_context(self._static_models.followed(static_models))
            yield


def _log_remarks(config: DataplaneConfig) -> None:
    for remark in config.remarks:
        logger.warning("data-plane configuration: %s", remark)
