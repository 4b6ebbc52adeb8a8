"""Which table this process uses: the extension ``mm._lru``, or its plain-Python twin.

It owns only the choice. ``MM_TABLE=python`` takes the twin, ``MM_TABLE=extension`` insists on the
extension; unset takes the extension if it is built. Type checkers always see the extension's
interface, which both have.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from mm import _lru_py
from mm._lru_words import (
    ID_BYTES_MAX,
    INSTANCE_COUNT_MAX,
    LOCAL,
    NONE,
    READER_COUNT_MAX,
    SLOT_COUNT_MAX,
    CopyState,
    Evicted,
)
from mm.errors import ConfigError, StartupError

__all__ = [
    "ID_BYTES_MAX",
    "IMPLEMENTATION",
    "INSTANCE_COUNT_MAX",
    "LOCAL",
    "NONE",
    "READER_COUNT_MAX",
    "SLOT_COUNT_MAX",
    "CopyState",
    "Evicted",
    "Table",
]


def _extension_wanted() -> bool:
    """Answer whether to take the extension; ImportError if one is demanded that is not built.

    Raises ``ConfigError`` for any other word.
    """
    choice = os.environ.get("MM_TABLE", "")
    if choice == "python":
        return False
    if choice not in ("", "extension"):
        raise ConfigError(f"MM_TABLE is {choice!r}, allowed are 'python', 'extension' and unset")
    try:
        import mm._lru as extension
    except ModuleNotFoundError as error:
        if choice == "extension" or error.name != "mm._lru":
            raise
        return False
    _check_extension(extension.Table)
    return True


def _check_extension(table_type: type) -> None:
    """Raise ``StartupError`` if the extension lacks what its twin has.

    After a `git pull` it is still the one that was built before; the first call of a method that
    it lacks would be an AttributeError, in the midst of a load perhaps.
    """
    expected = {name for name in vars(_lru_py.Table) if not name.startswith("_")}
    missing = sorted(expected - set(dir(table_type)))
    if missing:
        raise StartupError(
            f"the extension mm._lru is older than the program (it lacks {', '.join(missing)}):"
            " run `make develop`"
        )


#: "extension" or "python", for the log and the figures.
IMPLEMENTATION: Final = "extension" if _extension_wanted() else "python"

if TYPE_CHECKING or IMPLEMENTATION == "extension":
    from mm._lru import Table
else:
    Table = _lru_py.Table
