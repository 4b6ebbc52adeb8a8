"""What a call through the wire costs, beside HAProxy, nginx and nghttpx, in one run.

    python bench/wire.py [--quick] [--repeat 5] [--only wire,haproxy]

One thread for each, one constant upstream (``bench/upstream.c``), h2load as the client; contenders
take turns in alternating order, and figures are medians. CPU is the process's own clock, so it is
what to trust where cores are shared. A contender that is not installed is left out and named. Fails
if the client or the upstream, not the proxy, was what limited a rate, and if an answer was not
a whole message with grpc-status 0 (the upstream answers nothing else; the bytes are counted).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PATH = "/bench.Service/Method"
MODEL = "bench-model__isvc-0123456789"
MESSAGE = b"\0\0\0\0\xc8" + bytes(200)
REPLY_BYTES = 10
#: Share of a core from which on a process is said to limit the rate.
BUSY = 0.95


def free_port() -> int:
    """Answer a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_listening(port: int) -> None:
    """Return when somebody does."""
    deadline_s = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def cpu_s(pids: list[int]) -> float:
    """Answer the CPU time that processes have taken so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """Answer a process and its children: masters leave the work to workers."""
    found = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    return [pid, *(int(each) for each in found)]


# --- contenders --------------------------------------------------------------------------------


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


def wire_command(_directory: Path, port: int, upstream: int, models: int) -> list[str]:
    """This file again, as a process with nothing but the wire."""
    return [sys.executable, __file__, "--serve", str(port), str(upstream), str(models)]


def haproxy_command(directory: Path, port: int, upstream: int, _models: int) -> list[str]:
    """HAProxy with one thread."""
    config = directory / "haproxy.cfg"
    config.write_text(
        "global\n  nbthread 1\n  maxconn 4000\n"
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
        f"frontend f\n  bind 127.0.0.1:{port} proto h2\n  default_backend b\n"
        f"backend b\n  http-reuse always\n  server s 127.0.0.1:{upstream} proto h2\n"
    )
    return ["haproxy", "-f", str(config)]


def nginx_command(directory: Path, port: int, upstream: int, _models: int) -> list[str]:
    """Nginx with one worker."""
    config = directory / "nginx.conf"
    config.write_text(
        "worker_processes 1;\ndaemon off;\nmaster_process off;\n"
        f"pid {directory}/nginx.pid;\nerror_log {directory}/nginx.log;\n"
        "events { worker_connections 4096; }\nhttp {\n access_log off;\n"
        f" client_body_temp_path {directory}/b; proxy_temp_path {directory}/p;\n"
        f" fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u;\n"
        f" scgi_temp_path {directory}/s; client_max_body_size 64m; keepalive_requests 100000000;\n"
        " http2_max_requests 100000000;\n"
        f" upstream u {{ server 127.0.0.1:{upstream}; keepalive 64; "
        "keepalive_requests 100000000; }\n"
        f" server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass grpc://u; }} }}\n}}\n"
    )
    return ["nginx", "-c", str(config)]


def nghttpx_command(directory: Path, port: int, upstream: int, _models: int) -> list[str]:
    """Nghttpx with one worker."""
    config = directory / "nghttpx.conf"
    config.write_text("")
    return [
        "nghttpx",
        f"--conf={config}",
        f"--frontend=127.0.0.1,{port};no-tls",
        f"--backend=127.0.0.1,{upstream};;proto=h2",
        "--workers=1",
        "--accesslog-file=/dev/null",
        "--errorlog-file=/dev/null",
    ]


Command = Callable[[Path, int, int, int], list[str]]
CONTENDERS: dict[str, Command] = {
    "wire": wire_command,
    "haproxy": haproxy_command,
    "nghttpx": nghttpx_command,
    "nginx": nginx_command,
}


def serve(port: int, upstream: int, models: int) -> None:
    """Be the wire: a table of so many ready models, the bench's among them."""
    from mm.table import CopyState, Table
    from mm.wire import Role, Wire, WireSettings
    from mm.wire.addresses import Target, inet_sockaddr

    table = Table(10 * models)
    for model_id in (MODEL, *(f"other-{each:07}__isvc-0123456789" for each in range(models - 1))):
        table.put(model_id, 1, 1)
        table.set_state(model_id, CopyState.READY)
    kept = []

    def tier2(_role: Role, _own: bool) -> socket.socket:
        ours, theirs = socket.socketpair()
        kept.append(ours)
        return theirs

    wire = Wire(1, tier2)
    wire.start(WireSettings(table=table))
    wire.set_runtime(Target(f"127.0.0.1:{upstream}", inet_sockaddr("127.0.0.1", upstream)))
    wire.listen(socket.create_server(("127.0.0.1", port), backlog=1024), Role.EXTERNAL)
    asyncio.new_event_loop().run_forever()


# --- the client --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What h2load does."""

    name: str
    connections: int
    streams: int
    calls: int
    message: bytes = MESSAGE


@dataclass(frozen=True, slots=True)
class Result:
    """One run of it."""

    rate: float
    cpu_us: float
    p50_us: float
    p99_us: float
    limited_by: str


def run(load: Load, port: int, pids: dict[str, list[int]], directory: Path) -> Result:
    """Send the calls, and tell what they cost; raises ``SystemExit`` for a wrong answer."""
    body, log = directory / "body", directory / "log"
    body.write_bytes(load.message)
    log.unlink(missing_ok=True)
    command = ["h2load", f"-n{load.calls}", f"-c{load.connections}", f"-m{load.streams}"]
    command += ["-t1", "-d", str(body), "--log-file", str(log)]
    command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    command += ["-H", f"mm-model-id: {MODEL}", f"http://127.0.0.1:{port}{PATH}"]
    before = {name: cpu_s(each) for name, each in pids.items()}
    own_s, began_s = os.times(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s, own_after_s = time.monotonic() - began_s, os.times()
    used = {name: cpu_s(each) - before[name] for name, each in pids.items()}
    used["h2load"] = (own_after_s.children_user + own_after_s.children_system) - (
        own_s.children_user + own_s.children_system
    )
    check(load, done.stdout)
    times_us = sorted(int(line.split("\t")[2]) for line in log.read_text().splitlines())
    busiest = max(used, key=lambda name: used[name])
    return Result(
        rate=load.calls / wall_s,
        cpu_us=used["proxy"] / load.calls * 1e6,
        p50_us=times_us[len(times_us) // 2],
        p99_us=times_us[len(times_us) * 99 // 100],
        limited_by=busiest if used[busiest] > BUSY * wall_s else "",
    )


def check(load: Load, output: str) -> None:
    """Refuse a run in which anything but whole answers came."""
    good = re.search(r"(\d+) succeeded, 0 failed, 0 errored, 0 timeout", output)
    data = re.search(r"\((\d+)\) data", output)
    expected = load.calls * REPLY_BYTES
    if good is None or int(good[1]) != load.calls or data is None or int(data[1]) != expected:
        raise SystemExit(f"{load.name}: not every call was answered as it should be\n{output}")


# --- the table ---------------------------------------------------------------------------------


def measure(names: list[str], loads: list[Load], repeat: int, models: int) -> int:
    """Run all loads against all contenders in turns; print the table."""
    results: dict[tuple[str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="mm-bench-wire-") as name:
        directory = Path(name)
        binary = directory / "upstream"
        source = ROOT / "bench" / "upstream.c"
        subprocess.run(["cc", "-O2", "-o", binary, source, "-lnghttp2"], check=True)
        for round_ in range(repeat):
            order = ["direct", *names]
            for contender in order if round_ % 2 == 0 else order[::-1]:
                for load, result in one_turn(contender, loads, models, directory, binary):
                    results.setdefault((load.name, contender), []).append(result)
    return show(results, ["direct", *names], loads)


def one_turn(
    contender: str, loads: list[Load], models: int, directory: Path, binary: Path
) -> Iterator[tuple[Load, Result]]:
    """Start a contender and its upstream anew, warm both up, and run every load once."""
    with started([str(binary)], stdout=subprocess.PIPE) as upstream:
        assert upstream.stdout is not None
        upstream_port = int(upstream.stdout.readline())
        if contender == "direct":
            pids = {"proxy": [upstream.pid]}
            for load in loads:
                yield load, run(load, upstream_port, pids, directory)
            return
        port = free_port()
        command = CONTENDERS[contender](directory, port, upstream_port, models)
        with started(command, stderr=subprocess.DEVNULL) as proxy:
            wait_listening(port)
            pids = {"proxy": family(proxy.pid), "upstream": [upstream.pid]}
            warm = Load("warm", 8, 16, 5000)
            run(warm, port, pids, directory)
            for load in loads:
                yield load, run(load, port, pids, directory)


def show(results: dict[tuple[str, str], list[Result]], names: list[str], loads: list[Load]) -> int:
    """Print medians; answer 1 if something else than the proxy was the limit."""
    limited = []
    for load in loads:
        print(f"\n{load.name}")
        print(f"{'':10}{'calls/s':>10}{'CPU us':>8}{'p50 us':>8}{'p99 us':>9}")
        for name in names:
            each = results[load.name, name]
            print(
                f"{name:10}"
                f"{statistics.median(one.rate for one in each):10.0f}"
                f"{statistics.median(one.cpu_us for one in each):8.1f}"
                f"{statistics.median(one.p50_us for one in each):8.0f}"
                f"{statistics.median(one.p99_us for one in each):9.0f}"
            )
            others = [one.limited_by for one in each if one.limited_by not in ("", "proxy")]
            if name != "direct" and len(others) * 2 > len(each):
                limited.append(f"{load.name}, {name}: {others[0]} was the limit, not the proxy")
    print(*limited, sep="\n")
    return 1 if limited else 0


def main() -> int:
    """Answer what the shell gets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer calls, one round")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--models", type=int, default=1, help="in the table (%(default)s)")
    parser.add_argument("--only", default=",".join(CONTENDERS))
    parser.add_argument("--serve", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return 0
    scale = 10 if arguments.quick else 1
    loads = [
        Load("8 connections x 16", 8, 16, 200_000 // scale),
        Load("32 connections x 1", 32, 1, 100_000 // scale),
        Load("one call at a time", 1, 1, 20_000 // scale),
    ]
    names = []
    for name in arguments.only.split(","):
        if name == "wire" or shutil.which(name):
            names.append(name)
        else:
            print(f"{name} is not installed: left out")
    if not shutil.which("h2load"):
        raise SystemExit("h2load is missing: apt-get install nghttp2-client")
    return measure(names, loads, 1 if arguments.quick else arguments.repeat, arguments.models)


if __name__ == "__main__":
    sys.exit(main())
