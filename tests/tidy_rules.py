"""The rules of ``tests/test_tidy.py``: pure functions from a source file to complaints.

Layers and what they may import are tables here; sizes and words are constants. Generated code
(``mm/pb``) is nobody's style and is left out before the rules are asked.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 450
LINE_LENGTH_MAX = 100

#: Outside the layers, as users of them.
FREE = ("mm.runtime", "mm.cli", "mm.testing", "mm.demo", "mm.__main__")
#: Beside the layers: the table imports none of them.
TABLE = ("mm._lru", "mm.table")
#: What `core` and everything above may see.
FOUNDATION = ("mm.errors", "mm.core")
SETTINGS = (
    "mm.config",
    "mm.endpoints",
    "mm.environment",
    "mm.identity_settings",
    "mm.json_settings",
    "mm.connection_settings",
    "mm.scaling_settings",
    "mm.access_settings",
    "mm.tls_reference",
    "mm.tls_settings",
    "mm.settings_reference",
    "mm.limits",
    "mm.log_settings",
    "mm.metrics_settings",
    "mm.payload_settings",
    "mm.observing_reference",
    "mm.setting",
    "mm.known_variables",
)

#: A layer, what of mm it may import, and which packages that are not of the standard library.
LAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mm.core": (FOUNDATION, ("msgspec",)),
    "mm.mesh": ((*FOUNDATION, *SETTINGS, *TABLE, "mm.mesh"), ("anyio", "msgspec")),
    **dict.fromkeys(SETTINGS, ((*FOUNDATION, *SETTINGS), ("msgspec",))),
    "mm.errors": (("mm.errors",), ()),
    **dict.fromkeys(TABLE, ((*TABLE, "mm.errors"), ())),
}

#: Clocks, chance, the outside world and tasks: the shell's affair, not a decision's.
IMPURE = frozenset(
    {"asyncio", "concurrent", "http", "io", "logging", "multiprocessing", "os", "queue"}
    | {"secrets", "select", "selectors", "shutil", "signal", "socket", "ssl", "subprocess"}
    | {"tempfile", "threading", "time", "urllib.request", "uuid"}
)
#: In `mesh` time comes from anyio and the clock port, tasks from anyio; it may log.
NOT_IN_MESH = IMPURE - {"logging"}

SLEEPERS = frozenset({"time", "asyncio", "anyio", "trio"})
SKIPS = frozenset({"skip", "skipif", "xfail", "importorskip"})
# In two pieces, so that this file does not speak them.
OPEN_ENDS = re.compile(r"\b(?:TO" + r"DO(?!\(#\d+\))|FIX" + r"ME|X" + r"XX)\b")
MERGE_MARKS = ("<" * 7 + " ", ">" * 7 + " ")


@dataclass(frozen=True)
class Source:
    """One file: its path from the root, with slashes, and its text."""

    path: str
    text: str

    @property
    def module(self) -> str:
        """The dotted name that an import would use."""
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; only of Python files."""
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the tree: each rule looks at them, and the walk is most of the work."""
        return list(ast.walk(self.tree))

    @cached_property
    def imports(self) -> list[tuple[ast.AST, str]]:
        """Every imported module, "a.b" and "a.b.name" both for ``from a.b import name``."""
        return list(_imports(self))

    def at(self, node: ast.AST, complaint: str) -> str:
        """Answer a complaint as an editor can jump to it."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {complaint}"


def is_within(module: str, packages: Iterable[str]) -> bool:
    """Answer whether ``module`` is one of ``packages`` or inside one; "mm._lru" covers its twin."""
    return any(
        module == package
        or module.startswith(
            (package + ".", package + "_") if package == "mm._lru" else package + "."
        )
        for package in packages
    )


def layer_complaints(source: Source) -> Iterator[str]:
    """The layers point one way: core <- mesh <- edge; the table and the settings beside them."""
    layer = next((name for name in LAYERS if is_within(source.module, [name])), None)
    for node, name in source.imports:
        top = name.partition(".")[0]
        if layer is None:
            if is_within(source.module, ["mm.edge"]) and is_within(name, FREE):
                yield source.at(node, f"edge imports {name}, which is outside the layers")
            continue
        ours, theirs = LAYERS[layer]
        if top == "mm":
            if name != "mm" and not is_within(name, ours):
                yield source.at(node, f"{layer} may not import {name}")
        elif is_within(name, {"mm.core": IMPURE, "mm.mesh": NOT_IN_MESH}.get(layer, ())):
            yield source.at(node, f"{layer} may not import {name}: give it as an argument")
        elif top not in sys.stdlib_module_names and top not in theirs:
            yield source.at(node, f"{layer} may not import the package {name}")


def chance_and_clock_complaints(source: Source) -> Iterator[str]:
    """In `core` and `mesh` chance is a ``random.Random`` that was given, and so is the time."""
    if not is_within(source.module, ["mm.core", "mm.mesh"]):
        return
    for node, name in source.imports:
        if (
            isinstance(node, ast.ImportFrom)
            and name.startswith("random.")
            and name != "random.Random"
        ):
            yield source.at(node, f"{name} uses the global generator")
    for node in source.nodes:
        if not isinstance(node, ast.Attribute):
            continue
        if _is_name(node.value, "random") and node.attr != "Random":
            yield source.at(node, f"random.{node.attr} uses the global generator")
        if node.attr in ("now", "utcnow", "today") and _mentions(node.value, ("datetime", "date")):
            yield source.at(node, f"{ast.unparse(node)} reads the clock")


def task_complaints(source: Source) -> Iterator[str]:
    """Tasks belong to a task group; only `edge` and the servers outside the layers meet asyncio."""
    if not source.path.startswith("mm/") or is_within(
        source.module, ("mm.edge", "mm.runtime", "mm.testing")
    ):
        return
    for node in source.nodes:
        if isinstance(node, ast.Call) and _called(node) in ("create_task", "ensure_future"):
            yield source.at(node, f"{_called(node)} outside edge: start tasks in a task group")


def broad_except_complaints(source: Source) -> Iterator[str]:
    """Errors of the world are named; a bug goes up instead of round and round in a loop."""
    if not source.path.startswith("mm/"):
        return
    for handler, in_loop in _handlers(source.tree, in_loop=False):
        if handler.type is None:
            yield source.at(handler, "bare except")
        elif (
            in_loop
            and _mentions(handler.type, ("Exception", "BaseException"))
            and not isinstance(handler.body[-1], ast.Raise)
        ):
            yield source.at(handler, "a loop that swallows every exception")


def size_complaints(source: Source) -> Iterator[str]:
    """Short lines, functions that fit on a screen, files with one noun."""
    lines = source.text.splitlines()
    if len(lines) > FILE_LINES_MAX:
        yield f"{source.path}: {len(lines)} lines, at most {FILE_LINES_MAX}"
    for number, line in enumerate(lines, 1):
        if len(line) > LINE_LENGTH_MAX:
            yield f"{source.path}:{number}: {len(line)} columns, at most {LINE_LENGTH_MAX}"
    if not source.path.endswith(".py"):
        return
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION_LINES_MAX:
                yield source.at(
                    node, f"{node.name} has {count} lines, at most {FUNCTION_LINES_MAX}"
                )


def open_end_complaints(source: Source) -> Iterator[str]:
    """What is left to do has a number in the tracker, or is done."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if OPEN_ENDS.search(line):
            yield f"{source.path}:{number}: an open end without a number: {line.strip()}"
        if line.startswith(MERGE_MARKS):  # in a text they are no syntax error
            yield f"{source.path}:{number}: left over from a merge: {line}"


def docstring_complaints(source: Source) -> Iterator[str]:
    """A file opens by saying what it owns; an extension's parts may do so in a comment."""
    if source.path.endswith(".py"):
        if not ast.get_docstring(source.tree):
            yield f"{source.path}:1: opens without a docstring"
    elif not source.text.lstrip().startswith(("#", '"""')):
        yield f"{source.path}:1: opens without a docstring or a comment"


def sleep_complaints(source: Source) -> Iterator[str]:
    """Tests wait for conditions; only virtual time may be slept through."""
    if not source.path.startswith("tests/") or _has_virtual_time(source.tree.body):
        return
    for node, name in source.imports:
        module, _, imported = name.rpartition(".")
        if isinstance(node, ast.ImportFrom) and module in SLEEPERS and imported == "sleep":
            yield source.at(node, f"imports {name}")
    for node, is_virtual in _calls(source.tree, is_virtual=False):
        called = node.func
        if (
            isinstance(called, ast.Attribute)
            and called.attr in ("sleep", "sleep_until", "sleep_forever")
            and isinstance(called.value, ast.Name)
            and called.value.id in SLEEPERS
            and not is_virtual
            and called.attr != "sleep_forever"
        ):
            yield source.at(node, f"{ast.unparse(called)} in a test: wait for the condition itself")


def skip_complaints(source: Source) -> Iterator[str]:
    """A test that is not run tests nothing."""
    if not source.path.startswith("tests/"):
        return
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr in SKIPS:
            if _is_name(node.value, "pytest") or ast.unparse(node.value) == "pytest.mark":
                yield source.at(node, f"{ast.unparse(node)}: run it or remove it")
        elif isinstance(node, ast.ImportFrom) and node.module == "pytest":
            for alias in node.names:
                if alias.name in SKIPS:
                    yield source.at(node, f"imports pytest.{alias.name}")


def dead_modules(sources: Iterable[Source], entry_points: Iterable[str]) -> list[str]:
    """Answer the modules of mm that nothing imports, by name or by a string that names them.

    A test keeps only ``mm.testing`` alive: elsewhere it would be testing what nobody uses.
    """
    sources = [source for source in sources if source.path.endswith(".py")]
    used = set(entry_points)
    for source in sources:
        names = {name for _, name in source.imports} | _strings(source.nodes)
        names.discard(source.module)
        if not source.path.startswith("mm/"):
            names = {name for name in names if is_within(name, ["mm.testing"])}
        used |= names
    packages = {name.rpartition(".")[0] for name in used}
    while parents := {name.rpartition(".")[0] for name in packages} - packages:
        packages |= parents
    modules = [source.module for source in sources if source.path.startswith("mm/")]
    return sorted(module for module in modules if module not in used | packages)


def _imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    package = (
        source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
    )
    for node in source.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            yield node, base
            for alias in node.names:
                yield node, f"{base}.{alias.name}"


def _strings(nodes: Iterable[ast.AST]) -> set[str]:
    return {
        node.value.partition(":")[0]
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _mentions(node: ast.AST, names: tuple[str, ...]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node)) or any(
        isinstance(part, ast.Attribute) and part.attr in names for part in ast.walk(node)
    )


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func).rpartition(".")[2]


def _handlers(node: ast.AST, *, in_loop: bool) -> Iterator[tuple[ast.ExceptHandler, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _handlers(child, in_loop=False)
            continue
        if isinstance(child, ast.ExceptHandler):
            yield child, in_loop
        is_loop = isinstance(child, ast.While | ast.For | ast.AsyncFor)
        yield from _handlers(child, in_loop=in_loop or is_loop)


def _calls(node: ast.AST, *, is_virtual: bool) -> Iterator[tuple[ast.Call, bool]]:
    for child in ast.iter_child_nodes(node):
        virtual = is_virtual
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            virtual = virtual or any(_mentions(d, ("virtual_time",)) for d in child.decorator_list)
        if isinstance(child, ast.Call):
            yield child, virtual
        yield from _calls(child, is_virtual=virtual)


def _has_virtual_time(body: list[ast.stmt]) -> bool:
    return any(
        isinstance(statement, ast.Assign)
        and any(_is_name(target, "pytestmark") for target in statement.targets)
        and _mentions(statement.value, ("virtual_time",))
        for statement in body
    )
