"""An etcd that is full (NOSPACE) under real instances, and room made with the operator's commands.

What an operator types is taken out of ``docs/operating.md`` and run as it stands there.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest

from mm.edge.etcd_process import EtcdProcess, find_binary
from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

MODELS = [f"loaded-{number}" for number in range(4)]
OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"
Code = grpc.StatusCode
#: A whole number of pages of etcd's database: a put of ``FILLING_BYTES``, which etcd counts as a
#: kilobyte more, is refused when they are used up and not before. Until then etcd takes what only
#: deletes, though it takes nothing else once a put has been refused.
QUOTA_BYTES = 128 * 4096
FILLING_BYTES = 2_000


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    with tempfile.TemporaryDirectory(prefix="mm-full-") as directory:
        etcd = EtcdProcess(find_binary(), Path(directory), [f"--quota-backend-bytes={QUOTA_BYTES}"])
        etcd.start()
        yield etcd
        etcd.stop()


@pytest.fixture
def mesh(etcd: EtcdProcess, dataplane: str) -> Iterator[Mesh]:
    store = f"etcd:http://{etcd.endpoint}"
    with mesh_of(store, {"MM_DATAPLANE": dataplane}, "full") as mesh:
        mesh.add_all("one", "two")
        yield mesh


def fill(keys: Keys) -> None:
    """Change a key until there is no room for its past."""
    for _ in range(2_000):
        try:
            keys.put("/filling", b"x" * FILLING_BYTES)
        except grpc.RpcError:
            return
    raise AssertionError("it did not fill")


def make_room(etcd: EtcdProcess) -> None:
    """Do what the manual says."""
    section = OPERATING.read_text().partition("## A full etcd\n")[2].partition("\n## ")[0]
    commands = next(
        block for block in re.findall(r"```\n(.*?)```", section, re.DOTALL) if "disarm" in block
    )
    settings = {
        **os.environ,
        "ETCDCTL_ENDPOINTS": str(etcd.endpoint),
        "PATH": f"{find_binary().parent}:{os.environ['PATH']}",
    }
    command = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=settings
    )
    assert done.returncode == 0, done.stderr
    assert "alarm:NOSPACE" in done.stdout


@contextmanager
def calling(mesh: Mesh) -> Iterator[Counter[str]]:
    """Call all loaded models at both instances, over and over."""
    answers: Counter[str] = Counter()
    over = threading.Event()

    def call(instance: Instance) -> None:
        while not over.wait(0.05):
            for model_id in MODELS:
                try:
                    instance.predict(model_id)
                    answers["OK"] += 1
                except grpc.RpcError as exc:
                    answers[f"{exc}"] += 1

    with ThreadPoolExecutor() as pool:
        callers = [pool.submit(call, instance) for instance in mesh.instances]
        try:
            yield answers
        finally:
            over.set()
        for caller in callers:
            caller.result()


def is_full(instance: Instance) -> bool:
    return bool(instance.statistics().store_out_of_space)


def test_hits_go_on_writes_are_refused_and_room_is_all_it_takes(
    mesh: Mesh, etcd: EtcdProcess
) -> None:
    one, two = mesh.instances
    keys = Keys(str(etcd.endpoint))
    for model_id in MODELS:
        one.register(model_id, load_now=True, sync=True)
    one.register("cold")
    eventually(lambda: two.statistics().registered_models == len(MODELS) + 1, what="both know")
    with calling(mesh) as answers:
        fill(keys)
        refused: list[Callable[[], object]] = [
            partial(one.register, "new"),
            partial(two.register, "newer"),
            partial(one.predict, "cold"),
            partial(two.predict, "cold"),
        ]
        for call in refused:
            code, text = refusal(call)
            assert (code, text.rpartition(": ")[2]) == (Code.UNAVAILABLE, "etcd is out of space")
        assert one.status("loaded-0").status == mmesh.ModelStatusInfoModelStatus.LOADED
        for instance in mesh.instances:
            assert is_full(instance)
            assert instance.statistics().store_connected, "this is another fault"
            instance.serve.wait_line("etcd is out of space: no write is taken until somebody")
        count = answers.total()
        eventually(lambda: answers.total() >= count + 20, what="hits go on")

        make_room(etcd)
        for instance in mesh.instances:
            # Nobody asks for anything: they find out by themselves.
            eventually(lambda i=instance: not is_full(i), what="it goes on")  # type: ignore[misc]
            instance.serve.wait_line("etcd has room again")
        one.register("new")
        two.predict("cold")
    assert set(answers) == {"OK"}, answers
    for instance in mesh.instances:
        assert "Traceback" not in instance.serve.output()
    keys.close()
