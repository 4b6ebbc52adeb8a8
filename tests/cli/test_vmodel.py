"""`mm vmodel …` against a mesh that answers what the test wants."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from mm.pb import mmesh
from tests.cli.fake_mesh import FakeMesh, run_command

S, V = mmesh.ModelStatusInfoModelStatus, mmesh.VModelStatusInfoVModelStatus


def run(mesh: FakeMesh, *args: str) -> tuple[int, str, str]:
    return run_command(mesh, "vmodel", *args)


def status(
    active: str, state: S = S.LOADED, *, target: str = "", target_state: S = S.LOADING,
    vmodel: V = V.DEFINED, **changes: Any,
) -> mmesh.VModelStatusInfo:  # fmt: skip
    return mmesh.VModelStatusInfo(
        status=vmodel,
        active_model_id=active,
        target_model_id=target or active,
        active_model_status=mmesh.ModelStatusInfo(status=state),
        target_model_status=mmesh.ModelStatusInfo(status=target_state) if target else None,
        **changes,
    )


def test_set_sends_what_it_was_told(mesh: FakeMesh) -> None:
    mesh.answer = status("m1", target="m2", vmodel=V.TRANSITIONING, owner="me")
    options = ("--path", "p", "--auto-delete", "--owner", "me", "--expect", "m1", "--update-only",
               "--load", "--force")  # fmt: skip
    assert run(mesh, "set", "v", "m2", *options) == (
        0,
        "v: TRANSITIONING, owner me\n  active m1: LOADED\n  target m2: LOADING\n",
        "",
    )
    assert mesh.requests == [
        mmesh.SetVModelRequest(
            v_model_id="v",
            target_model_id="m2",
            model_info=mmesh.ModelInfo(type="sklearn", path="p"),
            auto_delete_target_model=True,
            owner="me",
            expected_target_model_id="m1",
            update_only=True,
            load_now=True,
            force=True,
        )
    ]


def test_set_of_a_model_that_is_registered(mesh: FakeMesh) -> None:
    mesh.answer = status("m1", S.NOT_LOADED)
    assert run(mesh, "set", "v", "m1") == (0, "v: DEFINED\n  active m1: NOT_LOADED\n", "")
    assert mesh.request == mmesh.SetVModelRequest(v_model_id="v", target_model_id="m1")


def test_auto_delete_is_of_a_model_that_is_registered_here(mesh: FakeMesh) -> None:
    code, out, err = run(mesh, "set", "v", "m", "--auto-delete")
    assert (code, out) == (2, "")
    assert "--auto-delete is for a model that is registered here" in err
    assert not mesh.requests


def test_a_wait_is_over_when_the_model_serves(mesh: FakeMesh) -> None:
    """The API waits for transitions alone."""
    mesh.answers["setVModel"] = status("m1", S.LOADING)
    mesh.answers["ensureLoaded"] = mmesh.ModelStatusInfo(status=S.LOADED)
    mesh.answers["getVModelStatus"] = status("m1")
    assert run(mesh, "set", "v", "m1", "--wait") == (0, "v: DEFINED\n  active m1: LOADED\n", "")
    assert mesh.requests[0].sync
    assert mesh.requests[1] == mmesh.EnsureLoadedRequest(model_id="m1", sync=True)


def test_a_wait_in_vain_tells_that_the_vmodel_is_set(mesh: FakeMesh) -> None:
    mesh.answers["setVModel"] = status("m1", S.LOADING)
    mesh.answers["ensureLoaded"] = GRPCError(Status.UNAVAILABLE, "Nowhere available to load")
    code, out, err = run(mesh, "set", "v", "m1", "--wait")
    assert (code, out) == (7, "")
    assert "the vmodel is set, but m1 is not loaded: Nowhere available to load" in err


def test_a_wait_says_how_far_it_is(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each thing that is found, however often it is looked at."""
    monkeypatch.setattr("mm.cli.mesh.LOOK_S", 0.01)
    looked, looks_count = asyncio.Event(), 0

    async def look() -> mmesh.VModelStatusInfo:
        nonlocal looks_count
        looks_count += 1
        if looks_count == 4:  # what the third one found is printed
            looked.set()
        state = S.NOT_LOADED if looks_count == 1 else S.LOADING
        return status("m1", target="m2", target_state=state, vmodel=V.TRANSITIONING)

    async def switched() -> mmesh.VModelStatusInfo:
        await looked.wait()
        return status("m2")

    mesh.answers = {"getVModelStatus": look, "setVModel": switched}
    code, out, err = run(mesh, "set", "v", "m2", "--wait")
    assert (code, out) == (0, "v: DEFINED\n  active m2: LOADED\n")
    assert err == (
        "v: TRANSITIONING, active m1: LOADED, target m2: NOT_LOADED\n"
        "v: TRANSITIONING, active m1: LOADED, target m2: LOADING\n"
    )


def test_a_target_that_cannot_be_loaded(mesh: FakeMesh) -> None:
    mesh.answer = status(
        "m1", target="m2", target_state=S.LOADING_FAILED, vmodel=V.TRANSITION_FAILED
    )
    mesh.answer.target_model_status.errors = ["broken"]
    code, out, err = run(mesh, "set", "v", "m2", "--wait")
    assert code == 1
    assert err == (
        "mm: vmodel v stays with m1: m2 cannot be loaded; the mesh goes on trying, and"
        " `mm vmodel set v m1` has it give up\n"
    )
    assert out == (
        "v: TRANSITION_FAILED\n  active m1: LOADED\n  target m2: LOADING_FAILED\n"
        "    error: broken\n"
    )


@pytest.mark.parametrize(
    ("answer", "shown", "now"),
    [
        (status("m1"), "v: DEFINED\n  active m1: LOADED\n", "m1"),
        (
            status("m1", target="m3", vmodel=V.TRANSITIONING),
            "v: TRANSITIONING\n  active m1: LOADED\n  target m3: LOADING\n",
            "m3",
        ),
        (
            status("m1", target="m3", target_state=S.LOADING_FAILED, vmodel=V.TRANSITION_FAILED),
            "v: TRANSITION_FAILED\n  active m1: LOADED\n  target m3: LOADING_FAILED\n",
            "m3",
        ),
    ],
)
def test_a_wait_that_another_set_overtakes_is_no_success(
    mesh: FakeMesh, answer: mmesh.VModelStatusInfo, shown: str, now: str
) -> None:
    """Somebody set it back, or on, before the model served."""
    mesh.answer = answer
    code, out, err = run(mesh, "set", "v", "m2", "--path", "p", "--wait")
    assert (code, out) == (4, shown)
    assert err == (
        f"mm: overtaken by another set: vmodel v was to stand for m2, and is set to {now} now\n"
    )


def test_a_vmodel_that_is_set_on_from_the_model_that_serves(mesh: FakeMesh) -> None:
    mesh.answer = status("m2", target="m3", vmodel=V.TRANSITIONING)
    assert run(mesh, "set", "v", "m2", "--wait")[0] == 0


def test_a_vmodel_that_is_deleted_while_it_is_waited_for(mesh: FakeMesh) -> None:
    mesh.answer = mmesh.VModelStatusInfo()
    assert run(mesh, "set", "v", "m2", "--wait") == (3, "v: NOT_FOUND\n", "")


def test_get_as_json(mesh: FakeMesh) -> None:
    mesh.answer = status("m1", owner="o")
    code, out, _err = run(mesh, "get", "v", "-o", "json")
    assert code == 0
    assert json.loads(out) == {
        "id": "v",
        "status": "DEFINED",
        "owner": "o",
        "active": {"id": "m1", "status": "LOADED", "errors": [], "copies": []},
        "target": {"id": "m1"},
    }


def test_get_of_an_unknown_one(mesh: FakeMesh) -> None:
    mesh.answer = mmesh.VModelStatusInfo()
    assert run(mesh, "get", "v", "--owner", "me") == (3, "v: NOT_FOUND\n", "")
    assert mesh.request == mmesh.GetVModelStatusRequest(v_model_id="v", owner="me")


def test_get_of_one_whose_model_cannot_be_loaded(mesh: FakeMesh) -> None:
    mesh.answer = status("m1", S.LOADING_FAILED)
    assert run(mesh, "get", "v")[0] == 1


def test_delete(mesh: FakeMesh) -> None:
    mesh.answer = mmesh.DeleteVModelResponse()
    mesh.answers["getVModelStatus"] = [status("m1", owner="me"), mmesh.VModelStatusInfo()]
    assert run(mesh, "delete", "v", "--owner", "me") == (0, "v: deleted\n", "")
    assert mesh.requests[1] == mmesh.DeleteVModelRequest(v_model_id="v", owner="me")
    mesh.answers["getVModelStatus"] = status("m1")
    assert run(mesh, "delete", "v") == (0, "v: deleted\n", "")
    assert mesh.request == mmesh.DeleteVModelRequest(v_model_id="v")


def test_delete_of_one_that_is_not_there(mesh: FakeMesh) -> None:
    """It is asked for all the same: this instance may not have heard of it yet."""
    mesh.answer = mmesh.DeleteVModelResponse()
    mesh.answers["getVModelStatus"] = mmesh.VModelStatusInfo()
    assert run(mesh, "delete", "v") == (0, "v: there is no such vmodel\n", "")
    assert mesh.request == mmesh.DeleteVModelRequest(v_model_id="v")
    assert json.loads(run(mesh, "delete", "v", "-o", "json")[1]) == {"id": "v", "existed": False}


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ("you", "its owner is 'you', not 'me'; give that one, or no --owner"),
        ("", "its owner is nobody, not 'me'; give no --owner"),
    ],
)
def test_one_of_another_owner_is_not_said_to_be_deleted(
    mesh: FakeMesh, other: str, why: str
) -> None:
    mesh.answer = mmesh.DeleteVModelResponse()
    mesh.answers["getVModelStatus"] = status("m1", owner=other)
    code, out, err = run(mesh, "delete", "v", "--owner", "me")
    assert (code, out, err) == (4, "", f"mm: vmodel v stays: {why}\n")


def test_another_owner_is_a_refusal(mesh: FakeMesh) -> None:
    mesh.answer = GRPCError(Status.ALREADY_EXISTS, "vmodel v already exists")
    code, out, err = run(mesh, "set", "v", "m")
    assert (code, out) == (4, "")
    assert err == (
        "mm: ALREADY_EXISTS: vmodel v already exists;"
        " `mm vmodel get v` and `mm model get m` tell what is there\n"
    )


@pytest.mark.parametrize(
    ("status", "code", "args", "way"),
    [
        (Status.NOT_FOUND, 3, (), "register it (`mm model register 'a b'`), or give its --path"),
        (Status.NOT_FOUND, 3, ("--update-only",), ""),
        (Status.NOT_FOUND, 3, ("--path", "p"), ""),
        (Status.DEADLINE_EXCEEDED, 5, (), ""),
        (Status.DEADLINE_EXCEEDED, 5, ("--wait",), "goes on without this command: `mm vmodel get"),
    ],
)
def test_a_failure_tells_the_way_out(
    mesh: FakeMesh, status: Status, code: int, args: tuple[str, ...], way: str
) -> None:
    mesh.answer = GRPCError(status, "no")
    found, out, err = run(mesh, "set", "v", "a b", *args)
    assert (found, out) == (code, "")
    assert way in err
    assert way or err == f"mm: {status.name}: no\n"


@pytest.mark.parametrize("waits", [True, False])
def test_whoever_interrupts_a_wait_is_told_that_it_goes_on(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mm.cli.vmodel.ask_and_look", interrupt)
    code, out, err = run(mesh, "set", "v", "m", *(["--wait"] if waits else []))
    assert (code, out) == (130, "")
    told = "mm: interrupted; what is set goes on without this command: `mm vmodel get v` tells"
    assert err.startswith(told) if waits else not err


@pytest.mark.parametrize("kind", ["model", "vmodel"])
def test_a_watch_of_an_id_and_a_prefix(mesh: FakeMesh, kind: str) -> None:
    found = run_command(mesh, kind, "watch", "v", "--prefix", "w")
    assert found == (2, "", "mm: give an ID or --prefix, not both\n")
    assert not mesh.requests


def entry(vmodel_id: str, active: str, target: str = "", **changes: Any) -> mmesh.ListedVModel:
    return mmesh.ListedVModel(
        vmodel_id=vmodel_id,
        active_model_id=active,
        target_model_id=target or active,
        status=V.TRANSITIONING if target else V.DEFINED,
        **changes,
    )


def test_list(mesh: FakeMesh) -> None:
    mesh.answers["listVModels"] = [
        mmesh.ListVModelsResponse(
            vmodels=[entry("v1", "m1", owner="ksp"), entry("v2", "m1", "m2")], next_page_token="v2"
        ),
        mmesh.ListVModelsResponse(vmodels=[entry("v3", "m3")]),
    ]
    filters = ("--prefix", "v", "--owner", "ksp", "--status", "TRANSITIONING")
    code, out, _err = run(mesh, "list", *filters)
    assert (code, out.splitlines()) == (
        0,
        [
            "VMODEL  STATUS         ACTIVE  TARGET  OWNER",
            "v1      DEFINED        m1      -       ksp",
            "v2      TRANSITIONING  m1      m2      -",
            "v3      DEFINED        m3      -       -",
        ],
    )
    assert mesh.requests == [
        mmesh.ListVModelsRequest(
            page_size=1000, page_token=token, id_prefix="v", owner="ksp", status=V.TRANSITIONING
        )
        for token in ("", "v2")
    ]


def test_watch(mesh: FakeMesh) -> None:
    mesh.answers["listVModels"] = mmesh.ListVModelsResponse(vmodels=[entry("v", "m1")])
    mesh.answers["watchVModels"] = [
        entry("v", "m1"), entry("v", "m1", "m2"), entry("v", "m2"),
        mmesh.ListedVModel(vmodel_id="v"),
    ]  # fmt: skip
    code, out, err = run(mesh, "watch", "v")
    assert (code, err) == (0, "")
    assert [line.split("  ", 1)[1] for line in out.splitlines()] == [
        "v  DEFINED  m1", "v  TRANSITIONING  m1  m2", "v  DEFINED  m2", "v  NOT_FOUND",
    ]  # fmt: skip


V1_YAML = "id: v1\nstatus: DEFINED\nowner: ksp\nactive:\n  id: m1\ntarget:\n  id: m1\n"
V2_YAML = 'id: v2\nstatus: TRANSITIONING\nowner: ""\nactive:\n  id: m1\ntarget:\n  id: m2\n'


def listed_for_programs(mesh: FakeMesh) -> list[mmesh.ListedVModel]:
    v1, v2 = entry("v1", "m1", owner="ksp"), entry("v2", "m1", "m2")
    mesh.answers["listVModels"] = [
        mmesh.ListVModelsResponse(vmodels=[v1], next_page_token="v1"),
        mmesh.ListVModelsResponse(vmodels=[v2]),
    ]
    return [v1, v2]


def test_a_list_for_programs(mesh: FakeMesh) -> None:
    """As YAML; ``test_machine_output`` has JSON."""
    listed_for_programs(mesh)
    code, out, _err = run(mesh, "list", "-o", "yaml")
    items = [f"- {text[:-1].replace(chr(10), chr(10) + '  ')}\n" for text in (V1_YAML, V2_YAML)]
    assert (code, out) == (0, "".join(items))


@pytest.mark.parametrize(("form", "text"), [("json", "[]\n"), ("yaml", "[]\n"), ("table", "")])
def test_a_list_of_none(mesh: FakeMesh, form: str, text: str) -> None:
    mesh.answer = mmesh.ListVModelsResponse()
    code, out, err = run(mesh, "list", "-o", form)
    assert (code, out) == (0, text)
    assert err == ("" if text else "no vmodels\n")


def test_a_watch_for_programs(mesh: FakeMesh) -> None:
    mesh.answers["watchVModels"] = listed_for_programs(mesh)
    code, out, _err = run(mesh, "watch", "-o", "yaml")
    assert (code, out) == (0, f"---\n{V1_YAML}---\n{V2_YAML}")


def test_a_watch_of_an_instance_that_froze_ends(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm.cli.mesh.KEEPALIVE_S", 0.05)
    monkeypatch.setattr("mm.cli.mesh.KEEPALIVE_TIMEOUT_S", 0.2)
    thawed = threading.Event()

    async def freeze() -> mmesh.ListVModelsResponse:
        thawed.wait(60)  # and with it its whole event loop
        return mmesh.ListVModelsResponse()

    mesh.answers["listVModels"] = freeze
    mesh.answers["watchVModels"] = [entry("v", "m1")]
    try:
        code, _out, err = run(mesh, "watch", "v", "--timeout", "50")
    finally:
        thawed.set()
    assert code == 6
    assert "broke" in err


@pytest.mark.parametrize("command", ["set", "get", "delete", "list", "watch"])
def test_each_command_has_examples(mesh: FakeMesh, command: str) -> None:
    code, out, _err = run(mesh, command, "--help")
    assert code == 0
    assert f"mm vmodel {command}" in out.partition("Options:")[0].partition("Example")[2]
