"""Lists and watches of the mesh: what `mm model` and `mm vmodel` do in the same way.

Owns asking for page after page and following changes. What an entry looks like is its command's.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from mm.cli.errors import MISUSED, CommandError
from mm.cli.mesh import PAGE_SIZE, connected, pages, watching
from mm.cli.output import ChangePrinter, Format, ListPrinter, remark, shown
from mm.cli.values import count

E = TypeVar("E", bound=enum.IntEnum)

Limit = Annotated[int, typer.Option(metavar="N", parser=count, help="At most so many; 0 for all.")]


@dataclass(frozen=True, slots=True)
class Kind:
    """What is listed and watched: models, or vmodels."""

    #: The field of a page with the entries, and their name for people.
    plural: str
    list_method: str
    watch_method: str
    page_name: str
    entry_name: str
    columns: tuple[str, ...]
    #: So many cells of a row are printed of a change.
    change_columns_count: int
    id_of: Callable[[Any], str]
    #: An entry as a value for programs, and as the cells of a row.
    shown_as: Callable[[Any], tuple[Mapping[str, Any], Sequence[str]]]


def print_list(
    kind: Kind, request: Any, limit: int, address: str, timeout_s: float, output: Format
) -> None:
    """Print what is asked for page by page, at most ``limit`` entries; 0 for all."""
    printer = ListPrinter(output, kind.columns)

    async def print_all() -> None:
        async with connected(address, timeout_s, for_all=False) as channel:
            request.page_size = min(limit or PAGE_SIZE, PAGE_SIZE)
            async for page in pages(channel, kind.list_method, kind.page_name, request, timeout_s):
                entries = getattr(page, kind.plural)
                left = limit - printer.count if limit else len(entries)
                printer.page([kind.shown_as(each) for each in entries[:left]])
                if limit and printer.count >= limit:
                    break

    asyncio.run(print_all())
    printer.end(kind.plural)


def print_changes(
    kind: Kind,
    request: Any,
    key_id: str | None,
    prefix: str,
    address: str,
    timeout_s: float,
    output: Format,
) -> None:
    """Print what is there, then each change, until cancelled.

    ``request`` lists what is watched: one id, or those with a prefix.
    """
    if key_id == "":
        raise CommandError("'' is no ID to watch; allowed: an ID, or none", exit_code=MISUSED)
    if key_id and prefix:
        raise CommandError("give an ID or --prefix, not both", exit_code=MISUSED)
    printer = ChangePrinter(output)

    def show(entry: Any) -> None:
        value, cells = kind.shown_as(entry)
        printer.change(kind.id_of(entry), value, cells[: kind.change_columns_count])

    def present(page: Any) -> Iterator[Any]:
        return (e for e in getattr(page, kind.plural) if key_id in (None, kind.id_of(e)))

    async def follow() -> None:
        async with (
            connected(address, timeout_s, for_all=False) as channel,
            watching(
                channel, kind.watch_method, kind.entry_name, key_id or "", prefix, timeout_s
            ) as changes,
        ):
            async for page in pages(channel, kind.list_method, kind.page_name, request, timeout_s):
                entries = list(present(page))
                for entry in entries:
                    show(entry)
                if key_id:
                    if not entries:
                        remark(f"no {kind.plural.removesuffix('s')} {shown(key_id)} yet")
                    break
            async for entry in changes:
                show(entry)

    asyncio.run(follow())


def wanted_status(statuses: type[E], name: str) -> E:
    """Answer the status to look for, 0 for any; raises ``CommandError`` if there is none."""
    if not name:
        return statuses(0)
    names = [each.name for each in statuses if each and each.name]
    if name.upper() not in names:
        raise CommandError(
            f"{name!r} is no status to look for; allowed: {', '.join(names)}", exit_code=MISUSED
        )
    return statuses[name.upper()]


def name_of(statuses: type[enum.IntEnum], status: int) -> str:
    """Answer the name of a status, or its number: a newer mesh may know more."""
    try:
        return statuses(status).name or str(int(status))
    except ValueError:
        return str(int(status))
