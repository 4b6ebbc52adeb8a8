"""How `mm serve` ends when it cannot start: soon, with a code, and with one line that says why."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from mm.pb import mmesh
from tests.system.conftest import Pair
from tests.system.grpcio_runtime import MIB, GrpcioRuntime, grpcio_runtime
from tests.system.meshes import READY, mesh_of
from tests.system.processes import START_TIMEOUT_S, Program

pytestmark = pytest.mark.system

CANNOT_START, WRONG_SETTING = 1, 2
#: Generous where the point is that it ends at all.
END_TIMEOUT_S = 60.0
#: The time that a store gets which does not answer (`Limits.store_start_timeout_s`), and one that
#: refuses (`Limits.store_refused_timeout_s`).
STORE_LIMIT_S, REFUSED_LIMIT_S = 20.0, 2.5
#: The process has ended so soon after that, whatever machine this is; so it counts from when the
#: process began to ask: how long one takes to start is the machine's affair.
END_MAX_S = 5.0

Serve = Callable[..., Program]


@dataclass(frozen=True, slots=True)
class Silent:
    """An instance whose etcd takes connections and says nothing."""

    program: Program
    #: When it connected first.
    asked_s: Future[float]


@pytest.fixture(scope="module")
def silent_store() -> Iterator[Silent]:
    """From the first test on: it is to wait for twenty seconds, which other tests can use."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(START_TIMEOUT_S)
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def accept() -> float:
            stack.enter_context(server.accept()[0])
            return time.monotonic()

        asked_s = stack.enter_context(ThreadPoolExecutor(1)).submit(accept)
        program = Program.mm(
            "silent store", "serve", settings=alone({"KV_STORE": f"etcd:{address}"})
        )
        stack.callback(program.close)
        yield Silent(program, asked_s)


@pytest.fixture(scope="module")
def bad_file_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """An instance that waits five seconds for its file to be put right; other tests use them."""
    path = tmp_path_factory.mktemp("config") / "dataplane_api_config"
    path.write_text('{\n  "rpcConfigs": {},\n  "allowOthers": true\n}')
    program = Program.mm(
        "bad file", "serve", settings=alone({"MM_DATAPLANE_CONFIG_PATH": str(path)})
    )
    yield program
    program.close()


@pytest.fixture(scope="module", autouse=True)
def _begin_early(silent_store: Silent, bad_file_program: Program) -> None: ...


def alone(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of an instance that meets no other."""
    return {
        "KV_STORE": "memory",
        "MM_SERVICE_NAME": "alone",
        "MM_BIND_HOST": "127.0.0.1",
        "MM_ADVERTISE_ADDRESS": "127.0.0.1",
        "MM_SVC_GRPC_PORT": "0",
        "MM_PEER_PORT": "0",
        "MM_PROBE_PORT": "NONE",
        "MM_PRESTOP_WAIT_PORT": "NONE",
        "INTERNAL_GRPC_SOCKET_PATH": "/nonexistent/runtime.sock",
        **settings,
    }


@pytest.fixture
def serve() -> Iterator[Serve]:
    programs: list[Program] = []

    def start(**settings: str) -> Program:
        kept = {name: value for name, value in alone(settings).items() if value != "UNSET"}
        programs.append(Program.forked("serve", "mm", "serve", settings=kept))
        return programs[-1]

    yield start
    for program in programs:
        program.close()


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[GrpcioRuntime]:
    with grpcio_runtime(f"unix:{tmp_path}/runtime.sock") as runtime:
        yield runtime


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"KV_STORE": "UNSET"},
            "mm: KV_STORE is not set; allowed: etcd:<JSON file or host:port[,host:port...]>,"
            " embedded or memory",
        ),
        (
            {"KV_STORE": "etcd:localhost:2379", "MM_SERVICE_NAME": "UNSET"},
            "mm: MM_SERVICE_NAME is not set;",
        ),
        (
            {"MM_SVC_GRPC_PORT": "eighty"},
            'mm: MM_SVC_GRPC_PORT="eighty" is not valid; allowed: an integer from 0 to 65535',
        ),
        (
            {"KV_READ_ONLY": "maybe"},
            'mm: KV_READ_ONLY="maybe" is not valid; allowed: true or false',
        ),
        (
            {"KV_STORE": "etcd:/no/such/file.json"},
            "mm: KV_STORE=etcd:/no/such/file.json: there is no such file",
        ),
    ],
    ids=["missing", "missing name", "no port", "neither true nor false", "missing file"],
)
def test_settings(serve: Serve, settings: dict[str, str], complaint: str) -> None:
    """Every value that can be wrong is in tests/test_config.py; this is the process around it."""
    program = serve(**settings)
    assert program.wait_end(END_TIMEOUT_S) == WRONG_SETTING
    assert program.complaint.startswith(complaint)


@pytest.mark.parametrize("variable", ["MM_PEER_PORT", "MM_SVC_GRPC_PORT", "MM_MANAGEMENT_PORT"])
def test_port_in_use(serve: Serve, runtime: GrpcioRuntime, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = runtime.address.removeprefix("unix:")
        program = serve(**{variable: str(port), "INTERNAL_GRPC_SOCKET_PATH": path})
        assert program.wait_end(END_TIMEOUT_S) == CANNOT_START
    assert program.complaint == (
        f"mm: cannot listen on 127.0.0.1:{port} ({variable}): address already in use;"
        " choose another port, or 0 for a free one"
    )


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("203.0.113.7", "cannot assign requested address"),
        ("mm..local", "no such host"),
    ],
)
def test_address_that_is_not_ours(
    serve: Serve, runtime: GrpcioRuntime, host: str, why: str
) -> None:
    path = runtime.address.removeprefix("unix:")
    program = serve(MM_BIND_HOST=host, INTERNAL_GRPC_SOCKET_PATH=path)
    assert program.wait_end(END_TIMEOUT_S) == CANNOT_START
    assert program.complaint == (
        f"mm: cannot listen on {host}:0 (MM_BIND_HOST): {why};"
        " set an address of this machine, or 0.0.0.0 for all"
    )


# --- the store ----------------------------------------------------------------------------------


def test_nobody_listens_where_etcd_should_be(serve: Serve) -> None:
    """ModelMeshEtcdFailFastTest: the process ends soon, and not with 0."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    program = serve(KV_STORE=f"etcd:127.0.0.1:{port}")
    program.wait_line("the store does not answer yet")
    asked_s = time.monotonic()
    assert program.wait_end(END_TIMEOUT_S) == CANNOT_START
    assert program.ended_s - program.started_s >= REFUSED_LIMIT_S
    assert program.ended_s - asked_s < REFUSED_LIMIT_S + END_MAX_S
    assert program.complaint == (
        f"mm: Problem connecting to etcd: etcd at 127.0.0.1:{port}: connection refused"
        " (tried for 2.5 s; see KV_STORE)"
    )


# --- the runtime --------------------------------------------------------------------------------


def nonsense(**fields: object) -> mmesh.RuntimeStatusResponse:
    told = {
        "status": mmesh.RuntimeStatusResponseStatus.READY,
        "capacity_in_bytes": 1024 * MIB,
        "max_loading_concurrency": 4,
        "model_loading_timeout_ms": 30_000,
        "default_model_size_in_bytes": MIB,
        **fields,
    }
    return mmesh.RuntimeStatusResponse(**told)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        pytest.param(nonsense(capacity_in_bytes=0), "capacityInBytes 0", id="no capacity"),
        pytest.param(
            nonsense(capacity_in_bytes=MIB), f"capacityInBytes {MIB}", id="room for one model"
        ),
        pytest.param(
            nonsense(default_model_size_in_bytes=0), "defaultModelSizeInBytes 0", id="size 0"
        ),
        pytest.param(nonsense(max_loading_concurrency=0), "maxLoadingConcurrency 0", id="no loads"),
        pytest.param(nonsense(model_loading_timeout_ms=0), "modelLoadingTimeoutMs 0", id="no time"),
        pytest.param(
            nonsense(status=mmesh.RuntimeStatusResponseStatus.FAILING), "FAILING", id="failing"
        ),
    ],
)
def test_runtime_that_tells_nonsense(
    serve: Serve, runtime: GrpcioRuntime, status: mmesh.RuntimeStatusResponse, text: str
) -> None:
    runtime.status = status
    program = serve(INTERNAL_GRPC_SOCKET_PATH=runtime.address.removeprefix("unix:"))
    assert program.wait_end(END_TIMEOUT_S) == CANNOT_START
    assert "model runtime" in program.complaint
    assert text in program.complaint


def test_what_listens_is_no_runtime(serve: Serve, pair: Pair) -> None:
    """The port of some other gRPC server: neither of the services is implemented there."""
    program = serve(INTERNAL_GRPC_SOCKET_PATH="UNSET", INTERNAL_GRPC_PORT=str(pair.holder.port))
    assert program.wait_end(END_TIMEOUT_S) == CANNOT_START
    assert "is no model runtime" in program.complaint


def test_runtime_that_comes_late(kv_store: str, new_service_name: Callable[[], str]) -> None:
    """Absent is waited for, and no client is let in meanwhile; the 180 s are the mesh's tests'."""
    with mesh_of(kv_store, {}, new_service_name()) as mesh:
        path = mesh.socket_path("late")
        program = mesh.start_serve("late", {"INTERNAL_GRPC_SOCKET_PATH": path})
        program.wait_line("connected to etcd")
        assert "ready" not in program.output()
        with grpcio_runtime(f"unix:{path}"):
            program.wait_line(READY)


def test_stopped_while_it_waits(serve: Serve) -> None:
    program = serve()
    program.wait_line("KV_STORE=memory")
    program.terminate()
    assert program.wait_end(END_TIMEOUT_S) == 0
    assert "Traceback" not in program.output()


def test_a_data_plane_file_that_cannot_be_used(bad_file_program: Program) -> None:
    assert bad_file_program.wait_end(END_TIMEOUT_S) == CANNOT_START
    complaint = bad_file_program.complaint
    assert complaint.startswith("mm: data-plane configuration file /")
    assert "dataplane_api_config: Object contains unknown field `allowOthers`" in complaint


def test_etcd_that_does_not_answer(silent_store: Silent) -> None:
    """The last of the module: it has been waiting since the first."""
    program = silent_store.program
    assert program.wait_end(STORE_LIMIT_S + END_TIMEOUT_S) == CANNOT_START
    assert program.ended_s - program.started_s >= STORE_LIMIT_S
    assert program.ended_s - silent_store.asked_s.result() < STORE_LIMIT_S + END_MAX_S
    assert program.complaint.startswith("mm: Problem connecting to etcd: etcd at 127.0.0.1:")
    assert program.complaint.endswith("(tried for 20 s; see KV_STORE)")
