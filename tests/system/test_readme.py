"""The commands of the README and of the vmodels in docs/operating.md, run as they are written: from
a trained model to a blue/green exchange, and one that goes back.

Only the folder and the instance's address differ: a test may not take fixed ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mm.pb import mmesh
from tests.system.meshes import Instance, Mesh, mesh_of

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "/tmp/models"
COMMAND_TIMEOUT_S = 120.0


def blocks() -> dict[str, str]:
    """Answer the console blocks as scripts, by the words before them."""
    files = ("README.md", "docs/operating.md")
    text = "\n\n".join((ROOT / each).read_text(encoding="utf-8") for each in files)
    found = {}
    for match in re.finditer(r"([^\n]+)\n\n```console\n(.*?)```", text, re.DOTALL):
        # What a here-document holds has no prompt.
        found[match[1]] = re.sub(r"^\$ ", "", match[2], flags=re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def mesh(
    kv_store: str, new_service_name: Callable[[], str], tmp_path_factory: Any
) -> Iterator[Mesh]:
    root = tmp_path_factory.mktemp("models")
    with mesh_of(kv_store, {}, new_service_name()) as mesh:
        mesh.add_sklearn("reader", root, ["--capacity", "64MiB"])
        mesh.settings["folder"] = str(root)
        yield mesh


def run(mesh: Mesh, beginning: str) -> str:
    """Run the block that stands behind words; answers what it prints."""
    (script,) = (each for words, each in blocks().items() if words.startswith(beginning))
    assert "mm " in script or FOLDER in script
    env = {
        **os.environ,
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MM_ADDRESS": f"127.0.0.1:{mesh[0].port}",
    }
    script = script.replace(FOLDER, mesh.settings["folder"])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=env,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Caller:
    """Calls the vmodel all the time; keeps what failed."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._over = threading.Event()
        self.calls_count = 0
        self.failures: list[Exception] = []
        self._thread = threading.Thread(target=self._call_on)

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        self._thread.join(COMMAND_TIMEOUT_S)

    def _call_on(self) -> None:
        ready: Any = self._instance.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelReady"
        )
        while not self._over.wait(0.01):
            try:
                assert (
                    ready(b"\x0a\x07flowers", metadata=[("mm-vmodel-id", "flowers")], timeout=60)
                    == b"\x08\x01"
                )
                self.calls_count += 1
            except Exception as exc:
                self.failures.append(exc)
                return


def test_the_commands_of_the_readme(mesh: Mesh) -> None:
    run(mesh, "Train something")
    assert run(mesh, "Register the model").endswith("iris: NOT_LOADED\n")
    assert run(mesh, "A vmodel is a name").startswith("flowers: DEFINED\n  active iris: LOADED\n")
    with Caller(mesh[0]) as caller:
        switched = run(mesh, "Train a second one")
        back = run(mesh, "Back again")
        # There is no iris-3.joblib: the script has to go back.
        failed = run(mesh, "As a script, which goes back")
        assert run(mesh, "What does not go on") == "", "nothing is in its way"
    assert switched.count("flowers: DEFINED\n  active iris-2: LOADED\n") == 2, "set, and get"
    assert back.startswith("flowers: DEFINED\n  active iris: LOADED\n")
    assert "TRANSITION_FAILED" in failed
    assert "\nflowers: DEFINED\n  active iris: LOADED\n" in failed
    assert mesh[0].status("iris-3").status == mmesh.ModelStatusInfoModelStatus.NOT_FOUND
    assert caller.failures == []
    assert caller.calls_count > 0
