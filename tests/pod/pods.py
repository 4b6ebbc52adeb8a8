"""Pods as the modelmesh-serving controller makes them, on one machine (interop 3).

A pod is a directory with what would be mounted, a fake runtime behind two sockets, an address of
its own (all of 127.0.0.0/8 is this machine, so each pod has the very ports that the controller
knows), and `mm serve` with the controller's environment. ``MM_BIND_HOST`` is the one variable that
real pods do not have. Kubelet's probes and hooks are methods.
"""

from __future__ import annotations

import functools
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import Any, Final

import betterproto2
import grpc

from tests.identities import Identity
from tests.pod import tables
from tests.pod.adapter import Adapter, serving
from tests.pod.tables import Probe, Runtime
from tests.sanitizers import FINDINGS
from tests.system.etcd import Keys
from tests.system.processes import Program, eventually

ROOT: Final = Path(__file__).parents[2]
UID: Final = 1000
CALL_TIMEOUT_S: Final = 60.0
#: A generous kubelet, for machines that have other work; the tests know the real times.
SLOWNESS: Final = 30.0


class Pod:
    """One pod; ``adapter`` is its runtime, ``mm`` the process in its container."""

    def __init__(self, name: str, ip: str, runtime: Runtime, directory: Path) -> None:
        self.name = name
        self.ip = ip
        self.runtime = runtime
        self.adapter = Adapter(runtime)
        self.directory = directory
        self.mm: Program | None = None
        self.settings: dict[str, str] = {}
        self._values: dict[str, str] = {}
        self.channel = channel_to(f"{ip}:{tables.GRPC_PORT}")
        self._stack = ExitStack()
        for each in ("config", "etcd", "sockets", "tls"):
            (directory / each).mkdir(parents=True)
        # Any user of the pod, as an emptyDir.
        directory.chmod(0o755)
        self.termination_log = directory / "termination-log"
        self.termination_log.touch()
        self.termination_log.chmod(0o666)

    @property
    def instance_id(self) -> str:
        """As users are told it."""
        return self.name[-12:]

    def secure(self, identity: Identity) -> None:
        """Mount a TLS secret, and call as the controller does: it shows the server's own
        certificate, and trusts no other (1.5).
        """
        files = {"tls.crt": identity.certificate_pem, "tls.key": identity.key_pem()}
        self.mount("tls", {name: text.decode() for name, text in files.items()})
        self._values = {"tls_directory": str(self.directory / "tls"), "tls_client_auth": "require"}
        self.channel.close()
        crt, key = files["tls.crt"], files["tls.key"]
        shown = grpc.ssl_channel_credentials(crt, key, crt)
        self.channel = channel_to(f"{self.ip}:{tables.GRPC_PORT}", shown)

    def start(self, settings: Mapping[str, str], *, by_port: bool = False) -> None:
        """Start the runtime and `mm`; returns at once."""
        sockets = self.directory / "sockets"
        management, data = (str(sockets / each) for each in ("adapter.sock", "server.sock"))
        values = {
            **self._values,
            "pod_name": self.name,
            "pod_ip": self.ip,
            "host_ip": f"192.0.2.{self.ip.rpartition('.')[2]}",
            "labels": ",".join(self.runtime.labels),
            "etcd_directory": str(self.directory / "etcd"),
            "config_directory": str(self.directory / "config"),
        }
        if by_port:
            places = "127.0.0.1:0", "127.0.0.1:0"
            ports = self._stack.enter_context(serving(self.adapter, *places))
            values |= {"management_port": str(ports[0]), "data_port": str(ports[1])}
        else:
            self._stack.enter_context(serving(self.adapter, f"unix:{management}", f"unix:{data}"))
            for path in (management, data):
                os.chmod(path, 0o777)
            values |= {"management_socket": management, "data_socket": data}
        self.settings = {
            **tables.environment(values),
            "MM_BIND_HOST": self.ip,
            "LL_TERMINATION_MSG_PATH": str(self.termination_log),
            "HOME": "/",
            **settings,
        }
        arguments = [str(UID), str(self.directory), str(self.termination_log)]
        arguments += filter(None, [os.environ.get(FINDINGS)])
        name = f"mm of {self.name}"
        self.mm = Program.forked(name, "tests.pod.contained", *arguments, settings=self.settings)

    @property
    def program(self) -> Program:
        """The process, which was started."""
        assert self.mm is not None
        return self.mm

    @property
    def pid(self) -> int:
        """The process id of `mm`."""
        return int(self.program.process.pid)

    def mount(self, volume: str, files: Mapping[str, str]) -> None:
        """Show a Secret or ConfigMap as kubelet does: links into a directory that is exchanged."""
        directory = self.directory / volume
        made = Path(tempfile.mkdtemp(prefix="..", dir=directory))
        made.chmod(0o755)
        for name, text in files.items():
            (made / name).write_text(text, encoding="utf-8")
            if not (directory / name).is_symlink():
                (directory / name).symlink_to(Path("..data", name))
        fresh = directory / "..data_tmp"
        fresh.symlink_to(made.name)
        before = (directory / "..data").resolve()
        fresh.rename(directory / "..data")
        if before.name != "..data":
            shutil.rmtree(before)

    # --- kubelet ---

    def probe(self, probe: Probe) -> int:
        """Answer the status that a probe or hook gets; 0 where nobody listens."""
        timeout_s = probe.timeout_s * SLOWNESS
        with closing(http.client.HTTPConnection(self.ip, probe.port, timeout_s)) as connection:
            try:
                connection.request("GET", probe.path, headers={"User-Agent": "kube-probe/1.31"})
                return connection.getresponse().status
            except ConnectionRefusedError:
                return 0

    def is_ready(self) -> bool:
        """Answer whether kubelet sends it clients."""
        return self.probe(tables.READINESS) == 200

    def delete(self) -> Termination:
        """Begin to end the pod as kubelet does: every container's hook first, at one time."""
        return Termination(self)

    def enter(self, context: AbstractContextManager[Any]) -> None:
        """Enter something that is left when the pod is closed."""
        self._stack.enter_context(context)

    def closing(self, work: Callable[[], None]) -> None:
        """Do something when the pod is closed."""
        self._stack.callback(work)

    def close(self) -> None:
        """End what runs of it."""
        self.channel.close()
        self._stack.close()
        if self.mm is not None:
            self.mm.close()

    # --- calls ---

    def call(
        self,
        method: str,
        request: betterproto2.Message | bytes,
        reply_type: type[betterproto2.Message] | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Any:
        """One unary call by grpcio; the answer's bytes where no type is given."""
        stub: Any = self.channel.unary_unary(
            method,
            request_serializer=bytes,
            response_deserializer=reply_type.parse if reply_type else None,
        )
        return stub(request, metadata=tuple(metadata), timeout=CALL_TIMEOUT_S)


class Termination:
    """The end of a pod: the hooks run, then each container whose hook has ended gets SIGTERM."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._pool = ThreadPoolExecutor()
        #: `/prestop` of the model server and of its adapter.
        self.hooks: list[Future[int]] = [
            self._pool.submit(pod.probe, tables.PRESTOP) for _ in range(2)
        ]
        eventually(lambda: pod.program.output().count("waits at /prestop") == 2, what="hooks")
        # Where the container's processes are seen: only that of this one.
        proc = pod.directory / "proc"
        own = proc / str(pod.pid)
        own.mkdir(parents=True)
        (own / "cmdline").write_bytes(b"/opt/mm/bin/python\0/opt/mm/bin/mm\0serve\0")
        (own / "status").symlink_to(f"/proc/{pod.pid}/status")
        (own / "exe").symlink_to(os.readlink(f"/proc/{pod.pid}/exe"))
        script = ROOT / "config/image" / Path(tables.STOP_SCRIPT).name
        self.stop = subprocess.Popen([script, "wait"], env={"MM_PROC": str(proc)})
        pod.closing(self._end)

    def _end(self) -> None:
        self.stop.kill()
        self.stop.wait(10)
        self._pool.shutdown(wait=False)

    def wait(self) -> int:
        """Answer the exit code of `mm`, when all is over; kubelet's SIGTERM finds nothing."""
        # Collected first: until then there is a process that the script waits for.
        code = self._pod.program.wait_end(CALL_TIMEOUT_S)
        assert self.stop.wait(CALL_TIMEOUT_S) == 0
        assert [hook.result(CALL_TIMEOUT_S) for hook in self.hooks] == [200, 200]
        self._pod.program.process.send_signal(signal.SIGTERM)
        return code


class Cluster:
    """Pods of one service over one etcd, and what the controller sees of it."""

    def __init__(self, endpoint: str, keys: Keys, number: int) -> None:
        self.keys = keys
        self.endpoint = endpoint
        self.root_prefix = f"modelmesh-serving-{number}"
        self.pods: list[Pod] = []
        self.runtimes: list[Runtime] = []
        self._directory = Path(tempfile.mkdtemp(prefix="mm-pods-"))
        self._directory.chmod(0o755)
        self.network = free_network()

    def add(
        self,
        runtime: Runtime,
        settings: Mapping[str, str] | None = None,
        *,
        pod_hash: str = "5d8f7b9c64",
        by_port: bool = False,
        tls: Identity | None = None,
    ) -> Pod:
        """Start a pod; returns at once. ``tls``: what the controller's TLS secret holds."""
        number = len(self.pods) + 2
        # As a Deployment names its pods: letters and digits that are no vowels.
        name = f"{tables.SERVICE_NAME}-{runtime.name}-{pod_hash}-q7x2{'bcdfghjkmnp'[number]}"
        pod = Pod(name, f"{self.network}.{number}", runtime, self._directory / str(number))
        self.pods.append(pod)
        pod.mount("etcd", {"etcd_connection": tables.etcd_secret(self.endpoint, self.root_prefix)})
        pod.mount("config", self.config_map())
        if tls is not None:
            pod.secure(tls)
        pod.start(settings or {}, by_port=by_port)
        return pod

    def config_map(self) -> dict[str, str]:
        """``tc-config``."""
        return {
            "type_constraints": json.dumps(tables.type_constraints(self.runtimes)),
            "dataplane_api_config": json.dumps(tables.DATAPLANE_CONFIG),
        }

    def pod_of(self, runtime: Runtime) -> Pod:
        """Answer the first pod of a runtime."""
        return next(pod for pod in self.pods if pod.runtime is runtime)

    def key(self, table: str, name: str = "") -> str:
        """Answer a key as the controller puts it together."""
        return f"{self.root_prefix}/mm/{tables.SERVICE_NAME}/{table}/{name}"

    def prefix(self, table: str) -> str:
        """Answer what the keys of a table begin with."""
        return self.key(table)

    def wait_ready(self) -> None:
        """Return when every pod gets clients, and all know each other."""
        for pod in self.pods:
            pod.program.wait_line("ready: instance ")
            eventually(pod.is_ready, timeout_s=2 * CALL_TIMEOUT_S, what=f"{pod.name} is ready")

    def close(self) -> None:
        """End everything."""
        for pod in self.pods:
            pod.close()
        shutil.rmtree(self._directory)


@functools.cache
def _networks() -> Iterator[int]:
    return itertools.count(os.getpid())


def free_network() -> str:
    """Answer the first three numbers of addresses of this machine that nobody else has: other
    clusters of this process least of all, also those of which some pods have ended.
    """
    for number in itertools.islice(_networks(), 10_000):
        network = f"127.{100 + number // 250 % 150}.{number % 250}"
        with closing(socket.socket()) as probe:
            try:
                probe.bind((f"{network}.2", tables.GRPC_PORT))
                return network
            except OSError:
                continue
    raise AssertionError("no address of this machine is free")


def channel_to(place: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """Answer a channel that shares no connection with others."""
    options: list[tuple[str, Any]] = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
    ]
    if credentials is not None:
        options.append(("grpc.ssl_target_name_override", tables.AUTHORITY))
        return grpc.secure_channel(place, credentials, options)
    return grpc.insecure_channel(place, options)


def listening_ports(pid: int) -> set[int]:
    """Answer the TCP ports that a process listens on."""
    return {port for port, _, _ in _connections(pid, "0A")}


def called_places(pid: int) -> set[tuple[str, int]]:
    """Answer where a process has connections to that it opened itself."""
    listened = listening_ports(pid)
    return {(ip, port) for own, ip, port in _connections(pid, "01") if own not in listened}


def _connections(pid: int, state: str) -> list[tuple[int, str, int]]:
    owned = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(each)
        if target.startswith("socket:["):
            owned.add(target[8:-1])
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[3] == state and fields[9] in owned:
            ip, _, port = fields[2].partition(":")
            text = ".".join(str(number) for number in reversed(bytes.fromhex(ip)))
            found.append((int(fields[1].partition(":")[2], 16), text, int(port, 16)))
    return found


def following(work: Callable[[], Any]) -> Future[Any]:
    """Do something in a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future
