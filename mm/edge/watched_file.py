"""A settings file that is read again whenever it changes (around 15).

Owns what counts as a change, and what becomes of a file that cannot be used: what it said before
holds on, and the log says once what is wrong with it. What stands in it is its parser's, and what
to do if there is nothing good at the start its owner's.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import anyio
import anyio.to_thread

from mm.core.json_input import JSON_BYTES_MAX
from mm.errors import StartupError

logger = logging.getLogger(__name__)

#: How often the file is looked at: one ``stat``. Kubernetes takes a minute to bring a change here,
#: and a person who edits a file by hand looks at the log a second later.
POLL_S: Final = 1.0
#: A file that cannot be used is read once more after this, before anything is said: whoever edits
#: in place empties it first.
SECOND_LOOK_S: Final = 0.5
#: A start waits this long for a file that can be used (spec core 1.10).
START_WAIT_S: Final = 5.0
#: A file changed this short ago is read although it looks the same: another change may have had the
#: same time and size.
FRESH_S: Final = 2.0

T = TypeVar("T")


class BadFileError(StartupError):
    """There is nothing in the file that can be used; the text names it and says why."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What a look at the path found."""

    #: Device, inode, size and time: at least one differs after an edit in place, after a rename
    #: over the file, and after Kubernetes has turned its ``..data`` link to another directory.
    signature: tuple[int, ...] = ()
    #: None: not read, because nothing has changed.
    content: bytes | None = None
    problem: str = ""


class WatchedFile(Generic[T]):
    """Polls one path through all its symbolic links, and tells of new contents.

    Watching for events instead would miss what happens behind links, in mounts by ``subPath`` and
    on network disks. ``parse`` raises ``ValueError`` for what it cannot use, and is not asked about
    more than ``JSON_BYTES_MAX`` and a byte. ``name`` is what the log calls the file.
    """

    def __init__(self, name: str, path: str, parse: Callable[[bytes], T]) -> None:
        self._name = name
        self._path = path
        self._parse = parse
        self._seen: tuple[int, ...] | None = None
        #: What holds now.
        self._content: bytes | None = None
        #: What holds has still to be said.
        self._is_new = False
        #: What was last said about a file that cannot be used: each change is worth one line.
        self._said: _Look | None = None

    async def first(self) -> T:
        """Answer what the file says at the start; raises ``BadFileError`` if it stays bad."""
        with anyio.move_on_after(START_WAIT_S):
            while True:
                found = await self.changed()
                self._say_what_holds()
                if found is not None:
                    return found
                await anyio.sleep(POLL_S)
        raise self._bad("it cannot be read" if self._said is None else self._said.problem)

    def once(self) -> T:
        """Answer what the file says, without waiting for a better one; raises ``BadFileError``."""
        look, found = self._parsed(_look(self._path, None))
        if found is None:
            raise self._bad(look.problem)
        return found

    @asynccontextmanager
    async def followed(self, tell: Callable[[T], None]) -> AsyncIterator[None]:
        """Tell of each new content as long as the context is open."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow, tell)
            yield
            group.cancel_scope.cancel()

    async def _follow(self, tell: Callable[[T], None]) -> None:
        while True:
            await anyio.sleep(POLL_S)
            found = await self.changed()
            if found is not None:
                tell(found)
            self._say_what_holds()

    async def changed(self) -> T | None:
        """Answer new contents; None if nothing changed, or to nothing that can be used."""
        look, found = await self._read()
        if look.problem:
            await anyio.sleep(SECOND_LOOK_S)
            look, found = await self._read()
        self._seen = look.signature
        if look.problem:
            if look != self._said:
                holds = "" if self._content is None else "; what it said before still holds"
                logger.warning("%s file %s: %s%s", self._name, self._path, look.problem, holds)
            self._said = look
        elif look.content is not None:
            self._is_new = found is not None or self._said is not None
            self._said = None
            self._content = look.content
        return found

    def _say_what_holds(self) -> None:
        """Not before it does: somebody may wait for the line."""
        if self._is_new:
            self._is_new = False
            logger.info("%s file %s is in use", self._name, self._path)

    async def _read(self) -> tuple[_Look, T | None]:
        look = await anyio.to_thread.run_sync(_look, self._path, self._seen, abandon_on_cancel=True)
        if look.content == self._content:
            return look, None
        return self._parsed(look)

    def _parsed(self, look: _Look) -> tuple[_Look, T | None]:
        """Answer what was read, too, or, in the look, why it cannot be used."""
        if look.content is None:
            return look, None
        try:
            return look, self._parse(look.content)
        except ValueError as exc:
            return _Look(look.signature, look.content, str(exc)), None

    def _bad(self, problem: str) -> BadFileError:
        return BadFileError(f"{self._name} file {self._path}: {problem}")


def _look(path: str, seen: tuple[int, ...] | None) -> _Look:
    try:
        # A pipe would be waited for until somebody writes to it, and nothing looked at meanwhile.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return _Look((0,), problem="not a file")
            signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            is_fresh = abs(time.time() - status.st_mtime) < FRESH_S
            if signature == seen and not is_fresh:
                return _Look(signature)
            return _Look(signature, file.read(JSON_BYTES_MAX + 1))
    except OSError as exc:
        return _Look((exc.errno or 0,), problem=os.strerror(exc.errno or 0).lower())
