"""Prints what of requirements.lock the image needs: pins with their hashes, for pip.

    python3 pins.py [NAME...]

Without a name these are the packages that ``mm`` itself depends on, and what they depend on; with
names, these packages and what they depend on. The lock says after each package who asked for it,
so nothing is resolved anew: the image has what the tests ran with. Reads ``pyproject.toml`` and
``requirements.lock`` in the working directory, and uses nothing but Python's own library.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PROJECT = "mm (pyproject.toml)"


def normal(name: str) -> str:
    """Answer a package's name as the lock spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name.strip(), maxsplit=1)[0]).lower()


def entries_of(lock: str) -> list[tuple[str, str, set[str]]]:
    """Answer (name, its lines, who asked for it) of each entry; a name may have several."""
    entries = []
    for text in re.split(r"\n(?=[a-z0-9])", lock):
        if text.startswith("#"):
            continue
        pin = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        said = re.sub(r"(?m)^ *# *(via)? *", "", text.removeprefix(pin))
        entries.append((normal(pin.partition("==")[0]), pin, set(filter(None, said.split("\n")))))
    return entries


def pins(lock: str, wanted: Iterable[str]) -> str:
    """Answer the lines of the wanted packages, and of those that they ask for."""
    found = {normal(name) for name in wanted}
    entries = entries_of(lock)
    missing = found - {name for name, _, _ in entries}
    if missing:
        raise SystemExit(f"pins.py: not in requirements.lock: {', '.join(sorted(missing))}")
    grown = True
    while grown:
        more = {name for name, _, parents in entries if parents & found} - found
        grown = bool(more)
        found |= more
    return "".join(f"{pin}\n" for name, pin, _ in entries if name in found)


def main() -> None:
    """Print them."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = Path("requirements.lock").read_text(encoding="utf-8")
    print(pins(lock, sys.argv[1:] or project["dependencies"]), end="")


if __name__ == "__main__":
    main()
