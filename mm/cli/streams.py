"""The standard streams of this process: all three are there, and a failed write is told.

Owns what becomes of them before anything else runs, and at the end. What is printed is
``mm.cli.output``'s.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, Final

from mm.cli.errors import READER_LEFT, UNWRITTEN, CommandError

STDOUT: Final = 1
STDERR: Final = 2


class UnwrittenError(CommandError):
    """Standard output cannot be written. Nobody is told if whoever read it has left."""

    def __init__(self, cause: OSError) -> None:
        if isinstance(cause, BrokenPipeError):
            super().__init__("", exit_code=READER_LEFT)
            return
        reason = (cause.strerror or str(cause)).lower()
        super().__init__(f"cannot write to standard output: {reason}", exit_code=UNWRITTEN)


class _Output(io.FileIO):
    """Standard output, whoever writes: its errors are told from those of all other files."""

    def write(self, data: Any, /) -> int:
        try:
            count: int | None = super().write(data)
            if count is None:  # it does not block, and is full
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as exc:
            # What could not be written is tried again when the process ends: Python would tell of
            # it in lines of its own, and choose the exit code.
            _write_nowhere(STDOUT)
            raise UnwrittenError(exc) from exc
        return count


def open_streams() -> None:
    """Have all three streams, whatever the caller closed. Any file would get the numbers of those
    that are missing, and be printed to; libuv aborts when it closes one of them.

    Writing to an output that was closed fails, as it does in other programs. Errors and logs may go
    nowhere.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free. Children have it, too.
            os.set_inheritable(os.open(os.devnull, flags), True)
    if sys.stderr is None:
        sys.stderr = os.fdopen(STDERR, "w", errors="backslashreplace", closefd=False)
    # By line, for all that is printed is to be seen at once.
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(STDOUT, "w", closefd=False)),
        encoding=getattr(sys.stdout, "encoding", None),
        errors="backslashreplace",
        line_buffering=True,
    )


def settle() -> None:
    """Let go of what could not be said on stderr: the exit code is the command's."""
    try:
        sys.stderr.flush()
    except OSError:
        _write_nowhere(STDERR)


def _write_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
