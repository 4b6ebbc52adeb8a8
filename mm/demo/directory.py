"""The demo's private directory: models and logs, gone when it ends well.

After a failure the logs stay and the text of the error names them. What a killed demo left behind
is removed by the next one: a lock tells whether an owner lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PREFIX: Final = "mm-demo-"
_LOCK_NAME: Final = "owner.lock"
_MODELS: Final = "models"


class PrivateDirectory:
    """A place for one run. Call ``keep_logs`` to leave the logs behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models = path / _MODELS
        self.models.mkdir()
        self.keeps_logs = False

    def keep_logs(self) -> None:
        """Leave everything but the models behind."""
        self.keeps_logs = True


@contextmanager
def private_directory() -> Iterator[PrivateDirectory]:
    """Make a directory that only this user may read; removed on the way out."""
    _sweep()
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(path / _LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        directory = PrivateDirectory(path)
        try:
            yield directory
        finally:
            if directory.keeps_logs:
                shutil.rmtree(directory.models)
                (path / _LOCK_NAME).unlink()
            else:
                shutil.rmtree(path)
    finally:
        os.close(lock)


def _sweep() -> None:
    """Remove the directories of demos that were killed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK_NAME}"):
        with contextlib.suppress(OSError):  # in use, or another's, or gone: leave it
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
            finally:
                os.close(fd)
