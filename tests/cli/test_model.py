"""`mm model …` against a mesh that answers what the test wants."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import grpclib
import pytest
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from typer.testing import CliRunner

from mm.cli import main
from mm.cli.errors import CommandError
from mm.cli.model import parse_address
from mm.pb.mmesh import (
    EnsureLoadedRequest,
    GetStatusRequest,
    ModelInfo,
    ModelStatusInfo,
    ModelStatusInfoModelCopyInfo,
    ModelStatusInfoModelStatus,
    RegisterModelRequest,
    UnregisterModelRequest,
    UnregisterModelResponse,
)

S = ModelStatusInfoModelStatus


class FakeMesh:
    """Answers every method with ``answer`` (or raises it) and keeps the last request."""

    def __init__(self) -> None:
        self.answer: Any = ModelStatusInfo(status=S.NOT_LOADED)
        self.request: Any = None
        self.port = 0

    async def _handle(self, stream: grpclib.server.Stream[Any, Any]) -> None:
        self.request = await stream.recv_message()
        if isinstance(self.answer, BaseException):
            raise self.answer
        await stream.send_message(self.answer)

    def __mapping__(self) -> dict[str, Handler]:
        def unary(request: type, response: type) -> Handler:
            return Handler(self._handle, Cardinality.UNARY_UNARY, request, response)

        return {
            "/mmesh.ModelMesh/registerModel": unary(RegisterModelRequest, ModelStatusInfo),
            "/mmesh.ModelMesh/unregisterModel": unary(
                UnregisterModelRequest, UnregisterModelResponse
            ),
            "/mmesh.ModelMesh/getModelStatus": unary(GetStatusRequest, ModelStatusInfo),
            "/mmesh.ModelMesh/ensureLoaded": unary(EnsureLoadedRequest, ModelStatusInfo),
        }


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    """Run a fake mesh in a thread: the commands run event loops of their own."""
    fake = FakeMesh()
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = Server([fake])
        await server.start("127.0.0.1", 0)
        assert server._server is not None
        fake.port = server._server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()
        await server.wait_closed()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(10)
    yield fake
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    assert not thread.is_alive()
    loop.close()


def run(mesh: FakeMesh, *args: str) -> tuple[int, str, str]:
    env = {"MM_ADDRESS": f"127.0.0.1:{mesh.port}", "TZ": "UTC"}
    result = CliRunner().invoke(main.app, ["model", *args], env=env)
    return result.exit_code, result.stdout, result.stderr


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
    assert out.startswith("iris: LOADED\n  copy on one: LOADED since 19")


def test_status_of_an_unknown_model_fails(mesh: FakeMesh) -> None:
    mesh.answer = ModelStatusInfo(status=S.NOT_FOUND)
    assert run(mesh, "status", "iris") == (1, "iris: NOT_FOUND\n", "")


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
    code, out, _err = run(mesh, "status", "iris", "--json")
    assert code == 1
    assert json.loads(out) == {
        "id": "iris",
        "status": "LOADING_FAILED",
        "errors": ["bad"],
        "copies": [{"instance": "one", "status": "LOADING_FAILED", "time_ms": 5}],
    }


def test_unregister(mesh: FakeMesh) -> None:
    mesh.answer = UnregisterModelResponse()
    assert run(mesh, "unregister", "iris") == (0, "iris: unregistered\n", "")
    assert mesh.request == UnregisterModelRequest(model_id="iris")


def test_a_refusal_is_one_line_with_its_code(mesh: FakeMesh) -> None:
    mesh.answer = GRPCError(Status.FAILED_PRECONDITION, "Model iris has referents")
    assert run(mesh, "unregister", "iris") == (
        1,
        "",
        "mm: FAILED_PRECONDITION: Model iris has referents\n",
    )


def test_nobody_there(mesh: FakeMesh, unused_port: int) -> None:
    code, out, err = run(mesh, "status", "iris", "--address", f"127.0.0.1:{unused_port}")
    assert (code, out) == (1, "")
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
    assert (code, err) == (1, f"mm: no answer from {address} within 0.2 s\n")


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


@pytest.mark.parametrize("text", ["", "host:0", "host:65536", "host:x", "[::1", "[::1]9", "a/b:1"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(CommandError, match="is no address") as caught:
        parse_address(text)
    assert caught.value.exit_code == 2
