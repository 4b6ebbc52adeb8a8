"""A mesh that answers what the test wants, for the commands that ask one."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpclib
from grpclib.const import Cardinality, Handler
from grpclib.server import Server
from typer.testing import CliRunner

from mm.cli import main
from mm.pb import mmesh
from mm.pb.mmesh import ModelStatusInfo, ModelStatusInfoModelStatus

PREFIX = "/mmesh.ModelMesh/"
UNARY = {
    "registerModel": (mmesh.RegisterModelRequest, mmesh.ModelStatusInfo),
    "unregisterModel": (mmesh.UnregisterModelRequest, mmesh.UnregisterModelResponse),
    "getModelStatus": (mmesh.GetStatusRequest, mmesh.ModelStatusInfo),
    "ensureLoaded": (mmesh.EnsureLoadedRequest, mmesh.ModelStatusInfo),
    "setModelPolicy": (mmesh.SetModelPolicyRequest, mmesh.ModelPolicyInfo),
    "setVModel": (mmesh.SetVModelRequest, mmesh.VModelStatusInfo),
    "deleteVModel": (mmesh.DeleteVModelRequest, mmesh.DeleteVModelResponse),
    "getVModelStatus": (mmesh.GetVModelStatusRequest, mmesh.VModelStatusInfo),
    "listModels": (mmesh.ListModelsRequest, mmesh.ListModelsResponse),
    "listVModels": (mmesh.ListVModelsRequest, mmesh.ListVModelsResponse),
}
STREAMS = {
    "watchModels": (mmesh.WatchRequest, mmesh.ListedModel),
    "watchVModels": (mmesh.WatchRequest, mmesh.ListedVModel),
}


class FakeMesh:
    """Answers a method with ``answers``, else with ``answer``; a list is answered one by one, and
    an exception is raised. Keeps the requests.
    """

    def __init__(self) -> None:
        self.answer: Any = ModelStatusInfo(status=ModelStatusInfoModelStatus.NOT_LOADED)
        self.answers: dict[str, Any] = {}
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.port = 0

    @property
    def request(self) -> Any:
        """The last one."""
        return self.requests[-1]

    async def _handle(self, stream: grpclib.server.Stream[Any, Any], name: str) -> None:
        self.metadata.append(dict(stream.metadata or {}))
        self.requests.append(await stream.recv_message())
        answer = self.answers.get(name, self.answer)
        if isinstance(answer, list) and name not in STREAMS:
            answer = answer.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        if asyncio.iscoroutinefunction(answer):
            answer = await answer()
        for each in answer if name in STREAMS else [answer]:
            await stream.send_message(each)

    def __mapping__(self) -> dict[str, Handler]:
        def handler(name: str, cardinality: Cardinality, types: tuple[type, type]) -> Handler:
            async def handle(stream: grpclib.server.Stream[Any, Any]) -> None:
                await self._handle(stream, name)

            return Handler(handle, cardinality, *types)

        unary = {n: handler(n, Cardinality.UNARY_UNARY, types) for n, types in UNARY.items()}
        streams = {n: handler(n, Cardinality.UNARY_STREAM, types) for n, types in STREAMS.items()}
        return {PREFIX + name: each for name, each in {**unary, **streams}.items()}


@contextmanager
def fake_mesh(tls: ssl.SSLContext | None = None) -> Iterator[FakeMesh]:
    """Run a fake mesh in a thread: the commands run event loops of their own."""
    fake = FakeMesh()
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = Server([fake])
        await server.start("127.0.0.1", 0, ssl=tls)
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


def run_command(mesh: FakeMesh, *args: str, **variables: str) -> tuple[int, str, str]:
    """Run `mm ARGS` against it; answers exit code, stdout and stderr."""
    env = {"MM_ADDRESS": f"127.0.0.1:{mesh.port}", "TZ": "UTC", **variables}
    result = CliRunner().invoke(main.app, list(args), env=env)
    return result.exit_code, result.stdout, result.stderr
