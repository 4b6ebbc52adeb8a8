"""The file of type constraints, read again whenever it changes (around 14, 15).

Owns what counts as a change, and what becomes of a file that cannot be used. What stands in it is
``mm.core.constraints``'s.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.to_thread

from mm.core.constraints import (
    CONSTRAINTS_BYTES_MAX,
    NO_CONSTRAINTS,
    TypeConstraints,
    parse_type_constraints,
)

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


@dataclass(frozen=True, slots=True)
class _Look:
    """What a look at the path found."""

    #: Device, inode, size and time: at least one differs after an edit in place, after a rename
    #: over the file, and after Kubernetes has turned its ``..data`` link to another directory.
    signature: tuple[int, ...] = ()
    #: None: not read, because nothing has changed.
    content: bytes | None = None
    problem: str = ""


class ConstraintsFile:
    """Polls one path through all its symbolic links, and tells of new contents.

    Watching for events instead would miss what happens behind links, in mounts by ``subPath`` and
    on network disks.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        #: What holds now.
        self._content: bytes | None = None
        #: What was last said about a file that cannot be used: each change is worth one line.
        self._said: _Look | None = None

    async def first(self) -> TypeConstraints:
        """Answer the constraints at the start; none, after a wait, if the file stays bad.

        The instance then places loads anywhere until the file is put right, as the Java mesh does:
        a mesh that serves is worth more than one that places well.
        """
        found = None
        with anyio.move_on_after(START_WAIT_S):
            while found is None:
                found = await self.changed()
                if found is None:
                    await anyio.sleep(POLL_S)
        if found is not None:
            return found
        logger.error(
            "type constraints file %s cannot be used: until it is put right, models of every type"
            " are loaded anywhere",
            self._path,
        )
        return NO_CONSTRAINTS

    async def run(self, tell: Callable[[TypeConstraints], None]) -> None:
        """Tell of each new content until cancelled; the last good one holds meanwhile."""
        while True:
            await anyio.sleep(POLL_S)
            constraints = await self.changed()
            if constraints is not None:
                tell(constraints)

    async def changed(self) -> TypeConstraints | None:
        """Answer new constraints; None if nothing changed, or to nothing that can be used."""
        look, constraints = await self._read()
        if look.problem:
            await anyio.sleep(SECOND_LOOK_S)
            look, constraints = await self._read()
        self._seen = look.signature
        if look.problem:
            if look != self._said:
                logger.warning(
                    "type constraints file %s: %s; what it said before still holds",
                    self._path,
                    look.problem,
                )
            self._said = look
        elif look.content is not None:
            if constraints is not None or self._said is not None:
                logger.info("type constraints file %s is in use", self._path)
            self._said = None
            self._content = look.content
        return constraints

    async def _read(self) -> tuple[_Look, TypeConstraints | None]:
        look = await anyio.to_thread.run_sync(_look, self._path, self._seen, abandon_on_cancel=True)
        if look.content is None or look.content == self._content:
            return look, None
        try:
            return look, parse_type_constraints(look.content)
        except ValueError as exc:
            return _Look(look.signature, look.content, str(exc)), None


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
            return _Look(signature, file.read(CONSTRAINTS_BYTES_MAX + 1))
    except OSError as exc:
        return _Look((exc.errno or 0,), problem=os.strerror(exc.errno or 0).lower())
