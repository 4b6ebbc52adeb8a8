"""The rows of ``bench/wire.py`` that need nothing but proxies: who is asked what, and the goals.

Owns the rounds: contenders take turns in alternating order, each started anew, with all its loads.
Rows with a whole instance are in ``_wire_mesh.py``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from _contenders import proxy_of, upstream_of
from _goals import Goal
from _wire_loads import Load, Result, Results, run

#: Of the Python data plane, so that its share of a round is no longer than that of others.
PYTHON_SHARE = 1 / 60
#: Nothing is learnt from fewer calls than this.
CALLS_MIN = 500
#: Share of the processors that may go to others before rates and latencies mean little.
OTHERS_MAX = 0.1
#: "half of the maximum rate" is that of the slower of these two, so that both can follow.
HALF_OF = ("haproxy", "wire")
HALF_S = 5


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of the issue's table asks, of whom, and how it is judged."""

    title: str
    loads: tuple[str, ...]
    contenders: tuple[str, ...]
    judge: Callable[[Results], list[Goal]]


LOADS = {
    load.name: load
    for load in (
        Load("8x16", 8, 16, 300_000),
        Load("32x1", 32, 1, 150_000),
        Load("alone", 1, 1, 10_000, client="h2load"),
        Load("half", 8, 16, 100_000, rate=1.0, client="h2load"),
        Load("64k", 4, 4, 10_000, request_bytes=2**16 + 5, upstream="echo", client="h2load"),
        Load("1m", 4, 2, 1_000, request_bytes=2**20 + 5, upstream="echo", client="h2load"),
        Load("stream", 4, 25, 100, request_bytes=105, upstream="echo", messages=5_000),
        Load("one", 8, 16, 300_000, models=1),
        Load("zipf", 8, 16, 300_000, models=100_000),
    )
}
#: Comes first with each upstream.
WARM = {
    "constant": Load("warm", 8, 16, 5_000),
    "echo": Load("warm", 4, 4, 100, request_bytes=105, upstream="echo", messages=20),
}


def judge_many(results: Results) -> list[Goal]:
    """Answer the goals of 8 x 16."""
    targets = {"haproxy": 2.5, "nghttpx": 1.5, "nginx": 5.0, "python": 60.0}
    return [
        Goal(f"8 x 16: rate to {name}'s", results.ratio("8x16", "wire", name, "rate"), ">=", target)
        for name, target in targets.items()
        if results.runs["8x16", name]
    ]


def judge_few(results: Results) -> list[Goal]:
    """Answer the goals of 32 x 1."""
    return [
        Goal(f"32 x 1: rate to {name}'s", results.ratio("32x1", "wire", name, "rate"), ">=", target)
        for name, target in (("haproxy", 1.7), ("nghttpx", 1.0))
    ]


def judge_cpu(results: Results) -> list[Goal]:
    """Answer the goals for processor time."""
    return [
        Goal(f"8 x 16: CPU a call to {name}", ratio, "<=", target)
        for name, contender, target in (
            ("haproxy's", "haproxy", 0.4),
            ("what answering costs", "direct", 2.8),
        )
        for ratio in (results.ratio("8x16", "wire", contender, "cpu_us"),)
    ]


def judge_alone(results: Results) -> list[Goal]:
    """Answer the goal for calls without company."""
    ours, theirs = (results.added_us("alone", name, "p50_us") for name in ("wire", "haproxy"))
    return [Goal("one at a time: added p50 to haproxy's", ours / theirs, "<=", 0.6)]


def judge_half(results: Results) -> list[Goal]:
    """Answer the goal for the tail. What is added to direct calls is less where the whole is."""
    ours, theirs = (results.median("half", name, "p99_us") for name in ("wire", "haproxy"))
    return [Goal("half rate: p99, target haproxy's", ours, "<=", theirs, "us")]


def judge_peer(results: Results) -> list[Goal]:
    """Answer the goal for two instances: calls for each core spent."""
    ratio = results.ratio("8x16", "wire", "wire, 2 instances", "cpu_us")
    return [Goal("through a peer: rate a core to local", ratio, ">=", 0.45)]


def judge_size(load: str, title: str) -> Callable[[Results], list[Goal]]:
    """Answer how large messages are judged."""

    def judge(results: Results) -> list[Goal]:
        return [
            Goal(f"{title}: MB/s to {name}'s", ratio, ">=", target)
            for name, target in (("haproxy", 1.0), ("direct", 0.5))
            for ratio in (results.ratio(load, "wire", name, "rate"),)
        ]

    return judge


def judge_stream(results: Results) -> list[Goal]:
    """Answer the goals for streams."""
    rate = results.ratio("stream", "wire", "haproxy", "rate")
    p50 = results.ratio("stream", "wire", "haproxy", "p50_us")
    p99 = results.ratio("stream", "wire", "haproxy", "p99_us")
    return [
        Goal("streams: messages/s to haproxy's", rate, ">=", 2.0),
        Goal("streams: p50 of a message to haproxy's", p50, "<=", 1.0),
        Goal("streams: p99 of a message to haproxy's", p99, "<=", 1.0),
    ]


def judge_zipf(results: Results) -> list[Goal]:
    """Answer the goal for many models."""
    many, one = (results.runs[load, "wire, 100,000 models"] for load in ("zipf", "one"))
    both = Results({("", "many"): many, ("", "one"): one})
    rate = both.ratio("", "many", "one", "rate")
    cpu = both.ratio("", "many", "one", "cpu_us")
    return [
        Goal("100,000 models, Zipf: rate to one model's", rate, ">=", 0.95),
        Goal("100,000 models, Zipf: CPU to one model's", cpu, "<=", 1.05),
    ]


NEIGHBOURS = ("direct", "wire", "haproxy")
ROWS: dict[str, Row] = {
    "8x16": Row(
        "local hits, 8 connections x 16",
        ("8x16",),
        (*NEIGHBOURS, "nghttpx", "nginx", "python"),
        judge_many,
    ),
    "32x1": Row("local hits, 32 x 1", ("32x1",), (*NEIGHBOURS, "nghttpx"), judge_few),
    "cpu": Row("CPU a call", ("8x16",), NEIGHBOURS, judge_cpu),
    "alone": Row("one call at a time", ("alone",), NEIGHBOURS, judge_alone),
    "half": Row("half of the maximum rate", ("half",), NEIGHBOURS, judge_half),
    "peer": Row("through a peer", ("8x16",), ("wire", "wire, 2 instances"), judge_peer),
    "64k": Row("64 KiB, echoed", ("64k",), NEIGHBOURS, judge_size("64k", "64 KiB")),
    "1m": Row("1 MiB, echoed", ("1m",), NEIGHBOURS, judge_size("1m", "1 MiB")),
    "stream": Row("100-byte messages on 100 streams", ("stream",), NEIGHBOURS, judge_stream),
    # One after the other, of one process: what they differ by is less than what starts do.
    "zipf": Row("100,000 models", ("one", "zipf"), ("wire, 100,000 models",), judge_zipf),
}


def plan(names: list[str]) -> dict[str, list[str]]:
    """Answer which loads each contender gets for these rows, in the order of the rows."""
    loads: dict[str, list[str]] = {}
    for name in names:
        for contender in ROWS[name].contenders:
            for load in ROWS[name].loads:
                asked = loads.setdefault(contender, [])
                if load not in asked:
                    asked.append(load)
    return loads


def measure(
    names: list[str], rounds: int, scale: float, directory: Path
) -> tuple[Results, list[str]]:
    """Do all rounds of these rows, and print the figures; answers what is wrong with them, too."""
    loads, results = plan(names), Results()
    sized = {name: scaled(load, scale) for name, load in LOADS.items()}
    if "half" in names:
        rates = [
            take_turn(name, [sized["8x16"]], directory)["8x16"].rate
            for name in HALF_OF
            for _ in range(2 if scale == 1 else 1)
        ]
        rate = min(rates) / 2
        print(f"half of the maximum rate: {rate:.0f} calls/s", flush=True)
        sized["half"] = replace(sized["half"], rate=rate, calls=int(rate * HALF_S * scale))
    for number in range(rounds):
        order = list(loads) if number % 2 == 0 else list(loads)[::-1]
        for contender in order:
            asked = [sized[name] for name in loads[contender]]
            for load, result in take_turn(contender, asked, directory).items():
                results.runs[load, contender].append(result)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return results, show(results, loads)


def scaled(load: Load, scale: float) -> Load:
    """Answer a load with fewer calls, or shorter streams."""
    if load.messages:
        return replace(load, messages=max(20, int(load.messages * scale)))
    return replace(load, calls=max(CALLS_MIN, int(load.calls * scale)))


def take_turn(contender: str, loads: list[Load], directory: Path) -> dict[str, Result]:
    """Start a contender and its upstreams anew, warm them up, and run every load once."""
    results: dict[str, Result] = {}
    for kind in ("constant", "echo"):
        mine = [load for load in loads if load.upstream == kind]
        if not mine:
            continue
        with upstream_of(directory, kind) as (upstream, upstream_pid):
            if contender == "direct":
                run(WARM[kind], upstream, {"proxy": [upstream_pid]}, directory)
                pids = {"proxy": [upstream_pid]}
                results |= {load.name: run(load, upstream, pids, directory) for load in mine}
                continue
            with proxy_of(contender, directory, upstream) as (port, proxy_pids):
                pids = {"proxy": proxy_pids, "upstream": [upstream_pid]}
                share = PYTHON_SHARE if contender == "python" else 1.0
                run(scaled(WARM[kind], share), port, pids, directory)
                for load in mine:
                    results[load.name] = run(scaled(load, share), port, pids, directory)
    return results


def show(results: Results, loads: dict[str, list[str]]) -> list[str]:
    """Print medians; answers where a proxy was not what limited its rate."""
    limited = []
    for name, load in LOADS.items():
        is_paced = bool(load.rate) or load.connections * load.streams == 1
        there = [contender for contender in loads if results.runs[name, contender]]
        if not there:
            continue
        print(f"\n{name:22}{'a second':>10}{'CPU us':>9}{'p50 us':>9}{'p99 us':>9}{'core':>7}")
        for contender in there:
            rate, cpu_us, p50_us, p99_us = (
                results.median(name, contender, what)
                for what in ("rate", "cpu_us", "p50_us", "p99_us")
            )
            text = f"{contender:22}{rate:10.0f}{cpu_us:9.1f}{p50_us:9.0f}{p99_us:9.0f}"
            print(f"{text}{rate * cpu_us / 1e6:7.2f}")
            runs = results.runs[name, contender]
            blamed = [run.limited_by for run in runs if run.limited_by]
            if contender != "direct" and not is_paced and 2 * len(blamed) > len(runs):
                limited.append(f"{name}, {contender}: the {blamed[0]} was the limit")
    others = statistics.median(run.others for runs in results.runs.values() for run in runs)
    print(f"\nother processes took {others:.0%} of the processors", end="")
    print(": of the figures trust CPU alone" if others > OTHERS_MAX else "")
    return limited
