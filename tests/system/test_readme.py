"""The commands of the README and of the vmodels in docs/operating.md, run as they are written: from
a trained model to a blue/green exchange, and one that goes back; and a runtime of one's own.

Only the folder and the ports differ: a test may not take fixed ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mm import __version__
from mm.pb import mmesh
from tests.system.meshes import READY, Instance, channel_to
from tests.system.processes import Program

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
FOLDER, RUNTIME_PORT, CLIENTS = "/tmp/models", "8085", "localhost:8033"
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


def environment(**settings: str) -> dict[str, str]:
    """What a terminal has in which the commands are typed."""
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **settings}


def block(beginning: str, folder: Path) -> str:
    """Answer the block that stands behind words."""
    (script,) = (each for words, each in blocks().items() if words.startswith(beginning))
    assert "mm " in script or FOLDER in script or "word_counter" in script
    return script.replace(FOLDER, str(folder))


def start(script: str, runtime_port: str, **settings: str) -> Program:
    """Start a block whose last command goes on until it is stopped."""
    script = re.sub(r"\b(mm runtime|mm serve|python \S+\.py)", r"exec \1", script)
    process = subprocess.Popen(
        ["bash", "-euc", script.replace(RUNTIME_PORT, runtime_port)],
        env=environment(PYTHONUNBUFFERED="1", **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Program(script, process)


@contextmanager
def instance_with(runtime: Program, tmp_path: Path) -> Iterator[Instance]:
    """What the README starts, with a runtime; both end with this."""
    try:
        port = runtime.wait_line(r"listening on \S+:(\d+)").group(1)
        own = {"MM_SVC_GRPC_PORT": "0", "MM_PEER_PORT": "0"}
        own |= {"MM_PROBE_PORT": "NONE", "MM_PRESTOP_WAIT_PORT": "NONE"}
        serve = start(block("Start an instance", tmp_path), port, **own)
        try:
            ports = [int(each) for each in serve.wait_line(READY).groups()]
            with channel_to(ports[0]) as channel:
                yield Instance("", runtime, serve, ports[0], ports[1], channel)
        finally:
            serve.close()
    finally:
        runtime.close()


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    """The instance of the first examples."""
    with instance_with(start(block("Start a runtime", tmp_path), "0"), tmp_path) as found:
        yield found


def run(instance: Instance, folder: Path, beginning: str) -> str:
    """Run the block that stands behind words; answers what it prints."""
    script = block(beginning, folder).replace(CLIENTS, f"127.0.0.1:{instance.port}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=environment(MM_ADDRESS=f"127.0.0.1:{instance.port}"),
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


def python_block(words: str) -> str:
    """Answer the program in the README that has these words."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (program,) = (each for each in found if words in each)
    return program


def run_client(instance: Instance) -> str:
    """Run the client in Python; answers what it prints."""
    client = python_block(CLIENTS)
    done = subprocess.run(
        [sys.executable, "-c", client.replace(CLIENTS, f"127.0.0.1:{instance.port}")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tags_are_the_version() -> None:
    for name in ("README.md", "config/overlays/production/kustomization.yaml"):
        tags = re.findall(r"(?:newTag|\btag): ([\d.]+)", (ROOT / name).read_text("utf-8"))
        assert tags == [__version__], name


def test_the_commands_of_the_readme(instance: Instance, tmp_path: Path) -> None:
    run(instance, tmp_path, "Train something")
    assert run(instance, tmp_path, "Register the model").endswith("iris: NOT_LOADED\n")
    assert run_client(instance) == "[0 2]\nb'\\x08\\x01'\n"
    assert run(instance, tmp_path, "A vmodel is a name").startswith(
        "flowers: DEFINED\n  active iris: LOADED\n"
    )
    with Caller(instance) as caller:
        switched = run(instance, tmp_path, "Train a second one")
        back = run(instance, tmp_path, "Back again")
        # There is no iris-3.joblib: the script has to go back.
        failed = run(instance, tmp_path, "As a script, which goes back")
        assert run(instance, tmp_path, "What does not go on") == "", "nothing is in its way"
    assert switched.count("flowers: DEFINED\n  active iris-2: LOADED\n") == 2, "set, and get"
    assert back.startswith("flowers: DEFINED\n  active iris: LOADED\n")
    assert "TRANSITION_FAILED" in failed
    assert "\nflowers: DEFINED\n  active iris: LOADED\n" in failed
    assert instance.status("iris-3").status == mmesh.ModelStatusInfoModelStatus.NOT_FOUND
    assert caller.failures == []
    assert caller.calls_count > 0


def test_the_runtime_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "word_counter.py").write_text(
        python_block("WordCounter").replace(RUNTIME_PORT, "0"), encoding="utf-8"
    )
    script = block("Stop the other runtime", tmp_path)
    runtime = start(script.replace("word_counter", f"{tmp_path}/word_counter"), "0")
    with instance_with(runtime, tmp_path) as instance:
        printed = run(instance, tmp_path, "Start the instance again")
    assert printed.endswith("fruit: NOT_LOADED\n3.0 of the words are known\n")
