"""`mm vmodel` and `mm model` as scripts use them, against three instances: whoever is asked, what
is watched is the whole mesh (docs/command-line.md).
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import groupby
from typing import Any

import pytest

from tests.system.meshes import Instance, Mesh, mesh_of
from tests.system.processes import EVENTUALLY_S, Program, eventually

pytestmark = pytest.mark.system

#: Loads take so long that a watch tells of them.
SIZE = "SIZE_1000000_300_0"


@pytest.fixture(scope="module")
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all("cli-a", "cli-b", "cli-c")
        mesh.wait_acquainted()
        yield mesh


def start(instance: Instance, *args: str) -> Program:
    """Start `mm ARGS` against an instance."""
    settings = {"MM_ADDRESS": f"127.0.0.1:{instance.port}"}
    return Program.forked(" ".join(args[:2]), "mm", *args, settings=settings)


def run(instance: Instance, *args: str) -> tuple[int, str]:
    """Answer the exit code and the output of a command."""
    with closing(start(instance, *args)) as program:
        code = program.wait_end(2 * EVENTUALLY_S)
        return code, program.output()


def told(watch: Program) -> list[dict[str, Any]]:
    """Answer what a watch has printed."""
    return [json.loads(line) for line in list(watch.lines) if line.startswith("{")]


def states(watch: Program) -> list[tuple[str, str, str]]:
    return [(each["status"], each["active"]["id"], each["target"]["id"]) for each in told(watch)]


def is_within(found: Sequence[object], whole: Sequence[object]) -> bool:
    """Whether something is in this order, with nothing else, but perhaps not all of it."""
    rest = iter(whole)
    return all(each in rest for each in found)


def test_watches_at_every_instance(mesh: Mesh) -> None:
    """A life of a vmodel and of its models, from before they are there until they are gone. Changes
    may be told as one if they come while nobody reads; how each command left it, never.
    """
    options = ("--type", "example", "--auto-delete", "--wait")
    first, second, broken = (f"flower-{name}" for name in ("1", "2", "broken"))
    steps: list[tuple[tuple[str, ...], int, list[tuple[str, str, str]]]] = [
        (("set", "flowers", first, "--path", SIZE, *options), 0, [("DEFINED", first, first)]),
        (
            ("set", "flowers", second, "--path", SIZE, *options),
            0,
            [("TRANSITIONING", first, second), ("DEFINED", second, second)],
        ),
        (
            ("set", "flowers", broken, "--path", "FAIL_no such file", *options),
            1,
            # Tried again and again, as time goes by.
            [("TRANSITIONING", second, broken), ("TRANSITION_FAILED", second, broken)] * 9,
        ),
        (("set", "flowers", second, "--wait"), 0, [("DEFINED", second, second)]),
        (("delete", "flowers"), 0, [("NOT_FOUND", "", "")]),
    ]
    with ExitStack() as stack:

        def watching(*args: str) -> list[Program]:
            return [
                stack.enter_context(closing(start(each, *args, "-o", "json")))
                for each in mesh.instances
            ]

        vmodels = watching("vmodel", "watch", "flowers")
        models = watching("model", "watch", first)
        for watch in (*vmodels, *models):
            watch.wait_line("no v?model flower.* yet")
        whole: list[tuple[str, str, str]] = []
        for number, (args, code, expected) in enumerate(steps):
            found, output = run(mesh[number % 3], "vmodel", *args)
            assert found == code, output
            whole += expected
            for watch in vmodels:
                eventually(partial(_has_told, watch, expected[-1]), what=f"{args} at {watch.name}")
                assert is_within(states(watch), whole), states(watch)
        for watch in models:
            eventually(partial(_is_gone, watch), what="the first model is gone")
            seen = [status for status, _ in groupby(each["status"] for each in told(watch))]
            assert is_within(seen, ["NOT_LOADED", "LOADING", "LOADED", "NOT_FOUND"]), seen
            assert "LOADED" in seen
        interrupt_and_lose(mesh, vmodels)


def _has_told(watch: Program, state: tuple[str, str, str]) -> bool:
    return states(watch)[-1:] == [state]


def _is_gone(watch: Program) -> bool:
    return any(each["status"] == "NOT_FOUND" for each in told(watch))


def interrupt_and_lose(mesh: Mesh, watches: Sequence[Program]) -> None:
    """A watch ends by Ctrl-C, and when its instance dies, each with one exit code and no trace."""
    watches[0].process.send_signal(signal.SIGINT)
    assert watches[0].wait_end(EVENTUALLY_S) == 130
    mesh[2].kill()
    assert watches[2].wait_end(EVENTUALLY_S) == 6
    assert watches[2].complaint.startswith(f"mm: the connection to 127.0.0.1:{mesh[2].port} broke")
    for watch in (watches[0], watches[2]):
        assert "Traceback" not in watch.output()
    assert watches[1].process.poll() is None
