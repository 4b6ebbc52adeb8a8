"""What commands print: for people, or for programs as JSON or YAML.

Owns the option, tables, and what becomes of text that comes from outside. Lists and watches print
as they go: an entry is forgotten when it is printed.
"""

from __future__ import annotations

import contextlib
import enum
import io
import json
import shlex
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

import typer

from mm.cli.yaml_text import to_yaml

#: Of a cell, a table shows this much; JSON and YAML show all.
CELL_CHARS_MAX: Final = 100


class Format(enum.StrEnum):
    """How to print."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def _format(text: str) -> Format:
    try:
        return Format(text)
    except ValueError:
        allowed = ", ".join(Format)
        raise typer.BadParameter(f"{text!r} is no format; allowed: {allowed}") from None


Output = Annotated[
    Format,
    typer.Option(
        "--output",
        "-o",
        help="For people (table), or for programs (json, yaml).",
        metavar="FORMAT",
        parser=_format,
    ),
]


def emit(text: str) -> None:
    """Print a line at once. If that cannot be done the command ends: ``mm.cli.streams``."""
    typer.echo(text)


def remark(text: str) -> None:
    """Print a line beside the output. Where that goes nowhere, the command goes on."""
    with contextlib.suppress(OSError):
        typer.echo(text, err=True)


def show_anything() -> None:
    """From here on, what the terminal's encoding cannot show is printed as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # It takes effect, then asks where the stream is: one that was a file when this process
            # was forked, and is a pipe now, cannot tell, and need not.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def emit_one(form: Format, value: Mapping[str, Any], text: str) -> None:
    """Print one thing: ``text`` is what people read."""
    if form is Format.TABLE:
        emit(text)
    else:
        emit(json.dumps(value) if form is Format.JSON else to_yaml(value).removesuffix("\n"))


def shown(text: str) -> str:
    """Answer a text from outside without what would do something to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(text: str) -> str:
    """Answer a text as a shell takes it for one word, in what people may type."""
    return shlex.quote(shown(text))


def in_one_line(text: str) -> str:
    """Answer a text of several lines as one, without the errors in it."""
    lines = (line.strip() for line in text.splitlines())
    return ", ".join(line for line in lines if not line.startswith("error: "))


def shown_time(time_ms: int) -> str:
    """Answer a time of the clock here."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ms / 1000))
    except (OverflowError, ValueError, OSError):
        return f"{time_ms} ms"  # anything may stand in a record


def shown_size(size_bytes: int) -> str:
    """Answer a size in MiB, or KiB if it is small; empty if it is not known."""
    if 0 < size_bytes < 2**20:
        return f"{size_bytes / 2**10:.1f} KiB"
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes else ""


def _width(text: str) -> int:
    """Answer how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _short(text: str) -> str:
    """Answer a cell with its end left out if it is too wide: an id may have 4 KiB."""
    if len(text) <= CELL_CHARS_MAX:
        return text
    return f"{text[: CELL_CHARS_MAX - 1]}…"


class ListPrinter:
    """A list that is printed page by page."""

    def __init__(self, form: Format, columns: Sequence[str]) -> None:
        self._form = form
        self._columns = columns
        self._widths: list[int] = []
        self.count = 0

    def page(self, values: Iterable[tuple[Mapping[str, Any], Sequence[str]]]) -> None:
        """Print entries: each as a value, and as the cells of a row."""
        entries = list(values)
        if self._form is Format.TABLE and entries:
            self._rows([[_short(shown(cell)) or "-" for cell in cells] for _, cells in entries])
        for value, _ in entries:
            if self._form is Format.JSON:
                emit(("," if self.count else "[") + json.dumps(value))
            elif self._form is Format.YAML:
                emit(to_yaml([value]).removesuffix("\n"))
            self.count += 1

    def end(self, what: str) -> None:
        """Print what belongs behind the last page."""
        if self._form is Format.JSON:
            emit("]" if self.count else "[]")
        elif not self.count and self._form is Format.YAML:
            emit("[]")
        elif not self.count:
            remark(f"no {what}")

    def _rows(self, rows: Sequence[Sequence[str]]) -> None:
        """The first page decides how wide the columns are."""
        if not self._widths:
            rows = [self._columns, *rows]
            self._widths = [max(map(_width, cells)) for cells in zip(*rows, strict=True)]
        for row in rows:
            cells = zip(row, self._widths, strict=True)
            padded = [cell + " " * (width - _width(cell)) for cell, width in cells]
            emit("  ".join(padded).rstrip())


class ChangePrinter:
    """Changes, one after the other; what looks as it did before is not printed again."""

    def __init__(self, form: Format) -> None:
        self._form = form
        self._printed: dict[str, str] = {}

    def change(self, key_id: str, value: Mapping[str, Any], cells: Sequence[str]) -> None:
        """Print what became of an id."""
        line = ""
        if self._form is Format.TABLE:
            text = "  ".join(shown(cell) for cell in cells if cell)
            line = "  ".join(_short(shown(cell)) for cell in cells if cell)
        else:
            text = json.dumps(value) if self._form is Format.JSON else "---\n" + to_yaml(value)[:-1]
        if self._printed.get(key_id) == text:
            return
        self._printed[key_id] = text
        emit(f"{time.strftime('%H:%M:%S')}  {line}" if line else text)
