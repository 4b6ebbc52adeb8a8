"""Style as a test: the rules of ``tests/tidy_rules.py`` over the whole tree.

Each rule is also shown planted violations, so that a rule which finds nothing is known to look.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from mm.config import Config
from tests import tidy_rules as rules
from tests.tidy_rules import Source

ROOT = Path(__file__).parent.parent
PYTHON = (".py",)
CYTHON = (".pyx", ".pxd", ".pxi", ".pyi")

#: Tests that may be left out somewhere, each with the reason. Add with care.
SKIPS_ALLOWED: dict[str, str] = {}

Rule = Callable[[Source], Iterator[str]]


@cache
def all_sources() -> list[Source]:
    """Answer every file once, so that each is parsed once."""
    paths = [ROOT / "setup.py"]
    for folder in ("mm", "tests", "bench", "proto", "tools"):
        paths += sorted((ROOT / folder).rglob("*"))
    return [
        Source(name, path.read_text(encoding="utf-8"))
        for path in paths
        if path.suffix in (*PYTHON, *CYTHON)
        and not (name := path.relative_to(ROOT).as_posix()).startswith("mm/pb/")
    ]


def sources(*suffixes: str) -> list[Source]:
    return [source for source in all_sources() if source.path.endswith(suffixes)]


def expect_none(complaints: Iterable[str], why: str | None) -> None:
    found = list(complaints)
    if found:
        pytest.fail("\n".join([f"{len(found)} complaints. {why}", *found]), pytrace=False)


@pytest.mark.parametrize(
    "rule",
    [
        rules.layer_complaints,
        rules.chance_and_clock_complaints,
        rules.task_complaints,
        rules.broad_except_complaints,
        rules.sleep_complaints,
    ],
)
def test_python(rule: Rule) -> None:
    expect_none((c for source in sources(*PYTHON) for c in rule(source)), rule.__doc__)


@pytest.mark.parametrize(
    "rule", [rules.size_complaints, rules.open_end_complaints, rules.docstring_complaints]
)
def test_python_and_cython(rule: Rule) -> None:
    expect_none((c for source in sources(*PYTHON, *CYTHON) for c in rule(source)), rule.__doc__)


def test_no_test_is_left_out() -> None:
    kept = [source for source in sources(*PYTHON) if source.path not in SKIPS_ALLOWED]
    rule = rules.skip_complaints
    expect_none((c for source in kept for c in rule(source)), rule.__doc__)
    expect_none((p for p in SKIPS_ALLOWED if not (ROOT / p).exists()), "gone from the tree")


def test_no_module_is_dead() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    scripts = [target.partition(":")[0] for target in project["scripts"].values()]
    dead = rules.dead_modules(sources(*PYTHON), ["mm.__main__", *scripts])
    expect_none(dead, "Nothing in mm imports these.")


def test_no_setting_is_dead() -> None:
    # Attributes that are read: not the names of modules in imports, nor words in docstrings.
    nodes = (node for s in sources(*PYTHON) if s.path.startswith("mm/") for node in s.nodes)
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    expect_none((f.name for f in fields(Config) if f.name not in used), "Nothing reads these.")


class TestTheRulesFind:
    """Each rule is shown what it forbids, and the nearest thing that it must let pass."""

    @pytest.mark.parametrize(
        ("path", "text", "is_found"),
        [
            ("mm/core/a.py", "import anyio", True),
            ("mm/core/a.py", "from mm.mesh import ports", True),
            ("mm/core/a.py", "from ..mesh import ports", True),
            ("mm/core/a.py", "from . import ids", False),
            ("mm/core/a.py", "import time", True),
            ("mm/core/a.py", "def f():\n    import logging", True),
            ("mm/core/a.py", "from mm.config import Config", True),
            (
                "mm/core/a.py",
                "import msgspec, enum, random\nfrom mm.errors import MeshError",
                False,
            ),
            ("mm/mesh/a.py", "import asyncio", True),
            ("mm/mesh/a.py", "import aetcd", True),
            ("mm/mesh/a.py", "from mm import edge", True),
            ("mm/mesh/a.py", "from mm.pb.mmesh import X", True),
            ("mm/mesh/a.py", "import anyio, logging\nfrom mm.config import Config", False),
            ("mm/mesh/a.py", "from mm._lru import Table", False),
            ("mm/_lru_py.py", "from mm.core.ids import ModelId", True),
            ("mm/_lru_py.py", "from mm._lru_words import x", False),
            ("mm/edge/a.py", "import asyncio, grpclib\nfrom mm.mesh.ports import Store", False),
            ("mm/edge/a.py", "from mm.cli.main import app", True),
            ("mm/runtime/a.py", "import asyncio\nfrom mm.pb.mmesh import X", False),
            ("mm/config.py", "from mm.mesh import ports", True),
        ],
    )
    def test_layers(self, path: str, text: str, is_found: bool) -> None:
        assert bool(list(rules.layer_complaints(Source(path, text)))) is is_found

    @pytest.mark.parametrize(
        ("rule", "path", "text"),
        [
            (rules.chance_and_clock_complaints, "mm/core/a.py", "x = random.random()"),
            (rules.chance_and_clock_complaints, "mm/core/a.py", "from random import choice"),
            (rules.chance_and_clock_complaints, "mm/mesh/a.py", "t = datetime.datetime.now()"),
            (rules.task_complaints, "mm/mesh/a.py", "asyncio.create_task(f())"),
            (rules.task_complaints, "mm/cli/a.py", "loop.create_task(f())"),
            (rules.broad_except_complaints, "mm/a.py", "try:\n    f()\nexcept:\n    pass"),
            (
                rules.broad_except_complaints,
                "mm/a.py",
                "while 1:\n    try:\n        f()\n    except (OSError, Exception):\n        pass",
            ),
            (rules.size_complaints, "mm/a.py", "x" * 101),
            (rules.size_complaints, "mm/a.pyx", "x\n" * 451),
            (rules.size_complaints, "mm/a.py", "def f():\n" + "    x\n" * 70),
            (rules.open_end_complaints, "mm/a.pyx", "# TO" + "DO later"),
            (rules.open_end_complaints, "mm/a.py", "# FIX" + "ME"),
            (rules.open_end_complaints, "mm/a.py", '"""\n' + "<" * 7 + ' HEAD\n"""'),
            (rules.open_end_complaints, "mm/a.py", '"""\n' + ">" * 7 + ' 123abc\n"""'),
            (rules.docstring_complaints, "mm/a.py", "import os"),
            (rules.docstring_complaints, "mm/a.pyx", "cdef int x"),
            (rules.sleep_complaints, "tests/a.py", "def f():\n    time.sleep(1)"),
            (rules.sleep_complaints, "tests/a.py", "async def f():\n    await anyio.sleep(0)"),
            (rules.sleep_complaints, "tests/a.py", "from asyncio import sleep"),
            (rules.skip_complaints, "tests/a.py", "@pytest.mark.skipif(True)\ndef f(): ..."),
            (rules.skip_complaints, "tests/a.py", "pytest.skip('x')"),
            (rules.skip_complaints, "tests/a.py", "from pytest import importorskip"),
        ],
    )
    def test_what_is_forbidden(self, rule: Rule, path: str, text: str) -> None:
        assert len(list(rule(Source(path, text)))) == 1

    @pytest.mark.parametrize(
        ("rule", "path", "text"),
        [
            (rules.chance_and_clock_complaints, "mm/core/a.py", "def f(rng: random.Random): ..."),
            (rules.chance_and_clock_complaints, "mm/edge/a.py", "x = random.random()"),
            (rules.task_complaints, "mm/edge/a.py", "asyncio.create_task(f())"),
            (rules.task_complaints, "mm/mesh/a.py", "group.start_soon(f)"),
            (
                rules.broad_except_complaints,
                "mm/a.py",
                "while 1:\n    try:\n        f()\n    except Exception:\n        raise",
            ),
            (rules.size_complaints, "mm/a.py", "def f():\n" + "    x\n" * 69),
            (rules.open_end_complaints, "mm/a.py", "# TO" + "DO(#12) later"),
            (rules.docstring_complaints, "mm/a.pxd", "# The map of memory."),
            (
                rules.sleep_complaints,
                "tests/a.py",
                "@pytest.mark.virtual_time\nasync def test_a():\n    await anyio.sleep(3600)",
            ),
            (
                rules.sleep_complaints,
                "tests/a.py",
                "pytestmark = [pytest.mark.virtual_time]\nasync def f():\n    await anyio.sleep(1)",
            ),
            (rules.sleep_complaints, "mm/a.py", "time.sleep(1)"),
            (
                rules.skip_complaints,
                "tests/a.py",
                "@pytest.mark.parametrize('skip', [1])\ndef f(): ...",
            ),
        ],
    )
    def test_what_is_allowed(self, rule: Rule, path: str, text: str) -> None:
        assert not list(rule(Source(path, text)))

    def test_dead_modules(self) -> None:
        tree = [
            Source("mm/__init__.py", ""),
            Source("mm/cli/main.py", "from mm.used import x\nrun('mm.named:app')"),
            Source("mm/used.py", ""),
            Source("mm/named.py", ""),
            Source("mm/dead.py", "import mm.dead"),
            Source("mm/only_tested.py", ""),
            Source("mm/testing/fake.py", ""),
            Source("tests/test_a.py", "import mm.only_tested\nfrom mm.testing.fake import F"),
        ]
        assert rules.dead_modules(tree, ["mm.cli.main"]) == ["mm.dead", "mm.only_tested"]

    def test_every_rule_is_in_use(self) -> None:
        tree = ast.parse(Path(rules.__file__).read_text(encoding="utf-8"))
        mine = Path(__file__).read_text(encoding="utf-8")
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        public = [name for name in names if name.endswith("_complaints")]
        assert [name for name in public if mine.count(f"rules.{name}") < 2] == []
