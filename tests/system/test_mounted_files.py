"""A mounted ConfigMap with everything that an instance follows (issue 9 part 6; around 7, 14-16).

Kubernetes exchanges all files of a mount at once: each is a link into ``..data``, which is turned.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import grpc
import pytest

from mm.pb import mmesh
from tests.system.meshes import Instance, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

PREDICT = "mmesh.ExamplePredictor/predict"
SIZE = "SIZE_1000000_10_0"
LOADED = mmesh.ModelStatusInfoModelStatus.LOADED
#: What each is called in the log, and the last words of what is said of a bad one.
NAMES = ("type constraints file", "data-plane configuration file", "static models file")
HOLDS = "what it said before still holds"


def entry(model_id: str) -> dict[str, object]:
    return {"modelId": model_id, "modelInfo": {"type": "t", "path": SIZE}}


GOOD = {
    "type_constraints": {"t": {"required": ["here"]}},
    "dataplane_api_config": {"rpcConfigs": {PREDICT: {"idExtractionPath": [1]}}},
    "models": [entry("first")],
}
OTHER = {
    "type_constraints": {"t": {"required": ["nowhere"]}},
    "dataplane_api_config": {"allowOtherRpcs": True},
    "models": [entry("first"), entry("second")],
}
BAD = dict.fromkeys(GOOD, "{ nonsense")


def mount(directory: Path, version: str, files: Mapping[str, object]) -> None:
    """Exchange all of them as the kubelet does, and take the old ones away."""
    (directory / version).mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / version / name).write_text(text)
    data, old = directory / "..data", None
    if data.is_symlink():
        old = data.resolve()
    (directory / "..data_tmp").symlink_to(version)
    (directory / "..data_tmp").rename(data)
    for path in () if old is None else list(old.iterdir()):
        path.unlink()


def answers(instance: Instance, *, header: str = "", name: str = "") -> bool:
    """Whether a call is served that names the model in its message, or in a header."""
    metadata = [("mm-model-id", header)] if header else []
    try:
        instance.predict("", metadata=metadata, model_name=name)
    except grpc.RpcError:
        return False
    return True


def is_there(instance: Instance, model_id: str) -> bool:
    return bool(instance.status(model_id).status != mmesh.ModelStatusInfoModelStatus.NOT_FOUND)


def wait_looks(instance: Instance, count: int) -> None:
    """Have the files looked at so many times more: once a second."""
    until_ms = instance.statistics().uptime_ms + 1000 * (count + 1)
    eventually(lambda: instance.statistics().uptime_ms > until_ms, what="the files are looked at")


def test_all_files_of_a_mount_are_exchanged_and_bad_ones_change_nothing(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> None:
    with tempfile.TemporaryDirectory(prefix="mm-mount-") as name:
        directory = Path(name)
        for file in GOOD:
            (directory / file).symlink_to(f"..data/{file}")
        mount(directory, "..1", GOOD)
        settings = {
            "MM_DATAPLANE": dataplane,
            "MM_LABELS": "here",
            "MM_TYPE_CONSTRAINTS_PATH": str(directory / "type_constraints"),
            "MM_DATAPLANE_CONFIG_PATH": str(directory / "dataplane_api_config"),
            "MM_AUTO_REGISTER_MODEL_PATH": str(directory / "models"),
        }
        with mesh_of(kv_store, settings, new_service_name()) as mesh:
            only = mesh.add("only")
            assert answers(only, name="first", header="bogus"), "what the message says wins"

            mount(directory, "..2", BAD)
            for file in NAMES:
                only.serve.wait_line(f"{file} .*{HOLDS}")
            wait_looks(only, 3)
            for file in NAMES:
                told = [each for each in only.serve.lines if file in each and HOLDS in each]
                assert len(told) == 1, "once, however often it is looked at"
            assert answers(only, name="first", header="bogus"), "what the message says wins"
            status = only.register("x", SIZE, model_type="t", load_now=True, sync=True)
            assert status.status == LOADED

            seen = len(only.serve.lines)
            mount(directory, "..3", OTHER)
            for file in NAMES:
                only.serve.wait_line(f"{file} .* is in use", after=seen)
            eventually(lambda: not answers(only, name="first", header="bogus"))
            assert answers(only, header="first")
            eventually(partial(is_there, only, "second"), what="what the list names is registered")
            status = only.register("y", SIZE, model_type="t", load_now=True, sync=True)
            assert "There are no running instances that meet" in status.errors[0]
            assert answers(only, header="x"), "a copy that would not be allowed serves on"
