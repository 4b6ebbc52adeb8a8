"""`mm serve` as a user without a name that may write no file: ``-m tests.system.strict_serve``.

What it writes all the same is told in its last line. Only what Python opens is seen here; the
embedded etcd, which has a directory of its own, is no part of it.
"""

from __future__ import annotations

import os
import pwd
import sys
from typing import Any, Final, NoReturn

from mm.cli.serve import serve

_CHANGES: Final = frozenset(
    {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
    | {"os.chmod", "os.chown", "os.utime", "os.mkfifo", "os.mknod", "shutil.rmtree"}
)
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _nobody(*_who: object) -> NoReturn:
    raise KeyError("no such user")


def main() -> None:
    """Be `mm serve`."""
    written: list[str] = []

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITES):
            written.append(f"{event} {arguments[0]}")

    sys.addaudithook(look)
    # Somebody who has no line in /etc/passwd.
    pwd.getpwuid = pwd.getpwnam = _nobody  # type: ignore[assignment]
    try:
        serve()
    finally:
        print(f"written: {written}", flush=True)


if __name__ == "__main__":
    main()
