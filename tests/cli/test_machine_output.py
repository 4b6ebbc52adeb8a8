"""What programs read: each command's JSON has the fields and types of docs/command-line.md.

The document is read here, so neither can change without the other.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest

from mm.cli import errors
from mm.pb import mmesh
from tests.cli.fake_mesh import FakeMesh, run_command

DOC: Final = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"
TYPES: Final = {"text": str, "number": int, "truth": bool}
S, V = mmesh.ModelStatusInfoModelStatus, mmesh.VModelStatusInfoVModelStatus

COPY = mmesh.ModelStatusInfoModelCopyInfo(location="one", copy_status=S.LOADED, time=5)
INFO = mmesh.ModelStatusInfo(status=S.LOADED, errors=["e"], model_copy_infos=[COPY])
GONE = mmesh.ModelStatusInfo(status=S.NOT_FOUND)
LISTED = mmesh.ListedModel(
    model_id="m", type="t", path="p", status=INFO, last_used_ms=1, size_bytes=2, min_copies=3,
    pinned=True, references=1, vmodel_ids=["v"],
)  # fmt: skip
VMODEL = mmesh.VModelStatusInfo(
    status=V.TRANSITIONING, owner="o", active_model_id="m", target_model_id="n",
    active_model_status=INFO, target_model_status=INFO,
)  # fmt: skip
LISTED_VMODEL = mmesh.ListedVModel(
    vmodel_id="v", status=V.TRANSITIONING, owner="o", active_model_id="m", target_model_id="n"
)
ANSWERS: Final[dict[str, Any]] = {
    "getModelStatus": INFO,
    "listModels": mmesh.ListModelsResponse(models=[LISTED]),
    "watchModels": [mmesh.ListedModel(model_id="m", status=GONE)],
    "listVModels": mmesh.ListVModelsResponse(vmodels=[LISTED_VMODEL]),
    "watchVModels": [mmesh.ListedVModel(vmodel_id="v")],
    "unregisterModel": mmesh.UnregisterModelResponse(),
    "setModelPolicy": mmesh.ModelPolicyInfo(min_copies=2, pinned=True, ready_copies=1, unmet="no"),
    "setVModel": VMODEL,
    "getVModelStatus": VMODEL,
    "deleteVModel": mmesh.DeleteVModelResponse(),
}

#: Of a model and a vmodel, what each command tells.
STATUS_FIELDS: Final = ("id", "status", "errors", "copies")
COMMANDS: Final = (
    ("model register m", "A model", STATUS_FIELDS),
    ("model status m", "A model", STATUS_FIELDS),
    ("model ensure-loaded m", "A model", STATUS_FIELDS),
    ("model get m", "A model", None),
    ("model list", "A model", None),
    ("model policy m", "`mm model policy`", None),
    ("model unregister m", "`mm model unregister`", None),
    ("vmodel set v m", "A vmodel", None),
    ("vmodel get v", "A vmodel", None),
    ("vmodel list", "A vmodel", None),
    ("vmodel delete v", "`mm model unregister`", None),
)


def tables() -> dict[str, dict[str, str]]:
    """Answer the fields with their types, by the heading or command before the table."""
    found: dict[str, dict[str, str]] = {}
    title = ""
    for line in DOC.read_text(encoding="utf-8").splitlines():
        heading = re.match(r"## (.*)|Of (`[a-z ]+`)", line)
        if heading and (heading[1] or title.startswith(("What else", "`"))):
            title = heading[1] or heading[2]
        elif match := re.match(r"\| `(\w+)` \| (.*?) \|", line):
            found.setdefault(title, {})[match[1]] = match[2]
    return found


def check(value: Any, kind: str) -> None:
    """Fail unless a value is of a type of the document; what it has inside may be less."""
    if kind.startswith("list of "):
        assert isinstance(value, list)
        for each in value:
            check(each, {"copies": "copy"}.get(kind[8:], kind[8:]))
    elif kind in ("copy", "model"):
        fields = tables()[f"A {kind}"]
        assert value.keys() <= fields.keys()
        for name, inner in value.items():
            check(inner, fields[name])
    else:
        assert type(value) is TYPES[kind]


@pytest.fixture
def answering(mesh: FakeMesh) -> FakeMesh:
    mesh.answer, mesh.answers = INFO, dict(ANSWERS)
    return mesh


@pytest.mark.parametrize(("command", "title", "names"), COMMANDS)
def test_a_command_prints_the_fields_of_the_document(
    answering: FakeMesh, command: str, title: str, names: tuple[str, ...] | None
) -> None:
    _code, out, err = run_command(answering, *command.split(), "-o", "json")
    assert err == ""
    told = json.loads(out)
    fields = tables()[title]
    for value in told if isinstance(told, list) else [told]:
        assert tuple(value) == (names or tuple(fields)), "these, in the document's order"
        for name, inner in value.items():
            check(inner, fields[name])


def test_what_a_watch_prints(answering: FakeMesh) -> None:
    """As a list does; of what is gone there is no more than that it is."""
    models = run_command(answering, "model", "watch", "-o", "json")[1].splitlines()
    (listed,) = json.loads(run_command(answering, "model", "list", "-o", "json")[1])
    gone: dict[str, Any] = {"id": "m", "status": "NOT_FOUND", "errors": [], "copies": []}
    assert [json.loads(line) for line in models] == [listed, gone]
    vmodels = run_command(answering, "vmodel", "watch", "-o", "json")[1].splitlines()
    (listed,) = json.loads(run_command(answering, "vmodel", "list", "-o", "json")[1])
    empty = {"id": ""}
    gone = {"id": "v", "status": "NOT_FOUND", "owner": "", "active": empty, "target": empty}
    assert [json.loads(line) for line in vmodels] == [listed, gone]


def test_every_status_of_the_api_is_in_the_document() -> None:
    text = DOC.read_text(encoding="utf-8")
    for statuses in (S, V):
        for each in statuses:
            assert each.name
            assert re.search(rf"\b{each.name}\b", text)


def test_every_exit_code_is_in_the_document() -> None:
    codes = {c for name, c in vars(errors).items() if name.isupper() and isinstance(c, int)}
    documented = re.findall(r"^\| (\d+) \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(each) for each in documented} == codes | {0}
