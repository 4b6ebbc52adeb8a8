"""Meshes of real processes, and grpcio clients to call them.

A mesh is a few instances over one store, each a runtime and an `mm serve`; it ends with the test.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import betterproto2
import grpc

from mm.pb import mmesh
from mm.pb.mm import peer
from tests.identities import make
from tests.system.processes import START_TIMEOUT_S, Program, eventually

#: Ends what hangs; no test asserts how fast a call is by it.
CALL_TIMEOUT_S = 60.0
#: The default of MM_SVC_GRPC_MAX_MSG_SIZE.
MESSAGE_BYTES_MAX = 16 * 2**20
Metadata = Sequence[tuple[str, str | bytes]]
READY = r"ready: instance .*clients on port (\d+), peers on port (\d+)"


@dataclass(slots=True)
class Instance:
    """A runtime if it is a process, its `mm serve`, and a channel to it."""

    instance_id: str
    runtime: Program | None
    serve: Program
    port: int
    peer_port: int
    channel: grpc.Channel
    settings: dict[str, str] = field(default_factory=dict)
    #: For the port of the peers; None: plain text.
    peer_credentials: grpc.ChannelCredentials | None = None

    def call(
        self,
        method: str,
        request: betterproto2.Message | bytes,
        reply_type: type[betterproto2.Message],
        metadata: Metadata = (),
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        """One unary call by grpcio."""
        stub = self.channel.unary_unary(
            method, request_serializer=bytes, response_deserializer=reply_type.parse
        )
        return stub(request, metadata=tuple(metadata), timeout=timeout_s)

    def register(
        self,
        model_id: str,
        path: str = "",
        *,
        load_now: bool = False,
        sync: bool = False,
        model_type: str = "example",
        key: str = "",
        last_used_ms: int = 0,
        method: str = "/mmesh.ModelMesh/registerModel",
        metadata: Metadata = (),
    ) -> mmesh.ModelStatusInfo:
        """Register a model."""
        request = mmesh.RegisterModelRequest(
            model_id=model_id,
            model_info=mmesh.ModelInfo(type=model_type, path=path, key=key),
            load_now=load_now,
            sync=sync,
            last_used_time=last_used_ms,
        )
        reply = self.call(method, request, mmesh.ModelStatusInfo, metadata, timeout_s=60)
        assert isinstance(reply, mmesh.ModelStatusInfo)
        return reply

    def ensure_loaded(
        self, model_id: str, *, sync: bool = False, last_used_ms: int = 0
    ) -> mmesh.ModelStatusInfo:
        """See that a model is loaded, or on its way."""
        request = mmesh.EnsureLoadedRequest(
            model_id=model_id, sync=sync, last_used_time=last_used_ms
        )
        method = "/mmesh.ModelMesh/ensureLoaded"
        reply = self.call(method, request, mmesh.ModelStatusInfo, timeout_s=60)
        assert isinstance(reply, mmesh.ModelStatusInfo)
        return reply

    def load_here(self, model_id: str, *, last_used_ms: int = 0) -> None:
        """Load a copy here, as a peer orders it that has no hops left."""
        with channel_to(self.peer_port, credentials=self.peer_credentials) as channel:
            stub: Any = channel.unary_unary(
                "/mmesh.ModelMesh/ensureLoaded",
                request_serializer=bytes,
                response_deserializer=mmesh.ModelStatusInfo.parse,
            )
            metadata = (("mm-hop-kind", "load-local"), ("mm-hop-left", "0"))
            request = mmesh.EnsureLoadedRequest(
                model_id=model_id, sync=True, last_used_time=last_used_ms
            )
            reply = stub(request, metadata=metadata, timeout=60)
        assert reply.status == mmesh.ModelStatusInfoModelStatus.LOADED

    def unregister(self, model_id: str, method: str = "/mmesh.ModelMesh/unregisterModel") -> None:
        """Unregister a model."""
        request = mmesh.UnregisterModelRequest(model_id=model_id)
        self.call(method, request, mmesh.UnregisterModelResponse)

    def status(self, model_id: str) -> mmesh.ModelStatusInfo:
        """Ask for a model's status."""
        request = mmesh.GetStatusRequest(model_id=model_id)
        reply = self.call("/mmesh.ModelMesh/getModelStatus", request, mmesh.ModelStatusInfo)
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

    def predict_later(self, model_id: str, text: str) -> Any:
        """Start a call of the example predictor, and answer its future."""
        stub: Any = self.channel.unary_unary(
            "/mmesh.ExamplePredictor/predict",
            request_serializer=bytes,
            response_deserializer=mmesh.PredictResponse.parse,
        )
        request = mmesh.PredictRequest(text=text)
        return stub.future(request, metadata=(("mm-model-id", model_id),), timeout=60)

    def statistics(self) -> peer.InstanceStatistics:
        """Ask the peer port for counters and gauges."""
        with channel_to(self.peer_port, credentials=self.peer_credentials) as channel:
            stub: Any = channel.unary_unary(
                "/mm.peer.Peer/statistics",
                request_serializer=bytes,
                response_deserializer=peer.InstanceStatistics.parse,
            )
            answer = stub(peer.StatisticsRequest(), timeout=CALL_TIMEOUT_S)
            assert isinstance(answer, peer.InstanceStatistics)
            return answer

    def knows(self, count: int) -> bool:
        """Answer whether it knows of so many instances, itself among them."""
        return self.statistics().instances >= count

    def wait_in_flight(self, count: int) -> None:
        """Return when that many calls are on their way to a runtime or peer."""
        eventually(lambda: self.statistics().calls_in_flight >= count, what="calls in flight")

    def prefix(self, table: str) -> str:
        """Answer what the keys of a table begin with: registry, vmodels or instances."""
        return f"/tas-runtime/{self.settings['MM_SERVICE_NAME']}/{table}/"

    def kill(self) -> None:
        """SIGKILL to both processes, as when their machine goes."""
        self.serve.kill()
        if self.runtime is not None:
            self.runtime.kill()

    def close(self) -> None:
        """End both processes."""
        self.channel.close()
        self.serve.close()
        if self.runtime is not None:
            self.runtime.close()


class Mesh:
    """Instances over one store, started and ended by a test."""

    def __init__(self, kv_store: str, settings: Mapping[str, str], service_name: str) -> None:
        self.instances: list[Instance] = []
        self.service_name = service_name
        #: What no setting changes (``quick_serve``), for instances that are started from now on.
        self.limits: dict[str, Any] = {}
        #: With which the test calls clients' ports, and peers'; None: in plain text.
        self.credentials: grpc.ChannelCredentials | None = None
        self.peer_credentials: grpc.ChannelCredentials | None = None
        self.settings = {
            "KV_STORE": kv_store,
            "MM_SERVICE_NAME": service_name,
            "MM_BIND_HOST": "127.0.0.1",
            "MM_ADVERTISE_ADDRESS": "127.0.0.1",
            "MM_SVC_GRPC_PORT": "0",
            "MM_PEER_PORT": "0",
            "MM_PROBE_PORT": "NONE",
            "MM_PRESTOP_WAIT_PORT": "NONE",
            **settings,
        }
        self._directory = Path(tempfile.mkdtemp(prefix="mm-mesh-"))
        dataplane, _, security = settings.get("MM_DATAPLANE", "").partition("+")
        if security:
            self._secure(security)
            self.settings["MM_DATAPLANE"] = dataplane
        self._programs: list[Program] = []

    def _secure(self, security: str) -> None:
        """Have the mesh speak TLS, with "mtls" also ask its clients for a certificate: all show
        the one that there is, as the controller of modelmesh-serving does.
        """
        identity = make("mesh")
        certificate, key = identity.certificate_pem, identity.key_pem()
        self.peer_credentials = grpc.ssl_channel_credentials(certificate, key, certificate)
        self.credentials = grpc.ssl_channel_credentials(certificate)
        own = identity.write(self._directory / "tls")
        if security == "mtls":
            self.credentials = self.peer_credentials
            own["MM_TLS_CLIENT_AUTH"] = "require"
            own["MM_TLS_TRUST_CERT_PATH"] = own["MM_TLS_KEY_CERT_PATH"]
        self.settings |= own

    def __getitem__(self, index: int) -> Instance:
        return self.instances[index]

    def prefix(self, table: str) -> str:
        """Answer what the keys of a table begin with: registry, vmodels or instances."""
        return f"/tas-runtime/{self.service_name}/{table}/"

    def add(
        self,
        instance_id: str,
        runtime_args: Sequence[str] = (),
        runtime_settings: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> Instance:
        """Start an example runtime and an instance beside it, and wait until it serves.

        The first of ``runtime_args`` may be the place where it listens, else it is a Unix socket
        and both start at once.
        """
        place, rest = _split_place(runtime_args)
        if place is None:
            path = self.socket_path(instance_id)
            args = [f"unix://{path}", "--start-delay", "0", *rest]
            runtime = self.start_runtime(instance_id, ["example", *args], runtime_settings)
            own = {"INTERNAL_GRPC_SOCKET_PATH": path}
        else:
            args = [place, "--start-delay", "0", *rest]
            runtime = self.start_runtime(instance_id, ["example", *args], runtime_settings)
            own = runtime_variables(listening_places(runtime, place.count(",") + 1))
        return self.add_beside(instance_id, runtime, {**own, **(settings or {})})

    def add_sklearn(
        self, instance_id: str, root: Path, args: Sequence[str] = (), **settings: str
    ) -> Instance:
        """Start a scikit-learn runtime and an instance beside it."""
        path = self.socket_path(instance_id)
        command = ["sklearn", "--root", str(root), "--unix-socket", path, *args]
        runtime = self.start_runtime(instance_id, command)
        return self.add_beside(
            instance_id, runtime, {"INTERNAL_GRPC_SOCKET_PATH": path, **settings}
        )

    def add_all(self, *instance_ids: str, runtime_args: Sequence[str] = ()) -> None:
        """Start several at once; ``instances`` has them in this order."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(self.add, runtime_args=runtime_args), instance_ids))
        self.instances.sort(key=lambda instance: instance_ids.index(instance.instance_id))

    def socket_path(self, instance_id: str) -> str:
        """Answer where the runtime of an instance listens."""
        return str(self._directory / f"{instance_id}.sock")

    def start_runtime(
        self, instance_id: str, args: Sequence[str], settings: Mapping[str, str] | None = None
    ) -> Program:
        """Start `mm runtime ARGS`; returns at once."""
        name = f"runtime of {instance_id}"
        if args[0] == "example":
            runtime = Program.forked(name, "mm", "runtime", *args, settings=settings)
        else:
            # Loads what has threads of its own.
            runtime = Program.mm(name, "runtime", *args, settings=settings)
        self._programs.append(runtime)
        return runtime

    def start_serve(self, instance_id: str, settings: Mapping[str, str]) -> Program:
        """Start `mm serve`; returns at once."""
        own = {**self.settings, "MM_INSTANCE_ID": instance_id, **settings}
        module, argument = "mm", "serve"
        if self.limits:
            module, argument = "tests.system.quick_serve", json.dumps(self.limits)
        serve = Program.forked(f"instance {instance_id}", module, argument, settings=own)
        self._programs.append(serve)
        return serve

    def add_beside(
        self, instance_id: str, runtime: Program | None, settings: Mapping[str, str]
    ) -> Instance:
        """Start an instance beside a runtime, and wait until it serves."""
        serve = self.start_serve(instance_id, settings)
        match = serve.wait_line(READY, timeout_s=START_TIMEOUT_S)
        port, peer_port = int(match.group(1)), int(match.group(2))
        all_settings = {**self.settings, **settings}
        instance = Instance(
            instance_id,
            runtime,
            serve,
            port,
            peer_port,
            channel_to(port, credentials=self.credentials),
            all_settings,
            self.peer_credentials,
        )
        self.instances.append(instance)
        self.wait_acquainted()
        return instance

    def wait_acquainted(self) -> None:
        """Return when all instances that run know of each other."""
        running = [each for each in self.instances if each.serve.process.poll() is None]
        for instance in running:
            eventually(partial(instance.knows, len(running)), what="instances know each other")

    def close(self) -> None:
        """End everything."""
        for instance in self.instances:
            instance.close()
        for program in self._programs:
            program.close()
        shutil.rmtree(self._directory)


def _split_place(args: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    if args and not args[0].startswith("-"):
        return args[0], args[1:]
    return None, args


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


def channel_to(*ports: int, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """Answer a grpcio channel that shares no connection with others and repeats no call; it goes to
    the first of these ports that somebody listens on. With credentials it speaks TLS, and takes
    whom it finds for "localhost".
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", 64 * 2**20),
        ("grpc.max_send_message_length", 64 * 2**20),
    ]
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    if credentials is None:
        return grpc.insecure_channel(f"ipv4:{addresses}", options=options)
    options.append(("grpc.ssl_target_name_override", "localhost"))
    return grpc.secure_channel(f"ipv4:{addresses}", credentials, options=options)


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Answer with which status and text a call fails."""
    try:
        answer = call()
    except grpc.RpcError as exc:
        return exc.code(), exc.details() or ""
    raise AssertionError(f"it did not fail: {answer}")


def record_of(records: Mapping[str, str], name: str) -> dict[str, Any]:
    """Answer a record of a table as its JSON."""
    decoded = json.loads(records[name])
    assert isinstance(decoded, dict)
    return decoded


@contextmanager
def mesh_of(kv_store: str, settings: Mapping[str, str], service_name: str) -> Iterator[Mesh]:
    """A mesh that is taken down at the end."""
    mesh = Mesh(kv_store, settings, service_name)
    try:
        yield mesh
    finally:
        mesh.close()
