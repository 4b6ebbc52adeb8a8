"""Real processes for system tests: etcd, runtimes, `mm serve`, and grpcio clients to call them.

Nothing here sleeps: a process is waited for by the lines it prints, a port by the line that names
it. Every process is ended with the test that started it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import betterproto2
import grpc

from mm.demo.processes import environment
from mm.pb import mmesh

START_TIMEOUT_S = 20.0
CALL_TIMEOUT_S = 10.0
Metadata = Sequence[tuple[str, str | bytes]]


class Program:
    """A child process whose output is kept, line by line."""

    def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, str]) -> None:
        self.name = name
        self.lines: list[str] = []
        self._grown = threading.Condition()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment(os.environ) | dict(settings),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def mm(cls, name: str, *args: str, settings: Mapping[str, str] | None = None) -> Program:
        """Start ``python -m mm ARGS``."""
        return cls(name, [sys.executable, "-m", "mm", *args], settings or {})

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self.lines.append("<end of output>")
            self._grown.notify_all()

    def wait_line(
        self, pattern: str, *, timeout_s: float = START_TIMEOUT_S, after: int = 0
    ) -> re.Match[str]:
        """Answer the first match among the lines from number ``after`` on."""
        seen = after
        with self._grown:
            while True:
                for line in self.lines[seen:]:
                    match = re.search(pattern, line)
                    if match:
                        return match
                    assert line != "<end of output>", f"{self.name} ended:\n{self.output()}"
                seen = len(self.lines)
                assert self._grown.wait(timeout_s), (
                    f"{self.name} did not print {pattern!r} in {timeout_s} s:\n{self.output()}"
                )

    def output(self) -> str:
        """Answer everything printed so far."""
        return "\n".join(self.lines)

    def wait_end(self, timeout_s: float) -> int:
        """Answer the exit code; fails if it still runs after ``timeout_s``."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} still runs after {timeout_s} s:\n{self.output()}"
            ) from None
        self._reader.join(5)
        return code

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and collect it."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """End it, whatever its state, and release what the test holds of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass(slots=True)
class Instance:
    """A runtime, its `mm serve`, and a channel to it."""

    instance_id: str
    runtime: Program
    serve: Program
    port: int
    peer_port: int
    channel: grpc.Channel
    settings: dict[str, str] = field(default_factory=dict)

    def call(
        self,
        method: str,
        request: betterproto2.Message | bytes,
        reply_type: type[betterproto2.Message],
        metadata: Metadata = (),
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> betterproto2.Message:
        """One unary call by grpcio."""
        stub = self.channel.unary_unary(
            method, request_serializer=bytes, response_deserializer=reply_type.parse
        )
        reply: betterproto2.Message = stub(request, metadata=metadata, timeout=timeout_s)
        return reply

    def register(
        self,
        model_id: str,
        path: str = "",
        *,
        load_now: bool = False,
        sync: bool = False,
        model_type: str = "example",
        method: str = "/mmesh.ModelMesh/registerModel",
    ) -> mmesh.ModelStatusInfo:
        """Register a model."""
        request = mmesh.RegisterModelRequest(
            model_id=model_id,
            model_info=mmesh.ModelInfo(type=model_type, path=path),
            load_now=load_now,
            sync=sync,
        )
        reply = self.call(method, request, mmesh.ModelStatusInfo, timeout_s=60)
        assert isinstance(reply, mmesh.ModelStatusInfo)
        return reply

    def unregister(self, model_id: str, method: str = "/mmesh.ModelMesh/unregisterModel") -> None:
        """Unregister a model."""
        self.call(
            method,
            mmesh.UnregisterModelRequest(model_id=model_id),
            mmesh.UnregisterModelResponse,
        )

    def status(self, model_id: str) -> mmesh.ModelStatusInfo:
        """Ask for a model's status."""
        reply = self.call(
            "/mmesh.ModelMesh/getModelStatus",
            mmesh.GetStatusRequest(model_id=model_id),
            mmesh.ModelStatusInfo,
        )
        assert isinstance(reply, mmesh.ModelStatusInfo)
        return reply

    def predict(
        self,
        model_id: str,
        text: str = "hello",
        *,
        model_name: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
        metadata: Metadata | None = None,
    ) -> mmesh.PredictResponse:
        """Call the example predictor; ``metadata`` replaces the id header."""
        if metadata is None:
            metadata = [("mm-model-id", model_id)]
        reply = self.call(
            "/mmesh.ExamplePredictor/predict",
            mmesh.PredictRequest(text=text, model_name=model_name),
            mmesh.PredictResponse,
            metadata,
            timeout_s,
        )
        assert isinstance(reply, mmesh.PredictResponse)
        return reply

    def close(self) -> None:
        """End both processes."""
        self.channel.close()
        self.serve.close()
        self.runtime.close()


class Mesh:
    """Instances over one store, started and ended by a test."""

    def __init__(self, kv_store: str, settings: Mapping[str, str], service_name: str) -> None:
        self.instances: list[Instance] = []
        self._settings = {
            "KV_STORE": kv_store,
            "MM_SERVICE_NAME": service_name,
            "MM_BIND_HOST": "127.0.0.1",
            "MM_ADVERTISE_ADDRESS": "127.0.0.1",
            "MM_SVC_GRPC_PORT": "0",
            "MM_PEER_PORT": "0",
            **settings,
        }

    def __getitem__(self, index: int) -> Instance:
        return self.instances[index]

    def add(
        self,
        instance_id: str,
        runtime_args: Sequence[str] = ("0", "--start-delay", "0"),
        runtime_settings: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Instance:
        """Start a runtime and an instance beside it, and wait until it serves."""
        runtime = Program.mm(
            f"runtime of {instance_id}",
            "runtime",
            "example",
            *runtime_args,
            settings=runtime_settings,
        )
        places = listening_places(runtime, runtime_args[0].count(",") + 1)
        own = {"MM_INSTANCE_ID": instance_id, **runtime_variables(places), **(settings or {})}
        try:
            return self.add_beside(instance_id, runtime, own)
        except BaseException:
            runtime.close()
            raise

    def add_beside(self, instance_id: str, runtime: Program, own: Mapping[str, str]) -> Instance:
        """Start an instance beside a runtime that is there."""
        settings = {**self._settings, **own}
        serve = Program.mm(f"instance {instance_id}", "serve", settings=settings)
        ready = r"ready: instance .*clients on port (\d+), peers on port (\d+)"
        try:
            match = serve.wait_line(ready)
        except BaseException:
            serve.close()
            raise
        port, peer_port = int(match.group(1)), int(match.group(2))
        instance = Instance(
            instance_id, runtime, serve, port, peer_port, channel_to(port), dict(settings)
        )
        self.instances.append(instance)
        return instance

    def close(self) -> None:
        """End everything."""
        for instance in self.instances:
            instance.close()


def listening_places(runtime: Program, count: int = 1) -> list[str]:
    """Answer where a runtime listens: for management first, then for inferences if elsewhere."""
    places: list[str] = []
    after = 0
    while len(places) < count:
        places.append(runtime.wait_line(r"listening on (\S+)", after=after).group(1))
        after = next(i for i, line in enumerate(runtime.lines) if line.endswith(places[-1])) + 1
    return places


def runtime_variables(places: Sequence[str]) -> dict[str, str]:
    """Answer the settings for a runtime that listens there."""
    variables = {}
    for name, address in zip(("INTERNAL", "INTERNAL_SERVING"), places, strict=False):
        if address.startswith("unix:"):
            variables[f"{name}_GRPC_SOCKET_PATH"] = address.removeprefix("unix:").removeprefix("//")
        else:
            variables[f"{name}_GRPC_PORT"] = address.rpartition(":")[2]
    return variables


def channel_to(port: int) -> grpc.Channel:
    """Answer a grpcio channel that shares no connection with others."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", 64 * 2**20),
        ("grpc.max_send_message_length", 64 * 2**20),
    ]
    return grpc.insecure_channel(f"127.0.0.1:{port}", options=options)


@contextmanager
def mesh_of(kv_store: str, settings: Mapping[str, str], service_name: str) -> Iterator[Mesh]:
    """A mesh that is taken down at the end."""
    mesh = Mesh(kv_store, settings, service_name)
    try:
        yield mesh
    finally:
        mesh.close()
