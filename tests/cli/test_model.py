"""`mm model …` against a mesh that answers what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from mm.cli.errors import CommandError
from mm.cli.mesh import parse_address
from mm.pb import mmesh
from mm.pb.mmesh import (
    ModelInfo,
    ModelStatusInfo,
    ModelStatusInfoModelCopyInfo,
    ModelStatusInfoModelStatus,
    RegisterModelRequest,
    UnregisterModelRequest,
    UnregisterModelResponse,
)
from tests.cli.fake_mesh import FakeMesh, run_command

S = ModelStatusInfoModelStatus


def run(mesh: FakeMesh, *args: str) -> tuple[int, str, str]:
    return run_command(mesh, "model", *args)


def test_register_sends_what_it_was_told(mesh: FakeMesh) -> None:
    answer = run(mesh, "register", "iris", "--path", "a/iris", "--type", "t", "--key", "k")
    assert answer == (0, "iris: NOT_LOADED\n", "")
    assert mesh.request == RegisterModelRequest(
        model_id="iris", model_info=ModelInfo(type="t", path="a/iris", key="k")
    )


@pytest.mark.parametrize(
    ("option", "load_now", "sync"), [("--load", True, False), ("--wait", True, True)]
)
def test_register_loads_when_asked(mesh: FakeMesh, option: str, load_now: bool, sync: bool) -> None:
    assert run(mesh, "register", "iris", option)[0] == 0
    assert (mesh.request.load_now, mesh.request.sync) == (load_now, sync)
    assert mesh.request.model_info.type == "sklearn"


def test_status_shows_copies(mesh: FakeMesh) -> None:
    copy = ModelStatusInfoModelCopyInfo(location="one", copy_status=S.LOADED, time=0)
    mesh.answer = ModelStatusInfo(status=S.LOADED, model_copy_infos=[copy])
    code, out, err = run(mesh, "status", "iris")
    assert (code, err) == (0, "")
    assert out.startswith("iris: LOADED\n  copy on one: LOADED, load begun 19")


def test_status_of_an_unknown_model_fails(mesh: FakeMesh) -> None:
    mesh.answer = ModelStatusInfo(status=S.NOT_FOUND)
    assert run(mesh, "status", "iris") == (3, "iris: NOT_FOUND\n", "")


def test_a_failed_load_shows_its_errors_and_fails(mesh: FakeMesh) -> None:
    mesh.answer = ModelStatusInfo(status=S.LOADING_FAILED, errors=["no such file", "other"])
    code, out, _err = run(mesh, "ensure-loaded", "iris")
    assert code == 1
    assert out == "iris: LOADING_FAILED\n  error: no such file\n  error: other\n"


def test_ensure_loaded_waits_unless_told_not_to(mesh: FakeMesh) -> None:
    run(mesh, "ensure-loaded", "iris")
    assert mesh.request.sync
    run(mesh, "ensure-loaded", "iris", "--no-wait")
    assert not mesh.request.sync


def test_json_is_one_object_for_scripts(mesh: FakeMesh) -> None:
    copy = ModelStatusInfoModelCopyInfo(location="one", copy_status=S.LOADING_FAILED, time=5)
    mesh.answer = ModelStatusInfo(status=S.LOADING_FAILED, errors=["bad"], model_copy_infos=[copy])
    code, out, _err = run(mesh, "status", "iris", "-o", "json")
    assert code == 1
    assert json.loads(out) == {
        "id": "iris",
        "status": "LOADING_FAILED",
        "errors": ["bad"],
        "copies": [{"instance": "one", "status": "LOADING_FAILED", "time_ms": 5}],
    }


def test_unregister(mesh: FakeMesh) -> None:
    mesh.answers["unregisterModel"] = UnregisterModelResponse()
    assert run(mesh, "unregister", "iris") == (0, "iris: unregistered\n", "")
    assert mesh.request == UnregisterModelRequest(model_id="iris")
    mesh.answer = ModelStatusInfo(status=S.NOT_FOUND)
    assert run(mesh, "unregister", "iris") == (0, "iris: there is no such model\n", "")
    assert mesh.request == UnregisterModelRequest(model_id="iris")


def test_a_refusal_is_one_line_with_its_code(mesh: FakeMesh) -> None:
    mesh.answers["unregisterModel"] = GRPCError(
        Status.FAILED_PRECONDITION, "Model iris has referents"
    )
    for names, way in (
        ([], "`mm model get iris` tells what refers to it"),
        (
            ["v"],
            "vmodel v refers to it: set it to another model first, or delete it, as by"
            " `mm vmodel delete v`",
        ),
        (
            ["a b", *"cdefg"],
            "vmodels 'a b', c, d, e, f, … refer to it: set each to another model first, or delete"
            " it, as by `mm vmodel delete 'a b'`",
        ),
    ):
        mesh.answers["listModels"] = page(listed("iris", vmodel_ids=names))
        found = run(mesh, "unregister", "iris")
        assert found == (4, "", f"mm: FAILED_PRECONDITION: Model iris has referents; {way}\n")


@pytest.mark.parametrize("command", ["ensure-loaded", "policy"])
def test_a_model_that_is_not_there_can_be_registered(mesh: FakeMesh, command: str) -> None:
    mesh.answer = GRPCError(Status.NOT_FOUND, "model not found")
    told = "register it: `mm model register 'a b' --path PATH`"
    assert run(mesh, command, "a b") == (3, "", f"mm: NOT_FOUND: model not found; {told}\n")


def test_a_model_that_is_there_with_other_values(mesh: FakeMesh) -> None:
    mesh.answer = GRPCError(Status.ALREADY_EXISTS, "other values")
    assert run(mesh, "register", "iris", "--wait") == (
        4,
        "",
        "mm: ALREADY_EXISTS: other values: `mm model get iris` shows them; take another id, or"
        " remove the model first (`mm model unregister iris`)\n",
    )


@pytest.mark.parametrize("command", [("register", "--wait"), ("ensure-loaded",)])
def test_a_wait_that_ends_early_tells_that_the_load_goes_on(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    told = "the load goes on without this command: `mm model get m` tells how far"
    mesh.answer = GRPCError(Status.DEADLINE_EXCEEDED, "so")
    assert run(mesh, command[0], "m", *command[1:])[::2] == (
        5,
        f"mm: DEADLINE_EXCEEDED: so; {told}\n",
    )

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mm.cli.model.ask_and_look", interrupt)
    code, _out, err = run(mesh, command[0], "m", *command[1:])
    assert code == 130
    assert err.startswith(f"mm: interrupted; {told}")


def test_nobody_there(mesh: FakeMesh, unused_port: int) -> None:
    code, out, err = run(mesh, "status", "iris", "--address", f"127.0.0.1:{unused_port}")
    assert (code, out) == (6, "")
    assert err == (
        f"mm: cannot connect to 127.0.0.1:{unused_port}: connection refused "
        "(is `mm serve` running there?)\n"
    )


@pytest.fixture
def unused_port() -> Iterator[int]:
    """Hold a port without listening on it: connections are refused."""
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_mesh_that_does_not_answer(mesh: FakeMesh) -> None:
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        code, _out, err = run(mesh, "status", "x", "--address", address, "--timeout", "0.2")
    assert (code, err) == (5, f"mm: no answer from {address} within 0.2 s\n")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("host:1", ("host", 1)),
        ("host", ("host", 8033)),
        (":9", ("localhost", 9)),
        ("[::1]:9", ("::1", 9)),
        ("[::1]", ("::1", 8033)),
        ("::1", ("::1", 8033)),
    ],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert parse_address(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "host:0", "host:65536", "host:x", "[::1", "[::1]9", "a/b:1", "a..b", "\udcff"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(CommandError, match="is no address") as caught:
        parse_address(text)
    assert caught.value.exit_code == 2


# --- list, get, watch -----------------------------------------------------------------------------


def listed(model_id: str, status: S = S.LOADED, **changes: Any) -> mmesh.ListedModel:
    copy = ModelStatusInfoModelCopyInfo(location="one", copy_status=status, time=5)
    return mmesh.ListedModel(
        model_id=model_id,
        type="t",
        path="a/b",
        status=ModelStatusInfo(status=status, model_copy_infos=[copy]),
        last_used_ms=86_400_000,
        **changes,
    )


def page(*models: mmesh.ListedModel, token: str = "") -> mmesh.ListModelsResponse:
    return mmesh.ListModelsResponse(models=list(models), next_page_token=token)


def test_list_prints_a_table_page_by_page(mesh: FakeMesh) -> None:
    large = listed("m1", size_bytes=3 * 2**20, min_copies=2, pinned=True, vmodel_ids=["v1", "v2"])
    mesh.answers["listModels"] = [page(large, token="m1"), page(listed("m2", S.LOADING_FAILED))]
    code, out, err = run(mesh, "list")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "MODEL  STATUS  COPIES   SIZE     LAST USED            TYPE  POLICY                VMODELS"
        "  PATH",
        "m1     LOADED  1 ready  3.0 MiB  1970-01-02 00:00:00  t     min-copies 2, pinned  v1, v2"
        "   a/b",
        "m2     LOADING_FAILED  1 failed  -        1970-01-02 00:00:00  t     -                "
        "     -        a/b",
    ]
    assert [request.page_token for request in mesh.requests] == ["", "m1"]


def test_list_sends_its_filters_and_stops_at_the_limit(mesh: FakeMesh) -> None:
    mesh.answers["listModels"] = [page(listed("m1"), listed("m2"), token="m2")]
    filters = ("--prefix", "m", "--type", "t", "--status", "loaded", "--limit", "2")
    code, out, _err = run(mesh, "list", *filters, "-o", "json")
    assert (code, [each["id"] for each in json.loads(out)]) == (0, ["m1", "m2"])
    assert mesh.requests == [
        mmesh.ListModelsRequest(page_size=2, id_prefix="m", type="t", status=S.LOADED)
    ]


def test_a_status_that_is_none(mesh: FakeMesh) -> None:
    code, _out, err = run(mesh, "list", "--status", "BROKEN")
    assert code == 2
    assert err == (
        "mm: 'BROKEN' is no status to look for; allowed: NOT_LOADED, LOADING, LOADED,"
        " LOADING_FAILED, UNKNOWN\n"
    )


@pytest.mark.parametrize(
    ("output", "out", "err"),
    [("table", "", "no models\n"), ("json", "[]\n", ""), ("yaml", "[]\n", "")],
)
def test_an_empty_list(mesh: FakeMesh, output: str, out: str, err: str) -> None:
    mesh.answers["listModels"] = page()
    assert run(mesh, "list", "-o", output) == (0, out, err)


def test_get_tells_all(mesh: FakeMesh) -> None:
    mesh.answers["getModelStatus"] = ModelStatusInfo(status=S.LOADED)
    mesh.answers["listModels"] = page(listed("m", size_bytes=2**20, vmodel_ids=["v"], pinned=True))
    assert run(mesh, "get", "m") == (
        0,
        "m: LOADED\n  type t\n  path a/b\n  size 1.0 MiB\n  last used 1970-01-02 00:00:00\n"
        "  policy: pinned\n  vmodels: v\n",
        "",
    )
    code, out, _err = run(mesh, "get", "m", "-o", "yaml")
    assert code == 0
    assert out.startswith("id: m\nstatus: LOADED\nerrors: []\ncopies: []\ntype: t\npath: a/b\n")


def test_get_of_an_unknown_model(mesh: FakeMesh) -> None:
    mesh.answers["getModelStatus"] = ModelStatusInfo(status=S.NOT_FOUND)
    mesh.answers["listModels"] = page(listed("m2"))
    assert run(mesh, "get", "m") == (3, "m: NOT_FOUND\n", "")


def test_watch_prints_what_is_there_and_then_what_changes(mesh: FakeMesh) -> None:
    mesh.answers["listModels"] = page(listed("m"), listed("m2"))
    gone = mmesh.ListedModel(model_id="m", status=ModelStatusInfo(status=S.NOT_FOUND))
    mesh.answers["watchModels"] = [listed("m"), listed("m", S.LOADING), gone]
    code, out, err = run(mesh, "watch", "m", "-o", "json")
    told = [json.loads(line) for line in out.splitlines()]
    assert [(each["id"], each["status"]) for each in told] == [
        ("m", "LOADED"), ("m", "LOADING"), ("m", "NOT_FOUND"),
    ]  # fmt: skip
    assert (code, err) == (0, "")
    assert mesh.requests[0] == mmesh.WatchRequest(id="m")


def test_a_table_stays_a_table_with_any_ids(mesh: FakeMesh) -> None:
    """Wide characters take two columns, and 4 KiB would take fifty lines."""
    wide, long = "\u6a21\u578b", "m" * 4096
    models = page(listed(wide), listed(long))
    mesh.answer = models
    lines = run(mesh, "list")[1].splitlines()
    column = lines[0].index("STATUS")
    assert lines[1].index("LOADED") == column - len(wide)
    assert lines[2].startswith(f"{'m' * 99}…  LOADED")
    assert lines[2].index("LOADED") == column == 102
    told = json.loads(run(mesh, "list", "-o", "json")[1])
    assert [each["id"] for each in told] == [wide, long]


def test_a_watch_of_an_empty_id(mesh: FakeMesh) -> None:
    code, _out, err = run(mesh, "watch", "")
    assert (code, err) == (2, "mm: '' is no ID to watch; allowed: an ID, or none\n")
    assert not mesh.requests


def test_a_watch_says_that_there_is_no_such_model_yet(mesh: FakeMesh) -> None:
    mesh.answers["listModels"] = page(listed("m2"))
    mesh.answers["watchModels"] = []
    assert run(mesh, "watch", "m") == (0, "", "no model m yet\n")


def test_a_small_model_has_a_size(mesh: FakeMesh) -> None:
    mesh.answers["getModelStatus"] = ModelStatusInfo(status=S.LOADED)
    mesh.answers["listModels"] = page(listed("m", size_bytes=1536))
    assert "  size 1.5 KiB\n" in run(mesh, "get", "m")[1]


def test_nothing_from_outside_moves_the_cursor(mesh: FakeMesh) -> None:
    mesh.answer = ModelStatusInfo(status=S.LOADING_FAILED, errors=["bad\x1b[2J\nthing"])
    _code, out, _err = run(mesh, "status", "m")
    assert out == "m: LOADING_FAILED\n  error: bad\\x1b[2J\\nthing\n"


def test_a_wait_says_how_far_it_is(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.cli.mesh.LOOK_S", 0.01)
    looked, looks_count = asyncio.Event(), 0

    async def look() -> ModelStatusInfo:
        nonlocal looks_count
        looks_count += 1
        if looks_count == 2:  # what the first one found is printed
            looked.set()
        return ModelStatusInfo(status=S.LOADING)

    async def ensured() -> ModelStatusInfo:
        await looked.wait()
        return ModelStatusInfo(status=S.LOADED)

    mesh.answers = {"getModelStatus": look, "ensureLoaded": ensured}
    code, out, err = run(mesh, "ensure-loaded", "m")
    assert (code, out, err) == (0, "m: LOADED\n", "m: LOADING\n")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (Status.NOT_FOUND, 3),
        (Status.ALREADY_EXISTS, 4),
        (Status.INVALID_ARGUMENT, 2),
        (Status.DEADLINE_EXCEEDED, 5),
        (Status.UNAVAILABLE, 7),
        (Status.RESOURCE_EXHAUSTED, 7),
        (Status.INTERNAL, 1),
    ],
)
def test_exit_codes(mesh: FakeMesh, status: Status, code: int) -> None:
    mesh.answer = GRPCError(status, "so")
    assert run(mesh, "status", "m") == (code, "", f"mm: {status.name}: so\n")
