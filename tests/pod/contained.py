"""`mm serve` as a container runs it: ``python -m tests.pod.contained UID DIRECTORY [WRITABLE...]``.

Where the tests run as root it becomes somebody without a name or any capability, for whom every
file system is read-only but for what is named; where they do not, it is that already. The image
itself is started by ``make test-image``.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Final

from mm.__main__ import main as program

_CLONE_NEWNS: Final = 0x00020000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}{arguments}")


def _closed_above(path: Path) -> Path | None:
    """Answer the outermost directory on the way there that others may not enter."""
    way = [*reversed(path.parents), path]
    return next((each for each in way if not each.stat().st_mode & stat.S_IXOTH), None)


def open_the_way(places: list[Path]) -> None:
    """Let everybody read these, which may be below a home directory: in this view of the files
    alone, where the directory that is closed becomes one with nothing else in it.
    """
    closed = {path: above for path in places if (above := _closed_above(path)) is not None}
    kept = {path: Path(tempfile.mkdtemp()) for path in closed}
    for path, at in kept.items():
        _bind(path, at)
    for above in set(closed.values()):
        _call("mount", b"none", bytes(above), b"tmpfs", 0, b"mode=0755")
    for path, at in kept.items():
        path.mkdir(parents=True, exist_ok=True)
        _bind(at, path)


def _bind(source: Path, target: Path) -> None:
    _call("mount", bytes(source), bytes(target), None, _MS_BIND | _MS_REC, None)


def make_read_only(writable: list[Path]) -> None:
    """Have a view of all files in which only those may be written."""
    for path in writable:
        _bind(path, path)
    _call("mount", None, b"/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY, None)


def become(uid: int) -> None:
    """Be that user, of whom nothing is known, and have no capability, now or ever."""
    last_capability = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last_capability + 1):
        _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(uid, uid, uid)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def main() -> None:
    """Be `mm serve`."""
    uid, directory, *writable = sys.argv[1:]
    sys.argv[:] = ["mm", "serve"]
    os.chdir(directory)
    if os.getuid() == 0:
        _call("unshare", _CLONE_NEWNS)
        _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        open_the_way([Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[2]])
        make_read_only([Path(each) for each in writable])
        become(int(uid))
    program()


if __name__ == "__main__":
    main()
