"""What options may say: read strictly, and what is wrong is told with what would be right.

Owns the reading and the texts; which option takes what is its command's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Final

import typer

from mm.cli.errors import MISUSED, CommandError

#: gRPC says a time limit in eight digits at most.
TIMEOUT_MAX_S: Final = 99_999_999
TIMEOUT_MIN_S: Final = 0.001
#: The width of the API's counts.
COUNT_MAX: Final = 2**31 - 1


def seconds(text: Any) -> float:
    """Read a time limit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not TIMEOUT_MIN_S <= value <= TIMEOUT_MAX_S:
        raise typer.BadParameter(
            f"{str(text)!r} is no time limit; allowed: {TIMEOUT_MIN_S} to {TIMEOUT_MAX_S} s"
        )
    return value


def count(text: Any) -> int:
    """Read a number of things."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= COUNT_MAX:
        raise typer.BadParameter(f"{str(text)!r} is no number of them; allowed: 0 to {COUNT_MAX}")
    return value


def check_utf8(args: Sequence[str]) -> None:
    """Raise ``CommandError`` if the mesh could not be sent one of them: all its texts are UTF-8."""
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            shown = repr(os.fsencode(arg)).removeprefix("b")
            raise CommandError(
                f"{shown} cannot be said to a mesh; allowed: UTF-8", exit_code=MISUSED
            ) from None
