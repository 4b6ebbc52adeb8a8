"""How large everything is that an object remembers: to see what grows.

Finds tables by walking from object to object, so that one which nobody thought of is measured, too.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any, Final

import anyio

from mm.table import Table

#: What holds entries.
_CONTAINERS: Final = (dict, list, set, frozenset, tuple, deque, bytearray)
#: Neither holds entries nor leads to something that does.
_PLAIN: Final = (str, bytes, int, float, type(None), enum.Enum, type)
#: The world beside an instance: not the instance's own memory.
_WORLD: Final = ("mm.testing.", "mm.edge.", "mm.config")


def table_sizes(root: object, name: str) -> Counter[str]:
    """Answer the entries of each table that ``root`` leads to, by its path from ``name``.

    Tables inside a table have one path, and their sizes are added. Tasks that wait for an event
    count as entries of it. What hangs only on a method that somebody calls, as a task or a
    listener, has the path of its class there: "tasks[].<Keeper>".
    """
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    # In order of distance, so that each path is the shortest.
    left: deque[tuple[str, object]] = deque([(name, root)])
    while left:
        path, each = left.popleft()
        if isinstance(each, MethodType):
            owner = each.__self__
            left.append((f"{path}.<{type(owner).__name__}>", owner))
            continue
        if isinstance(each, _PLAIN) or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, _CONTAINERS):
            sizes[path] += len(each)
            entries = each.values() if isinstance(each, dict) else each
            left += [(f"{path}[]", entry) for entry in entries]
        elif isinstance(each, partial):
            left += [(path, part) for part in (each.func, *each.args, *each.keywords.values())]
        elif isinstance(each, Table):
            sizes[path] += len(each)
        elif isinstance(each, anyio.Event):
            sizes[path] += each.statistics().tasks_waiting
        elif _is_ours(each):
            left += [(f"{path}.{attribute}", value) for attribute, value in _attributes(each)]
    return sizes


def _is_ours(each: object) -> bool:
    module = type(each).__module__
    return module.startswith("mm.") and not module.startswith(_WORLD)


def _attributes(each: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(each, "__dict__", {}).items()
    for kind in type(each).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(each, name):
                yield name, getattr(each, name)
