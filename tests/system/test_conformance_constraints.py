"""Type constraints in real processes (around 14, 22.2, 23; interop 1.4)."""

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
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, mesh_of, record_of, refusal

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
PATH = "SIZE_1000000_20_0"


def text_for(model_type: str, *labels: str) -> str:
    return (
        "There are no running instances that meet the label requirements of type"
        f" {model_type}: [{', '.join(labels)}]"
    )


def holders(instance: Instance, model_id: str) -> list[str]:
    return [copy.location for copy in instance.status(model_id).model_copy_infos]


def load(instance: Instance, model_id: str, model_type: str) -> list[str]:
    """Register a model, load it and answer where it is."""
    status = instance.register(model_id, PATH, model_type=model_type, load_now=True, sync=True)
    assert (status.status, status.errors) == (Status.LOADED, [])
    return holders(instance, model_id)


def test_error_propagation(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> None:
    """Around 22.2: the runtime says UNAVAILABLE, and nobody makes a copy where none may be."""
    settings = {
        "MM_DATAPLANE": dataplane,
        "MM_TYPE_CONSTRAINTS": json.dumps({"my-type-1": {"required": ["my-label-1"]}}),
    }
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        first = mesh.add("one", settings={"MM_LABELS": "my-label-1"})
        second = mesh.add("two")
        assert load(second, "m", "my-type-1") == ["one"]
        assert second.predict("m").results[0].confidence == 1.0
        text = "test:error:code=UNAVAILABLE:message=Fake prediction error message"
        for instance in (first, second):
            code, message = refusal(partial(instance.predict, "m", text))
            assert (code, message) == (
                grpc.StatusCode.UNAVAILABLE,
                "Fake prediction error message",
            )
        status = first.status("m")
        assert status.status == Status.LOADED
        assert [copy.location for copy in status.model_copy_infos] == ["one"]


@dataclass(frozen=True, slots=True)
class World:
    """Three instances: "plain" without labels, "gpu", and "ssd", which has "gpu" as well."""

    mesh: Mesh
    plain: Instance
    gpu: Instance
    ssd: Instance
    directory: Path

    @property
    def path(self) -> Path:
        return self.directory / "type_constraints"

    def wait_in_use(self, change: Callable[[], object]) -> None:
        """Make a change to the file, and wait until every instance has taken it over."""
        seen = [len(each.serve.lines) for each in self.mesh.instances]
        change()
        for each, after in zip(self.mesh.instances, seen, strict=True):
            each.serve.wait_line(r"type constraints file .* is in use", after=after)


def swap(directory: Path, version: str, types: dict[str, object]) -> None:
    """Change the file as Kubernetes does in a mounted ConfigMap."""
    (directory / version).mkdir()
    (directory / version / "type_constraints").write_text(json.dumps(types))
    (directory / "..data_tmp").symlink_to(version)
    (directory / "..data_tmp").rename(directory / "..data")


REJECT_OTHERS = {"required": ["_no_runtime"]}
FIRST: dict[str, object] = {
    "needs-gpu": {"required": ["gpu"]},
    "needs-both": {"required": ["ssd", "gpu", "gpu"]},
    "likes-ssd": {"required": ["gpu"], "preferred": ["ssd", "gpu"]},
    "_default": REJECT_OTHERS,
}


@pytest.fixture(scope="module")
def world(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="mm-constraints-") as name:
        directory = Path(name)
        settings = {
            "MM_DATAPLANE": dataplane,
            "MM_TYPE_CONSTRAINTS_PATH": str(directory / "type_constraints"),
        }
        (directory / "type_constraints").symlink_to("..data/type_constraints")
        with mesh_of(kv_store, settings, new_service_name()) as mesh:
            swap(directory, "..first", FIRST)
            plain = mesh.add("plain")
            gpu = mesh.add("gpu", settings={"MM_LABELS": "gpu"})
            ssd = mesh.add("ssd", settings={"MM_LABELS": " ssd, gpu"})
            yield World(mesh, plain, gpu, ssd, directory)


def test_models_go_where_their_type_may(world: World) -> None:
    for number, instance in enumerate(world.mesh.instances):
        assert load(instance, f"both-{number}", "needs-both") == ["ssd"]
        assert load(instance, f"gpu-{number}", "needs-gpu")[0] in ("gpu", "ssd")
        assert world.plain.predict(f"both-{number}").results[0].confidence == 1.0


def test_preferred_labels_come_first(world: World) -> None:
    for number, instance in enumerate(world.mesh.instances):
        assert load(instance, f"likes-{number}", "likes-ssd") == ["ssd"]


def test_a_type_that_is_only_needed_elsewhere_keeps_off(world: World) -> None:
    """Inferred: "ssd" may host everything, so what "gpu" can host, too, goes to "gpu"."""
    for number in range(3):
        assert load(world.plain, f"inferred-{number}", "needs-gpu") == ["gpu"]


def test_unlisted_types_are_rejected_by_an_impossible_default(world: World, keys: Keys) -> None:
    expected = text_for("mt:sklearn:0|pv:v2", "_no_runtime")
    for number, instance in enumerate(world.mesh.instances):
        model_id = f"rejected-{number}"
        status = instance.register(
            model_id, PATH, model_type="mt:sklearn:0|pv:v2", load_now=True, sync=True
        )
        assert status.status == Status.LOADING_FAILED
        assert (status.errors[0], status.model_copy_infos) == (expected, [])
        assert instance.ensure_loaded(model_id).errors[0] == expected
        code, message = refusal(partial(instance.predict, model_id))
        assert (code, message) == (grpc.StatusCode.FAILED_PRECONDITION, expected)
        record = record_of(keys.table(world.mesh.prefix("registry")), model_id)
        assert not {"failedIn", "fails", "instanceIds"} & set(record), "nobody has failed"


def test_a_vmodel_of_a_type_that_nobody_may_load(world: World, keys: Keys) -> None:
    """What the controller of modelmesh-serving asks for every three seconds, and how it decides
    that no runtime supports the model: by the first error, verbatim (interop 1.4).
    """
    expected = text_for("mt:unheard-of", "_no_runtime")
    request = mmesh.SetVModelRequest(
        v_model_id="unheard-of",
        owner="isvc",
        target_model_id="unheard-of__isvc-1",
        model_info=mmesh.ModelInfo(type="mt:unheard-of", path=PATH),
        auto_delete_target_model=True,
        load_now=True,
    )
    for instance in (*world.mesh.instances, world.plain):
        reply = instance.call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)
        assert reply.status == mmesh.VModelStatusInfoVModelStatus.DEFINED
        active = reply.active_model_status
        assert active is not None
        assert (active.status, active.errors) == (Status.LOADING_FAILED, [expected])
        assert active.model_copy_infos == []
    record = record_of(keys.table(world.mesh.prefix("registry")), "unheard-of__isvc-1")
    assert not {"failedIn", "fails", "instanceIds"} & set(record), "nobody has failed"


def test_changes_of_the_file_hold_without_a_restart(world: World) -> None:
    """Kubernetes' swap, a rename, an edit in place; and copies stay where they are."""
    second: dict[str, object] = {"moves": {"required": ["ssd"]}}
    world.wait_in_use(lambda: swap(world.directory, "..second", second))
    assert load(world.plain, "moves-1", "moves") == ["ssd"]

    def rename() -> None:
        new = world.directory / "new"
        new.write_text(json.dumps({"moves": {"required": ["nowhere", "ssd"]}}))
        new.rename(world.path)

    world.wait_in_use(rename)
    assert not world.path.is_symlink()
    status = world.gpu.register("moves-2", PATH, model_type="moves", load_now=True, sync=True)
    assert status.errors == [text_for("moves", "nowhere", "ssd")]
    assert world.gpu.predict("moves-1").results[0].confidence == 1.0, "a copy keeps serving"
    assert holders(world.gpu, "moves-1") == ["ssd"]
    edited = {"moves": {"required": ["gpu"]}, "other": {"required": ["ssd"]}}
    world.wait_in_use(lambda: world.path.write_text(json.dumps(edited)))
    assert world.gpu.ensure_loaded("moves-2", sync=True).status == Status.LOADED
    # "gpu" is asked; but the leader has it loaded, too, now that it may be, and while "gpu" has its
    # hands full that is elsewhere.
    assert set(holders(world.gpu, "moves-2")) <= {"gpu", "ssd"}


def test_a_bad_file_changes_nothing_and_is_named(world: World) -> None:
    world.wait_in_use(lambda: world.path.write_text(json.dumps({"t": {"required": ["ssd"]}})))
    seen = [len(each.serve.lines) for each in world.mesh.instances]
    world.path.write_text('{"t": {"required": "plain"}}')
    for each, after in zip(world.mesh.instances, seen, strict=True):
        line = each.serve.wait_line(r"type constraints file (\S+): (.*)", after=after)
        assert line.group(1) == str(world.path)
        assert "Expected `array | null`, got `str`" in line.group(2)
    assert load(world.plain, "after-bad", "t") == ["ssd"]
    world.wait_in_use(lambda: world.path.write_text("{}"))
