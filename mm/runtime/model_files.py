"""Model files below a root directory, and nowhere else.

A path comes from whoever may register models; what it leads to is opened by this process. So a
path is taken only if it stays below the root, symbolic links followed.
"""

from __future__ import annotations

import os
from pathlib import Path

from mm.errors import StartupError, StatusCode
from mm.runtime.call import CallError


class ModelRoot:
    """The directory of the models."""

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory)
        if not path.is_dir():
            raise StartupError(f"the model root {str(path)!r} is no directory")
        self.directory = path.resolve(strict=True)

    def file(self, path: str, suffixes: tuple[str, ...]) -> Path:
        """Answer the file at a registered path: relative to the root, or absolute below it.

        A directory stands for the one file with one of the suffixes that it holds. Raises
        ``FileNotFoundError`` and the like for what is not there, ``CallError`` for what is
        not allowed.
        """
        if not path or "\0" in path:
            raise _refused(path, "a path is needed" if not path else "it holds a NUL")
        if ".." in Path(path).parts:
            raise _refused(path, "'..' is not allowed")
        resolved = self._resolved(path, self.directory / path)
        if resolved.is_dir():
            candidates = sorted(p for p in resolved.iterdir() if p.suffix in suffixes)
            if len(candidates) != 1:
                what = f"the directory holds {len(candidates)} files of {', '.join(suffixes)}"
                raise _refused(path, f"{what}; 1 is needed")
            resolved = self._resolved(path, candidates[0])
        if not resolved.is_file():
            raise _refused(path, "it is no regular file")
        if resolved.suffix not in suffixes:
            allowed = ", ".join(suffixes)
            raise _refused(path, f"suffix {resolved.suffix!r}; allowed are {allowed}")
        return resolved

    def _resolved(self, path: str, file: Path) -> Path:
        # First where it leads, then whether that exists: what is outside answers the same either
        # way, or whoever registers models could look for files all over the machine.
        if not Path(os.path.realpath(file)).is_relative_to(self.directory):
            raise _refused(path, f"it leads out of the model root {str(self.directory)!r}")
        return file.resolve(strict=True)


def _refused(path: str, why: str) -> CallError:
    # Says to the mesh that nothing was loaded.
    return CallError(StatusCode.FAILED_PRECONDITION, f"model path {path!r}: {why}")
