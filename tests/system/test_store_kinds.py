"""`mm serve` on every kind of store: its own memory, an etcd of its own, etcd by file and list."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mm.edge.embedded_etcd import EmbeddedEtcd
from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.meshes import Instance, mesh_of
from tests.system.processes import eventually, is_running

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
SIZE = "SIZE_1000000_10_0"
END_TIMEOUT_S = 60.0


def use(instance: Instance) -> None:
    """A model's whole life."""
    assert instance.status("m").status == Status.NOT_FOUND
    assert instance.register("m", SIZE).status == Status.NOT_LOADED
    assert instance.predict("m").results[0].category == "classification for hello by model m"
    assert instance.status("m").status == Status.LOADED
    instance.predict("m", "test:purge-models")
    assert instance.predict("m").results[0].confidence == 1.0
    instance.unregister("m")
    assert instance.status("m").status == Status.NOT_FOUND


@pytest.mark.parametrize("kv_store", ["memory", "embedded"])
def test_alone(dataplane: str, kv_store: str) -> None:
    """No name is needed; nothing is left when it stops, and no other process."""
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, "") as mesh:
        del mesh.settings["MM_SERVICE_NAME"], mesh.settings["MM_ADVERTISE_ADDRESS"]
        instance = mesh.add("alone")
        assert f"KV_STORE={kv_store}: " in instance.serve.output()
        use(instance)
        children = child_processes(instance.serve.process.pid)
        assert len(children) == (1 if kv_store == "embedded" else 0)
        instance.serve.terminate()
        assert instance.serve.wait_end(END_TIMEOUT_S) == 0
        assert not any(map(is_running, children))


def test_embedded_etcd_dies_with_its_instance(dataplane: str) -> None:
    with mesh_of("embedded", {"MM_DATAPLANE": dataplane}, "embedded") as mesh:
        instance = mesh.add("alone")
        (etcd,) = child_processes(instance.serve.process.pid)
        instance.serve.kill()
        eventually(lambda: not is_running(etcd))


def test_json_file_and_root_prefix(
    dataplane: str, etcd: EmbeddedEtcd, keys: Keys, tmp_path: Path
) -> None:
    """As the Java mesh is configured: a file with endpoints, keys below a root of their own."""
    file = tmp_path / "etcd.json"
    file.write_text(json.dumps({"endpoints": f"http://{etcd.endpoint}", "root_prefix": "/root"}))
    with mesh_of(f"etcd:{file}", {"MM_DATAPLANE": dataplane}, "by-file") as mesh:
        instance = mesh.add("only")
        instance.register("m", SIZE, load_now=True, sync=True)
        assert list(keys.table("/root/tas-runtime/by-file/registry/")) == ["m"]
        assert list(keys.table("/root/tas-runtime/by-file/instances/")) == ["only"]
        assert keys.table("/tas-runtime/by-file/") == {}


def test_several_endpoints_some_of_them_dead(
    dataplane: str, etcd: EmbeddedEtcd, new_service_name: Callable[[], str]
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.create_server(("127.0.0.1", 0)) as closed,
    ):
        ports = [server.getsockname()[1] for server in (silent, closed)]
        closed.close()
        endpoints = ",".join([*(f"127.0.0.1:{port}" for port in ports), str(etcd.endpoint)])
        kv_store = f"etcd:{endpoints}"
        with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
            use(mesh.add("only"))


def child_processes(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in children for child in re.findall(r"\d+", file.read_text())]
