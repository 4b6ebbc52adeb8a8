"""Which table a process takes: ``MM_TABLE`` decides, and says so when it cannot.

Each case is a Python of its own, because the choice is made once, at import.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: As on a machine where the extension was not built.
WITHOUT_EXTENSION = "import sys; sys.modules['mm._lru'] = None\n"
#: As after a `git pull` without a new build.
WITH_OLDER_EXTENSION = """
import sys, types
import mm
mm._lru = sys.modules["mm._lru"] = types.ModuleType("mm._lru")
mm._lru.Table = type("Table", (), {"put": None})
"""
SERVE = "from mm.cli.main import app; app(['serve'])"
TELL = "from mm import table; print(table.IMPLEMENTATION, table.Table.__module__)"


def choose(choice: str | None, program: str = TELL) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MM_TABLE"}
    environment |= {"KV_STORE": "memory", "INTERNAL_GRPC_PORT": "1", "MM_PROBE_PORT": "0"}
    environment |= {"MM_SVC_GRPC_PORT": "0", "MM_PEER_PORT": "0", "MM_PRESTOP_WAIT_PORT": "0"}
    if choice is not None:
        environment["MM_TABLE"] = choice
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("choice", "taken"),
    [
        (None, "extension mm._lru"),
        ("", "extension mm._lru"),
        ("extension", "extension mm._lru"),
        ("python", "python mm._lru_py"),
    ],
)
def test_the_variable_decides(choice: str | None, taken: str) -> None:
    assert choose(choice).stdout.strip() == taken


def test_the_twin_stands_in_where_the_extension_is_not_built() -> None:
    done = choose(None, WITHOUT_EXTENSION + TELL)
    assert done.stdout.strip() == "python mm._lru_py", done.stderr


def test_a_demand_for_the_extension_is_not_met_by_the_twin() -> None:
    done = choose("extension", WITHOUT_EXTENSION + TELL)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr
    assert "mm._lru" in done.stderr


def test_another_word_is_refused_with_what_is_allowed() -> None:
    done = choose("fast", SERVE)
    assert done.returncode == 2
    allowed = "'python', 'extension' and unset"
    assert done.stderr == f"mm: MM_TABLE is 'fast', allowed are {allowed}\n"


def test_the_wire_does_without_the_twin() -> None:
    done = choose("python", SERVE)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("mm: MM_DATAPLANE=wire, the default, reads the table of the extension")
    assert line.endswith("or set MM_DATAPLANE=python")
    assert "Traceback" not in done.stderr


def test_an_older_extension_is_told_in_one_line_before_anything_is_served() -> None:
    done = choose(None, WITH_OLDER_EXTENSION + SERVE)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("mm: the extension mm._lru is older than the program (it lacks add, ")
    assert line.endswith("): run `make develop`")
    assert " put," not in line
