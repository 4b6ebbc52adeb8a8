"""The processes of ``bench/wire.py``: upstreams, proxies and clients, and what their clocks say.

Owns starting and ending them. What is asked of them is in ``_wire_loads.py``.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

HOST = "127.0.0.1"
#: What ``caller.c`` calls its models, the most popular one first.
MODEL_FORMAT = "model-{:07}__isvc-0123456789"
MODEL = MODEL_FORMAT.format(0)
START_TIMEOUT_S = 30.0
#: Of clients to one proxy, where there are many.
CONNECTIONS_MAX = 12_000
#: Programs from elsewhere -> the package of Debian and Ubuntu that has them.
PACKAGES = {
    "h2load": "nghttp2-client",
    "haproxy": "haproxy",
    "nghttpx": "nghttp2-proxy",
    "nginx": "nginx-light",
    "cc": "gcc",
    "openssl": "openssl",
}


def need(programs: list[str], *, installs: bool) -> None:
    """See that programs are there; raises ``SystemExit`` with what to do if not."""
    missing = [PACKAGES[name] for name in programs if shutil.which(name) is None]
    if missing and installs:
        subprocess.run(["apt-get", "install", "-y", *missing], check=True)
    elif missing:
        raise SystemExit(f"missing: run with --install, or apt-get install {' '.join(missing)}")


def build(directory: Path) -> None:
    """Compile the upstream and the caller."""
    for name in ("upstream", "caller"):
        command = ["cc", "-O2", "-o", directory / name, HERE / f"{name}.c", "-lnghttp2"]
        subprocess.run(command, check=True)


def key_file(directory: Path) -> Path:
    """Answer a file with a key (RSA, 2048 bits) and its certificate; makes one if need be."""
    path, certificate = directory / "key.pem", directory / "certificate.pem"
    if not path.exists():
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench"]
        command += ["-days", "2", "-keyout", str(path), "-out", str(certificate)]
        subprocess.run(command, check=True, capture_output=True)
        path.write_bytes(path.read_bytes() + certificate.read_bytes())
    return path


def free_port() -> int:
    """Answer a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def wait_listening(port: int) -> None:
    """Return when somebody does. Raises ``OSError`` when nobody does for long."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection((HOST, port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def cpu_s(pids: list[int]) -> float:
    """Answer the processor time that processes have taken so far, by their own clocks."""
    # The kernel's way to name the clock of a process, as clock_getcpuclockid(3) makes it.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def family(pid: int) -> list[int]:
    """Answer a process and its children: masters leave the work to workers."""
    found = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    return [pid, *(int(each) for each in found)]


@contextmanager
def started(command: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """Run a process until the block ends."""
    process = subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def upstream_of(directory: Path, kind: str) -> Iterator[tuple[int, int]]:
    """Run the upstream that is "constant" or an "echo"; answers its port and process id."""
    with started([str(directory / "upstream"), kind], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid


# --- proxies: where each listens, and its command, in the order of their start ------------------

Command = tuple[int, list[str]]
Chain = Callable[[Path, int, int], list[Command]]


def wire(*, models: int = 1, hops: int = 0, tls: bool = False) -> Chain:
    """Nothing but the wire, with so many models in its table; or one instance before another."""

    def commands(directory: Path, port: int, upstream: int) -> list[Command]:
        inner = free_port() if hops else port
        serve = [sys.executable, __file__]
        place = "peer" if hops else "here"
        key = [str(key_file(directory))] if tls else []
        found = [(inner, [*serve, str(inner), str(upstream), str(models), place, *key])]
        if hops:
            found.append((port, [*serve, str(port), str(inner), str(models), "there"]))
        return found

    return commands


def python(_directory: Path, port: int, upstream: int) -> list[Command]:
    """The Python data plane, with the shortest router there is."""
    command = [sys.executable, str(HERE / "proxy.py"), "--serve", "mm", str(upstream), str(port)]
    return [(port, command)]


def haproxy(*, connections: int = 4000, tls: bool = False) -> Chain:
    """HAProxy with one thread, for so many clients."""

    def commands(directory: Path, port: int, upstream: int) -> list[Command]:
        config = directory / "haproxy.cfg"
        speaks = f"ssl crt {key_file(directory)} alpn h2" if tls else "proto h2"
        config.write_text(
            # It asks for two files a client, which it needs only if it shares no connections.
            f"global\n  nbthread 1\n  maxconn {connections}\n  no strict-limits\n"
            "defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n"
            "  timeout server 60s\n"
            f"frontend f\n  bind {HOST}:{port} {speaks}\n  default_backend b\n"
            f"backend b\n  http-reuse always\n  server s {HOST}:{upstream} proto h2\n"
        )
        return [(port, ["haproxy", "-f", str(config)])]

    return commands


def nginx(directory: Path, port: int, upstream: int) -> list[Command]:
    """Nginx with one worker."""
    config = directory / "nginx.conf"
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = " ".join(f"{name}_temp_path {directory}/{name};" for name in paths)
    config.write_text(
        "worker_processes 1;\ndaemon off;\nmaster_process off;\n"
        f"pid {directory}/nginx.pid;\nerror_log {directory}/nginx.log;\n"
        f"events {{ worker_connections 4096; }}\nhttp {{\n access_log off;\n {places}\n"
        " client_max_body_size 64m; keepalive_requests 100000000;\n"
        f" upstream u {{ server {HOST}:{upstream}; keepalive 64; keepalive_requests 100000000; }}\n"
        f" server {{ listen {HOST}:{port} http2; location / {{ grpc_pass grpc://u; }} }}\n}}\n"
    )
    return [(port, ["nginx", "-c", str(config)])]


def nghttpx(directory: Path, port: int, upstream: int) -> list[Command]:
    """Nghttpx with one worker."""
    config = directory / "nghttpx.conf"
    config.write_text("")
    command = ["nghttpx", f"--conf={config}", f"--frontend={HOST},{port};no-tls", "--workers=1"]
    command += [f"--backend={HOST},{upstream};;proto=h2"]
    return [(port, [*command, "--accesslog-file=/dev/null", "--errorlog-file=/dev/null"])]


CHAINS: dict[str, Chain] = {
    "wire": wire(),
    "wire, 2 instances": wire(hops=1),
    "wire, 100,000 models": wire(models=100_000),
    "python": python,
    "haproxy": haproxy(),
    "nghttpx": nghttpx,
    "nginx": nginx,
    "wire, TLS": wire(tls=True),
    "haproxy, TLS": haproxy(tls=True, connections=CONNECTIONS_MAX),
    "haproxy, crowded": haproxy(connections=CONNECTIONS_MAX),
}
#: What each takes from elsewhere.
PROGRAMS = {name: [name] for name in ("haproxy", "nghttpx", "nginx")}


@contextmanager
def proxy_of(contender: str, directory: Path, upstream: int) -> Iterator[tuple[int, list[int]]]:
    """Run a contender before an upstream; answers its port and its process ids."""
    port = free_port()
    running = []
    try:
        for listens_on, command in CHAINS[contender](directory, port, upstream):
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            running.append(process)
            wait_listening(listens_on)
        yield port, [pid for process in running for pid in family(process.pid)]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve(port: int, upstream: int, models: int, place: str, key: Path | None) -> None:
    """Be a wire whose models are "here" for clients, here for a "peer", or all "there"; one that
    speaks TLS if there is a key.
    """
    from mm.core.histograms import MESSAGE_BYTES, TIME_MS
    from mm.edge.tls import CIPHERS
    from mm.table import CopyState, Table
    from mm.wire import Measures, Role, Wire, WireSettings, WireTls
    from mm.wire._wire import TlsContext
    from mm.wire.addresses import Target, inet_sockaddr
    from mm.wire.client_limits import ClientLimits

    table = Table(10 * models)
    handle = table.add_instance("holder")
    for model_id in (MODEL_FORMAT.format(each) for each in range(models)):
        if place == "there":
            table.set_peers(model_id, [handle])
        else:
            table.put(model_id, 1, 1)
            table.set_state(model_id, CopyState.READY)
    kept = []

    def tier2(_role: Role, _own: bool) -> socket.socket:
        ours, theirs = socket.socketpair()
        kept.append(ours)
        return theirs

    # Calls are measured as an instance does.
    measures = Measures(
        tuple(int(1000 * bound) for bound in TIME_MS), tuple(map(int, MESSAGE_BYTES))
    )
    tls = WireTls()
    if key is not None:
        pem = key.read_bytes()
        context = TlsContext(
            pem, pem, None, is_server=True, asks=False, demands=False, ciphers=CIPHERS
        )
        tls = WireTls(clients=context)
    clients = ClientLimits(connections_max=CONNECTIONS_MAX, per_address_max=CONNECTIONS_MAX)
    bench = Wire(1, tier2, measures)
    bench.start(WireSettings(table=table, instance=place.encode(), clients=clients, tls=tls))
    name, address = f"{HOST}:{upstream}", inet_sockaddr(HOST, upstream)
    if place == "there":
        bench.set_peers([Target(name, address, handle)])
    else:
        bench.set_runtime(Target(name, address))
    role = Role.PEER if place == "peer" else Role.EXTERNAL
    bench.listen(socket.create_server((HOST, port), backlog=1024), role)
    asyncio.new_event_loop().run_forever()


if __name__ == "__main__":
    numbers, given = [int(each) for each in sys.argv[1:4]], sys.argv[5:]
    serve(numbers[0], numbers[1], numbers[2], sys.argv[4], Path(given[0]) if given else None)
