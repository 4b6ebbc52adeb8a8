"""Models that a deployment names itself, with real processes (around 16, 23)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mm.pb import mmesh
from tests.system.meshes import READY, Instance, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

END_TIMEOUT_S = 60.0
CANNOT_START = 1
Status = mmesh.ModelStatusInfoModelStatus


def entry(model_id: str, path: str = "SIZE_1000000_10_0", **rest: object) -> dict[str, Any]:
    info = {"type": "example", "path": path, "key": "top secret"}
    return {"modelId": model_id, "modelInfo": info, **rest}


def is_known(instance: Instance, model_id: str) -> bool:
    return instance.status(model_id).status == Status.NOT_LOADED


def is_unknown(instance: Instance, model_id: str) -> bool:
    return instance.status(model_id).status == Status.NOT_FOUND


def answering(instance: Instance, vmodel_id: str) -> str:
    """Answer the model that answers a call of a vmodel."""
    reply = instance.predict("", metadata=[("mm-vmodel-id", vmodel_id)])
    return reply.results[0].category.removeprefix("classification for hello by model ")


def is_answered_by(instance: Instance, vmodel_id: str, model_id: str) -> bool:
    return answering(instance, vmodel_id) == model_id


def test_registered_before_clients_are_let_in_and_as_the_file_changes(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str], tmp_path: Path
) -> None:
    file = tmp_path / "models.json"
    first = [
        entry("of file", ensureLoaded=True),
        entry("idle"),
        entry("red", vModelId="flower", ensureLoaded=True),
        entry("old", vModelId="kept", retainAfterTransition=True),
    ]
    file.write_text(json.dumps(first))
    settings = {
        "MM_DATAPLANE": dataplane,
        "MM_AUTO_REGISTER_MODEL_PATH": str(file),
        "MM_AUTO_REGISTER_MODELS": json.dumps([entry("of variable", ensureLoaded=True)]),
    }
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        mesh.add_all("static-a", "static-b")
        for each in mesh.instances:
            log = each.serve.output()
            assert log.index("5 static models are registered, 3 loaded") < log.index("ready: inst")
            assert each.status("of file").status == Status.LOADED
            assert each.status("of variable").status == Status.LOADED
            assert each.status("idle").status == Status.NOT_LOADED
            assert answering(each, "flower") == "red"
        second = [
            entry("idle", "another path"),
            entry("added"),
            entry("blue", vModelId="flower", ensureLoaded=True),
            entry("new", vModelId="kept"),
        ]
        file.write_text(json.dumps(second))
        for each in mesh.instances:
            each.serve.wait_line(r'entry 1 of .*models\.json \(model "idle"\) is skipped: Model al')
            each.serve.wait_line('model "of file" is named no more')
            eventually(partial(is_known, each, "added"))
            assert each.status("of file").status == Status.LOADED
            eventually(partial(is_answered_by, each, "flower", "blue"))
            eventually(partial(is_answered_by, each, "kept", "new"))
            eventually(partial(is_unknown, each, "red"), what="it went with its last reference")
            assert each.status("old").status == Status.NOT_LOADED, "it was to be retained"
            assert "secret" not in each.serve.output()


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("FAIL_out of luck", r'entry 1 of MM_AUTO_REGISTER_MODELS (model "m") cannot be loaded: '),
        ("", "MM_AUTO_REGISTER_MODELS is not valid: entry 1 of MM_AUTO_REGISTER_MODELS"),
    ],
)
def test_a_start_that_fails_says_which_entry_it_was(
    kv_store: str, new_service_name: Callable[[], str], path: str, complaint: str
) -> None:
    models = [entry("m", path, ensureLoaded=True)] if path else [{"modelId": "m"}]
    with mesh_of(kv_store, {}, new_service_name()) as mesh:
        socket_path = mesh.socket_path("static")
        runtime = mesh.start_runtime("static", ["example", f"unix://{socket_path}"])
        serve = mesh.start_serve(
            "static",
            {
                "INTERNAL_GRPC_SOCKET_PATH": socket_path,
                "MM_AUTO_REGISTER_MODELS": json.dumps(models),
            },
        )
        assert serve.wait_end(END_TIMEOUT_S) == (CANNOT_START if path else 2)
        assert serve.complaint.startswith(f"mm: {complaint}")
        assert "secret" not in serve.output()
        assert READY not in serve.output()
        runtime.terminate()
