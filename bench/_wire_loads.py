"""What ``bench/wire.py`` asks of a proxy, and what a run of it showed.

Owns running h2load and ``caller.c`` and checking what they got; any answer that is not whole ends
the benchmark. Who is asked is in ``_contenders.py``.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from _contenders import HOST, MODEL, cpu_s

PATH = "/bench.Service/Method"
UNARY_BYTES, REPLY_BYTES = 205, 10
#: Share of a core from which on another process than the proxy is said to limit a rate.
BUSY = 0.95


class NotMeasuredError(Exception):
    """Something else than what was to be measured set the figures; the text says what."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a client does."""

    name: str
    connections: int
    streams: int
    calls: int
    #: Of requests, with the five bytes before a message.
    request_bytes: int = UNARY_BYTES
    upstream: str = "constant"
    #: Calls a second of all connections; 0: as many as there can be.
    rate: float = 0.0
    #: "h2load", or "caller": ours looks at every trailer and costs less, but knows no rates.
    client: str = "caller"
    #: Called by Zipf's law; 0: one, whose id HPACK may index.
    models: int = 0
    #: Of a stream; 0: calls with one.
    messages: int = 0
    is_tls: bool = False

    @property
    def reply_bytes(self) -> int:
        """What has to come back."""
        return self.request_bytes if self.upstream == "echo" else REPLY_BYTES

    @property
    def exchanges(self) -> int:
        """Answers in all: to calls, or to messages of streams."""
        return self.calls * max(1, self.messages)


@dataclass(frozen=True, slots=True)
class Result:
    """One run of it."""

    #: Answers a second, and the processor time that each took of the proxy.
    rate: float
    cpu_us: float
    p50_us: float
    p99_us: float
    #: Of a core, by process.
    shares: dict[str, float]
    #: Of all processors, what went to processes that are none of ours.
    others: float

    @property
    def limited_by(self) -> str:
        """Answer which process, if not the proxy, was what limited the rate."""
        others = {name: share for name, share in self.shares.items() if name != "proxy"}
        name = max(others, key=lambda each: others[each])
        return name if others[name] > BUSY and others[name] > self.shares["proxy"] else ""


@dataclass(slots=True)
class Results:
    """All runs: by load and contender, one a round."""

    runs: dict[tuple[str, str], list[Result]] = field(default_factory=lambda: defaultdict(list))

    def median(self, load: str, contender: str, what: str) -> float:
        """Answer the median of a figure."""
        return statistics.median(getattr(each, what) for each in self.runs[load, contender])

    def ratio(self, load: str, one: str, other: str, what: str) -> float:
        """Answer the median of the rounds' ratios: what changes between rounds falls out."""
        pairs = zip(self.runs[load, one], self.runs[load, other], strict=True)
        return statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs)

    def added_us(self, load: str, contender: str, what: str) -> float:
        """Answer what a contender adds to a latency."""
        pairs = zip(self.runs[load, contender], self.runs[load, "direct"], strict=True)
        return statistics.median(getattr(a, what) - getattr(b, what) for a, b in pairs)


def h2load_command(load: Load, port: int, directory: Path) -> list[str]:
    """Answer how h2load does it; it logs each call to ``log``."""
    body, log = directory / "body", directory / "log"
    body.write_bytes(b"\0" + (load.request_bytes - 5).to_bytes(4) + bytes(load.request_bytes - 5))
    log.unlink(missing_ok=True)
    command = ["h2load", f"-n{load.calls}", f"-c{load.connections}", f"-m{load.streams}"]
    command += ["-t1", "-d", str(body), "--log-file", str(log)]
    if load.rate:
        command += [f"--rps={load.rate / load.connections:.0f}"]
    for header in ("content-type: application/grpc", "te: trailers", f"mm-model-id: {MODEL}"):
        command += ["-H", header]
    if load.is_tls:
        # The one that any two agree on, so that all do the same.
        command += ["--tls13-ciphers=TLS_AES_128_GCM_SHA256", "--groups=X25519"]
    return [*command, f"{'https' if load.is_tls else 'http'}://{HOST}:{port}{PATH}"]


def run(load: Load, port: int, pids: dict[str, list[int]], directory: Path) -> Result:
    """Send the calls, and tell what they cost; raises ``SystemExit`` for a wrong answer."""
    if load.client == "caller":
        sizes = (load.connections, load.streams, load.calls, load.models, load.messages)
        command = [str(directory / "caller"), str(port), *map(str, sizes)]
    else:
        command = h2load_command(load, port, directory)
    busy_s = machine_s()
    before = {name: cpu_s(each) for name, each in pids.items()}
    own, began_s = os.times(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    busy_s = machine_s() - busy_s
    wall_s, own_after = time.monotonic() - began_s, os.times()
    used = {name: cpu_s(each) - before[name] for name, each in pids.items()}
    used["client"] = (own_after.children_user + own_after.children_system) - (
        own.children_user + own.children_system
    )
    if load.client == "caller":
        seconds, p50_us, p99_us = read_caller(load, done)
    else:
        seconds, p50_us, p99_us = read_h2load(load, done.stdout, directory)
    return Result(
        rate=load.exchanges / seconds,
        cpu_us=used["proxy"] / load.exchanges * 1e6,
        p50_us=p50_us,
        p99_us=p99_us,
        shares={name: each / wall_s for name, each in used.items()},
        others=max(0.0, busy_s - sum(used.values())) / wall_s / (os.cpu_count() or 1),
    )


def machine_s() -> float:
    """Answer the processor time that anybody has taken since the machine started."""
    fields = [int(each) for each in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def read_caller(load: Load, done: subprocess.CompletedProcess[str]) -> tuple[float, float, float]:
    """Answer the seconds and the latencies that ``caller.c`` prints."""
    if done.returncode:
        raise SystemExit(f"{load.name}: {done.stderr}")
    seconds, _, p50_us, p99_us = done.stdout.split()
    return float(seconds), float(p50_us), float(p99_us)


def read_h2load(load: Load, output: str, directory: Path) -> tuple[float, float, float]:
    """Answer the same; refuses a run in which anything but whole answers came.

    h2load does not look at trailers, but of this upstream no answer has a body without them, and
    what a proxy answers by itself has none.
    """
    good = re.search(r"(\d+) succeeded, 0 failed, 0 errored, 0 timeout", output)
    data = re.search(r"\((\d+)\) data", output)
    time_taken = re.search(r"finished in ([\d.]+)(us|ms|s)", output)
    expected = load.calls * load.reply_bytes
    if good is None or int(good[1]) != load.calls or data is None or int(data[1]) != expected:
        raise SystemExit(f"{load.name}: not every call was answered as it should be\n{output}")
    assert time_taken is not None
    seconds = float(time_taken[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[time_taken[2]]
    times_us = sorted(each for _, each in read_log(directory))
    return seconds, times_us[len(times_us) // 2], times_us[len(times_us) * 99 // 100]


def read_log(directory: Path) -> list[tuple[int, int]]:
    """Answer when each call of h2load began, in us since 1970, and how many us it took."""
    found = []
    for line in (directory / "log").read_text().splitlines():
        began, status, took = line.split("\t")[:3]
        if status != "200":
            raise SystemExit(f"a call ended with status {status}")
        found.append((int(began), int(took)))
    return found
