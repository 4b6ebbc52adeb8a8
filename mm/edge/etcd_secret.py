"""The JSON file of ``KV_STORE=etcd:<path>`` and the files that it names, followed while we run.

Owns when they are read again, and what becomes of a change that cannot be used: what they said
before holds on. What stands in them is ``mm.edge.kv_config``'s; how etcd is gone over to with it
``mm.edge.etcd_connector``'s.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from mm.edge.kv_config import EtcdTarget, read_file, read_secret
from mm.edge.watched_file import POLL_S, SECOND_LOOK_S
from mm.errors import ConfigError

logger = logging.getLogger(__name__)

#: What stands in each file that a reading asked for; None: it could not be read.
_Contents = dict[Path, bytes | None]
#: Not known: whatever the files hold is news.
_UNKNOWN: Final[_Contents] = {}


class EtcdSecret:
    """The files, as last read: they are few and short, so their contents are compared.

    Kubernetes turns all of them over at once; who changes them by hand does it one by one, so a
    change that cannot be used is looked at twice before anything is said.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._contents = _UNKNOWN
        self._target: EtcdTarget | None = None
        self._fault = ""

    def read(self) -> EtcdTarget:
        """Answer what the files say; raises ``ConfigError``."""
        contents: _Contents = {}

        def noted(path: Path) -> bytes:
            contents[path] = None
            contents[path] = read_file(path)
            return contents[path] or b""

        try:
            target = read_secret(self._path, noted)
        finally:
            self._contents = contents
        self._target = target
        return target

    @asynccontextmanager
    async def followed(self, tell: Callable[[EtcdTarget], None]) -> AsyncIterator[None]:
        """Tell of each change that can be used, as long as the context is open."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow, tell)
            yield
            group.cancel_scope.cancel()

    async def _follow(self, tell: Callable[[EtcdTarget], None]) -> None:
        while True:
            await anyio.sleep(POLL_S)
            target = await self._changed()
            if target is not None:
                tell(target)

    async def _changed(self) -> EtcdTarget | None:
        before = self._target
        target = await anyio.to_thread.run_sync(self._look, abandon_on_cancel=True)
        if isinstance(target, ConfigError):
            await anyio.sleep(SECOND_LOOK_S)
            target = await anyio.to_thread.run_sync(self._look, abandon_on_cancel=True) or target
        if isinstance(target, ConfigError):
            self._say(target)
            return None
        if target is None:
            return None
        self._fault = ""
        assert before is not None, "not read yet"
        if target.root_prefix != before.root_prefix:
            logger.warning(
                "%s: root_prefix has changed, which takes a restart of all instances", self._path
            )
            self._target = target = replace(target, root_prefix=before.root_prefix)
        return target if target != before else None

    def _look(self) -> EtcdTarget | ConfigError | None:
        """Answer what the files say if that is another text than before."""
        if all(_read(path) == content for path, content in self._contents.items()):
            return None
        try:
            return self.read()
        except ConfigError as exc:
            return exc

    def _say(self, error: ConfigError) -> None:
        if str(error) != self._fault:
            self._fault = str(error)
            for complaint in error.complaints:
                logger.warning("%s; what it said before still holds", complaint)


def _read(path: Path) -> bytes | None:
    try:
        return read_file(path)
    except (OSError, ValueError):
        return None
