"""The data-plane configuration from a file that changes while calls run (around 7.1, 15, 23)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest

from mm.pb import mmesh
from tests.system.meshes import Instance, Mesh, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

PREDICT = "mmesh.ExamplePredictor/predict"
MULTI_PREDICT = "mmesh.ExamplePredictor/multiPredict"
NAME = "data-plane configuration file"
IN_MESSAGE = {"rpcConfigs": {PREDICT: {"idExtractionPath": [1]}}}


@dataclass(frozen=True, slots=True)
class World:
    """Two instances with one ConfigMap, mounted as Kubernetes does it."""

    mesh: Mesh
    directory: Path

    def wait_told(self, pattern: str, change: Callable[[], object]) -> None:
        """Make a change to the file, and wait until every instance has said this of it."""
        seen = [len(each.serve.lines) for each in self.mesh.instances]
        change()
        for each, after in zip(self.mesh.instances, seen, strict=True):
            each.serve.wait_line(f"{NAME} .*{pattern}", after=after)

    def use(self, version: str, config: dict[str, object]) -> None:
        """Swap the ConfigMap's content, and wait until it is in use everywhere."""
        self.wait_told("is in use", lambda: swap(self.directory, version, json.dumps(config)))


def swap(directory: Path, version: str, content: str) -> None:
    """Change the file as Kubernetes does in a mounted ConfigMap."""
    (directory / version).mkdir()
    (directory / version / "dataplane_api_config").write_text(content)
    (directory / "..data_tmp").symlink_to(version)
    (directory / "..data_tmp").rename(directory / "..data")


@pytest.fixture(scope="module")
def world(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="mm-dataplane-") as name:
        directory = Path(name)
        path = directory / "dataplane_api_config"
        path.symlink_to("..data/dataplane_api_config")
        settings = {"MM_DATAPLANE": dataplane, "MM_DATAPLANE_CONFIG_PATH": str(path)}
        with mesh_of(kv_store, settings, new_service_name()) as mesh:
            swap(directory, "..first", json.dumps(IN_MESSAGE))
            mesh.add_all("file-a", "file-b")
            mesh[0].register("m", "SIZE_1000000_10_0", load_now=True, sync=True)
            yield World(mesh, directory)


def predict(instance: Instance, *, header: str = "", name: str = "") -> str:
    metadata = [("mm-model-id", header)] if header else []
    reply = instance.predict("", metadata=metadata, model_name=name)
    return reply.results[0].category


def multi_predict(instance: Instance) -> object:
    return instance.call(
        f"/{MULTI_PREDICT}",
        mmesh.PredictRequest(text="hello"),
        mmesh.MultiPredictResponse,
        [("mm-model-id", "m")],
    )


NO_ID = (grpc.StatusCode.INVALID_ARGUMENT, "must include mm-model-id header")
NOT_SERVED = (grpc.StatusCode.UNIMPLEMENTED, "")


def outcome(call: Callable[[], str]) -> object:
    try:
        return call()
    except grpc.RpcError as exc:
        return exc.code(), exc.details()


def becomes(expected: object, call: Callable[[], str]) -> None:
    """See what a call comes to. The wire's threads hear of a change a moment after it is said."""
    eventually(lambda: outcome(call) == expected)


def test_the_file_decides_and_its_changes_hold_without_a_restart(world: World) -> None:
    expected = "classification for hello by model m"
    for each in world.mesh.instances:
        assert predict(each, name="m", header="bogus") == expected
        assert refusal(partial(multi_predict, each)) == NOT_SERVED

    world.use("..others", {"allowOtherRpcs": True})
    for each in world.mesh.instances:
        becomes(NO_ID, partial(predict, each, name="m"))
        assert predict(each, header="m", name="bogus") == expected
        multi_predict(each)

    # Whatever was open before, `{}` closes everything; the management API is not its affair.
    world.use("..nothing", {})
    for each in world.mesh.instances:
        becomes(NOT_SERVED, partial(predict, each, header="m"))
        assert each.status("m").status == mmesh.ModelStatusInfoModelStatus.LOADED
    world.use("..again", IN_MESSAGE)


def test_a_bad_file_changes_nothing_and_is_named(world: World) -> None:
    path = world.directory / "dataplane_api_config"
    world.wait_told(
        r"trailing characters \(line 2, column 3\); what it said before still holds",
        lambda: swap(world.directory, "..bad", "{\n}}"),
    )
    for each in world.mesh.instances:
        assert predict(each, name="m").endswith("by model m")
    world.wait_told("no such file or directory", path.unlink)
    assert predict(world.mesh[0], name="m").endswith("by model m")
    # A plain file in its place, edited in place.
    world.wait_told("is in use", lambda: path.write_text('{"allowOtherRpcs": true}'))
    becomes("classification for hello by model m", partial(predict, world.mesh[1], header="m"))
    world.wait_told("is in use", lambda: path.write_text(json.dumps(IN_MESSAGE)))
    becomes("classification for hello by model m", partial(predict, world.mesh[1], name="m"))
