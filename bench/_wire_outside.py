"""The rows of ``bench/wire.py`` for the port that faces anyone: TLS, handshakes, 10,000 clients.

The wire and HAProxy take turns in alternating order, each started anew: one thread each, the same
certificate (RSA, 2048 bits), TLS 1.3 with AES-128-GCM and X25519. Thousands of connections, and
handshakes, come from ``crowd.c``; each of its connections makes a call before it counts as open.
Memory is what a process has for itself (Private of smaps_rollup), so none of the kernel's for
sockets, which is the same for all.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from _contenders import HERE, cpu_s, proxy_of, started, upstream_of
from _goals import Goal
from _wire_loads import Load, NotMeasuredError, Result, Results, machine_s, run
from _wire_rows import OTHERS_MAX, scaled

CONNECTIONS = 10_000
#: Files that a process has besides those of its clients.
OTHER_FILES = 200
#: Connections that are being opened at a time.
AT_ONCE = 16
#: Before memory is looked at: whatever the first clients take once.
WARM_CONNECTIONS = 200
#: Of hits beside idle connections.
PROBE_RATE, PROBE_S = 500, 8
#: Of the crowd that calls once a second.
CROWD_S = 8
#: For a proxy to close what a crowd leaves.
SETTLE_S = 1.0
HANDSHAKES = {"full": 2_000, "resumed": 5_000}
#: Of its calls, or a proxy (or the machine) is said not to keep up with a crowd.
KEPT_UP_MIN = 0.95
PLAIN, TLS = ("wire", "haproxy, crowded"), ("wire, TLS", "haproxy, TLS")

Pids = dict[str, list[int]]
#: Does one round with a contender at a port; answers its results by name.
Turn = Callable[[str, int, Pids, int], dict[str, Result]]
#: The goals of a row, and what is wrong with its figures.
Found = tuple[list[Goal], list[str]]
Measure = Callable[[Path, int, float], Found]


# --- crowds ---------------------------------------------------------------------------------------


class Clock:
    """What processes take while something is done."""

    def __init__(self, pids: Pids) -> None:
        self.pids = pids
        self.before = {name: cpu_s(each) for name, each in pids.items()}
        self.busy_s, self.began_s = machine_s(), time.monotonic()

    def result(self, count: int, seconds: float, p50_us: float = 0, p99_us: float = 0) -> Result:
        """Answer what so many took."""
        wall_s = time.monotonic() - self.began_s
        used = {name: cpu_s(each) - self.before[name] for name, each in self.pids.items()}
        others_s = max(0.0, machine_s() - self.busy_s - sum(used.values()))
        return Result(
            rate=count / seconds,
            cpu_us=used["proxy"] / count * 1e6,
            p50_us=p50_us,
            p99_us=p99_us,
            shares={name: each / wall_s for name, each in used.items()},
            others=others_s / wall_s / (os.cpu_count() or 1),
        )


@contextmanager
def crowd(
    directory: Path, port: int, pids: Pids, count: int, kind: str, *, stays: bool = True
) -> Iterator[tuple[subprocess.Popen[str], Result]]:
    """Open so many connections with a call each; answers what that cost. Those that stay are there
    until the block ends.
    """
    command = [str(directory / "crowd"), str(port), str(count), str(AT_ONCE), kind]
    command.append("stays" if stays else "goes")
    with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        clock = Clock({**pids, "client": [process.pid]})
        yield process, clock.result(count, float(heard(process)[0]))


def heard(process: subprocess.Popen[str]) -> list[str]:
    """Answer the next line of a crowd; raises ``SystemExit`` if it ended: it has said why."""
    assert process.stdout is not None
    words = process.stdout.readline().split()
    if not words:
        raise SystemExit(f"a crowd of connections ended: {process.args}")
    return words


def need_files(connections: int) -> None:
    """See that a process may have so many; raises ``NotMeasuredError``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise NotMeasuredError(f"a process may have {hard} files, and needs {wanted} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def private_kib(pids: list[int]) -> int:
    """Answer the memory that processes share with nobody."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    lines = [line.split() for rollup in rollups for line in rollup.splitlines()]
    return sum(int(line[1]) for line in lines if line[0].startswith("Private_"))


# --- rounds ---------------------------------------------------------------------------------------


def take_turns(contenders: tuple[str, ...], rounds: int, directory: Path, turn: Turn) -> Results:
    """Do all rounds."""
    results = Results()
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            with (
                upstream_of(directory, "constant") as (upstream, upstream_pid),
                proxy_of(contender, directory, upstream) as (port, proxy_pids),
            ):
                pids = {"proxy": proxy_pids, "upstream": [upstream_pid]}
                for name, result in turn(contender, port, pids, number).items():
                    results.runs[name, contender].append(result)
    return results


def show(results: Results, *, is_paced: bool = False) -> list[str]:
    """Print medians; answers where a proxy was not what limited its rate."""
    limited = []
    print(f"{'':32}{'a second':>10}{'CPU us':>9}{'p50 us':>9}{'p99 us':>9}{'core':>7}{'client':>8}")
    for (name, contender), runs in results.runs.items():
        rate, cpu_us, p50_us, p99_us = (
            results.median(name, contender, what) for what in ("rate", "cpu_us", "p50_us", "p99_us")
        )
        share, client = (
            statistics.median(run.shares[who] for run in runs) for who in ("proxy", "client")
        )
        text = f"{f'{name}, {contender}':32}{rate:10.0f}{cpu_us:9.1f}{p50_us:9.0f}{p99_us:9.0f}"
        print(f"{text}{share:7.2f}{client:8.2f}")
        blamed = [run.limited_by for run in runs if run.limited_by]
        if not is_paced and 2 * len(blamed) > len(runs):
            limited.append(f"{name}, {contender}: the {blamed[0]} was the limit")
    others = statistics.median(run.others for runs in results.runs.values() for run in runs)
    print(f"other processes took {others:.0%} of the processors", end="")
    print(": of the figures trust CPU alone" if others > OTHERS_MAX else "")
    return limited


# --- rows -----------------------------------------------------------------------------------------


def measure_tls(directory: Path, rounds: int, scale: float) -> Found:
    """Hits over TLS: 8 connections, 16 streams each."""
    load = scaled(Load("8 x 16", 8, 16, 100_000, client="h2load", is_tls=True), scale)
    warm = Load("warm", 8, 16, 5_000, client="h2load", is_tls=True)

    def turn(_contender: str, port: int, pids: Pids, _number: int) -> dict[str, Result]:
        run(warm, port, pids, directory)
        return {load.name: run(load, port, pids, directory)}

    results = take_turns(TLS, rounds, directory, turn)
    rate, cpu = (results.ratio(load.name, *TLS, what) for what in ("rate", "cpu_us"))
    goals = [
        Goal("TLS, 8 x 16: rate to haproxy's", rate, ">=", 1.0),
        Goal("TLS, 8 x 16: CPU a call to haproxy's", cpu, "<=", 1.0),
    ]
    return goals, show(results)


def measure_handshakes(directory: Path, rounds: int, scale: float) -> Found:
    """Connections that come for one call, with and without a session to resume."""

    def turn(_contender: str, port: int, pids: Pids, _number: int) -> dict[str, Result]:
        found = {}
        for kind, count in HANDSHAKES.items():
            sized = int(count * scale)
            with crowd(directory, port, pids, sized, kind, stays=False) as (_, result):
                found[kind] = result
        return found

    results = take_turns(TLS, rounds, directory, turn)
    goals = [
        Goal(f"handshakes, {kind}: {text} to haproxy's", ratio, sign, 1.0)
        for kind in HANDSHAKES
        for what, text, sign in (("rate", "rate", ">="), ("cpu_us", "CPU", "<="))
        for ratio in (results.ratio(kind, *TLS, what),)
    ]
    return goals, show(results)


def measure_idle(kind: str, contenders: tuple[str, str], most_kib: float) -> Measure:
    """Answer how to measure what idle connections take, and what hits on others notice of them."""

    def measure(directory: Path, rounds: int, scale: float) -> Found:
        count, took_kib = connections_of(scale), defaultdict(list)
        calls = PROBE_RATE * max(2, int(PROBE_S * scale))
        is_tls = kind != "plain"
        probe = Load("hits", 4, 4, calls, rate=PROBE_RATE, client="h2load", is_tls=is_tls)

        def turn(contender: str, port: int, pids: Pids, number: int) -> dict[str, Result]:
            found = {}
            with crowd(directory, port, pids, WARM_CONNECTIONS, kind, stays=False):
                run(probe, port, pids, directory)
            if number % 2 == 0:
                found["quiet"] = run(probe, port, pids, directory)
            before_kib = private_kib(pids["proxy"])
            with crowd(directory, port, pids, count, kind):
                took_kib[contender].append((private_kib(pids["proxy"]) - before_kib) / count)
                found["beside"] = run(probe, port, pids, directory)
            if number % 2 == 1:
                time.sleep(SETTLE_S)
                found["quiet"] = run(probe, port, pids, directory)
            return found

        results = take_turns(contenders, rounds, directory, turn)
        show(results, is_paced=True)
        kib = {name: statistics.median(each) for name, each in took_kib.items()}
        print(
            f"{count} idle connections, KiB each:",
            ", ".join(f"{a} {b:.1f}" for a, b in kib.items()),
        )
        ours = contenders[0]
        pairs = zip(results.runs["beside", ours], results.runs["quiet", ours], strict=True)
        p99 = statistics.median(beside.p99_us / quiet.p99_us for beside, quiet in pairs)
        text = "idle" if kind == "plain" else "idle, TLS"
        goals = [
            Goal(f"{text}: memory of a connection", kib[ours], "<=", most_kib, "KiB"),
            Goal(f"{text}: p99 of hits on others, to quiet", p99, "<=", 1.1),
        ]
        return goals, []

    return measure


def measure_many(directory: Path, rounds: int, scale: float) -> Found:
    """Thousands of connections that call once a second each."""
    count, seconds = connections_of(scale), max(3, int(CROWD_S * scale))

    def turn(_contender: str, port: int, pids: Pids, _number: int) -> dict[str, Result]:
        with crowd(directory, port, pids, count, "plain") as (process, _):
            assert process.stdin is not None
            for asked in (2, seconds):  # the first is to warm up
                clock = Clock({**pids, "client": [process.pid]})
                process.stdin.write(f"{asked}\n")
                process.stdin.flush()
                began_s = time.monotonic()
                answers, p50_us, p99_us = map(float, heard(process))
                took_s = time.monotonic() - began_s
            return {"each second": clock.result(int(answers), took_s, p50_us, p99_us)}

    results = take_turns(PLAIN, rounds, directory, turn)
    limited = show(results)
    for contender in PLAIN:
        kept_up = results.median("each second", contender, "rate") / count
        if kept_up < KEPT_UP_MIN:
            print(f"{contender} kept up with {kept_up:.0%} of the calls: its p99 is that of a line")
    ratio = results.ratio("each second", *PLAIN, "p99_us")
    return [Goal("10,000 x 1/s: p99 to haproxy's", ratio, "<=", 2.0)], limited


def connections_of(scale: float) -> int:
    """Answer how many there are, once a process may have as many."""
    count = max(1_000, int(CONNECTIONS * scale))
    need_files(count)
    return count


OUTSIDE_ROWS: dict[str, tuple[str, Measure]] = {
    "tls": ("local hits over TLS, 8 connections x 16", measure_tls),
    "handshakes": ("connections with TLS that come for one call", measure_handshakes),
    "idle": ("10,000 idle connections", measure_idle("plain", PLAIN, 15.0)),
    "idle-tls": ("10,000 idle connections with TLS", measure_idle("full", TLS, 60.0)),
    "many": ("10,000 connections with a call each second", measure_many),
}


def programs_of_outside(name: str) -> list[str]:
    """Answer what a row takes from elsewhere."""
    return ["haproxy"] if name in ("idle", "many") else ["haproxy", "openssl"]


def measure_outside(name: str, rounds: int, scale: float, directory: Path) -> Found:
    """Measure one of these rows; answers what is wrong with it, too."""
    title, measure = OUTSIDE_ROWS[name]
    print(f"\n{title}", flush=True)
    if not (directory / "crowd").exists():
        libraries = ["-lnghttp2", "-lssl", "-lcrypto"]
        command = ["cc", "-O2", "-o", directory / "crowd", HERE / "crowd.c", *libraries]
        subprocess.run(command, check=True)
    goals, limited = measure(directory, rounds, scale)
    return goals, [f"{title}: {each}" for each in limited]
