"""What attacks on the wire cost a client that behaves: its p50 and p99, quiet and under each.

    python bench/attacks.py [--quick] [--only NAME,NAME]

One wire with one thread, before an upstream of our own. The client (h2load) makes 500 calls a
second on four connections; one attacker at a time, a process of its own, does what it can until it
is cut off, and begins anew twenty times a second. Ends at once if any answer to the client is not
whole. The goal is a p99 within twice that of the quiet time right before, and that no attacker can
go on until the time is up. An attacker comes with machines of its own: here it runs where nobody
else does (SCHED_IDLE), so that what it costs the client is what it costs the wire, not the
processors that it takes. With other things on the machine they stand behind each other all the
same, so the share of the processor that each took is told beside it. Takes two minutes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from _contenders import HERE, MODEL, build, need, proxy_of, upstream_of
from _wire_loads import PATH, Load, run

sys.path.insert(0, str(HERE.parent))

from tests.wire import hostile
from tests.wire.hostile import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Requests,
    attack,
    dial,
    frame,
)

RATE = 500.0
PAUSE_S = 0.05
GOAL = 2.0
#: Whoever has sent for so long when the time is up is not about to be cut off.
ENDLESS_S = 0.5
HEADERS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", PATH.encode()),
    (b":authority", b"a"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
    (b"mm-model-id", MODEL.encode()),
]
NO_WINDOW = frame(SETTINGS, b"\0\4\0\0\0\0")
MESSAGE = b"\0\0\0\0\xc8" + bytes(200)


def _repeated(piece: bytes, before: bytes = b"") -> Iterator[bytes]:
    return itertools.chain((PREFACE + before,), itertools.repeat(piece))


def _calls(
    after: Callable[[int], bytes], before: bytes = b"", count: int = 2**40
) -> Iterator[bytes]:
    """Calls without end, and what follows each."""
    requests = Requests(HEADERS)
    yield PREFACE + before
    for _ in range(count):
        yield requests.next()
        yield after(requests.stream_id)


def _bombs() -> Iterator[bytes]:
    requests = Requests()
    bomb = [*HEADERS, *([(b"bomb", b"x" * 3900)] * 1000)]
    yield PREFACE
    while True:
        yield requests.next(bomb)


def _closed(piece: bytes) -> Iterator[bytes]:
    """Frames on stream 1, which is closed."""
    return _repeated(piece, _open_call() + frame(RST_STREAM, b"\0\0\0\x08", stream_id=1))


def _open_call() -> bytes:
    return Requests(HEADERS).next()


ATTACKS: dict[str, Callable[[], Iterator[bytes]]] = {
    "pings": lambda: _repeated(frame(PING, b"12345678")),
    "settings": lambda: _repeated(frame(SETTINGS)),
    "empty": lambda: _repeated(frame(DATA, stream_id=1), _open_call()),
    "unknown": lambda: _repeated(frame(0xEE)),
    "closed-headers": lambda: _closed(
        frame(hostile.HEADERS, b"\x82", flags=END_HEADERS, stream_id=1)
    ),
    "closed-data": lambda: _closed(frame(DATA, b"x", stream_id=1)),
    "closed-ends": lambda: _closed(frame(DATA, flags=END_STREAM, stream_id=1)),
    "closed-pings": lambda: _closed(frame(DATA, b"x", stream_id=1) + 4 * frame(PING, b"12345678")),
    "continuation": lambda: _repeated(
        frame(CONTINUATION, stream_id=1), Requests(HEADERS).next(flags=END_STREAM)
    ),
    "reset": lambda: _calls(lambda at: frame(RST_STREAM, b"\0\0\0\x08", stream_id=at)),
    "made-reset": lambda: _calls(
        lambda at: frame(WINDOW_UPDATE, b"\x7f\xff\xff\xff", stream_id=at)
    ),
    "refused": lambda: _calls(lambda _: b""),
    "bombs": _bombs,
    "no-window": lambda: _calls(
        lambda at: frame(DATA, MESSAGE, flags=END_STREAM, stream_id=at), NO_WINDOW, 900
    ),
    "connections": lambda: iter((PREFACE,)),
}


@dataclass
class Attacks:
    """How often an attacker began."""

    count: int = 0
    #: It still sent when the time was up: nobody minded.
    is_endless: bool = False

    def pieces(self, name: str, until_s: float) -> Iterator[bytes]:
        """Yield what it sends, as long as there is time."""
        began_s = time.monotonic()
        for piece in ATTACKS[name]():
            if time.monotonic() >= until_s:
                self.is_endless = time.monotonic() - began_s >= ENDLESS_S
                return
            yield piece


def _attack_on(port: int, name: str, until_s: float, told: multiprocessing.Queue[Attacks]) -> None:
    """Be the attacker."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    attacks = Attacks()
    while time.monotonic() < until_s:
        with suppress(OSError, AssertionError), closing(dial(port)) as caller:
            caller.settimeout(max(0.1, until_s - time.monotonic()))
            if name == "connections":
                held = [dial(port) for _ in range(200)]
                for each in held:
                    each.close()
            else:
                attack(caller, attacks.pieces(name, until_s), bytes_max=2**40)
        attacks.count += 1
        time.sleep(PAUSE_S)
    told.put(attacks)


@contextmanager
def _attacker(port: int, name: str, time_s: float) -> Iterator[multiprocessing.Queue[Attacks]]:
    """Run it beside what is measured; it ends by itself."""
    context = multiprocessing.get_context("fork")  # there at once
    told: multiprocessing.Queue[Attacks] = context.Queue()
    until_s = time.monotonic() + time_s
    process = context.Process(target=_attack_on, args=(port, name, until_s, told), daemon=True)
    process.start()
    try:
        yield told
    finally:
        process.join(time_s + 5)
        if process.is_alive():
            process.kill()


def main() -> int:
    """Answer what the shell gets: 0 if every p99 is within the goal and every attacker cut off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="half the time")
    parser.add_argument("--only", default=",".join(ATTACKS), help="some of them")
    arguments = parser.parse_args()
    need(["cc", "h2load"], installs=False)
    time_s = 1.0 if arguments.quick else 2.0
    load = Load("client", 4, 10, int(RATE * time_s), rate=RATE, client="h2load")
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(
        f"{'':14}{'quiet p50':>10}{'p99 us':>10}{'under p50':>12}{'p99 us':>10}{'x':>7}"
        f"{'begun':>8}{'wire %':>8}{'others %':>10}"
    )
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mm-bench-attacks-") as name:
        directory = Path(name)
        build(directory)
        with (
            upstream_of(directory, "constant") as (upstream, _),
            proxy_of("wire", directory, upstream) as (port, pids),
        ):
            for each in arguments.only.split(","):
                quiet = run(load, port, {"proxy": pids}, directory)
                with _attacker(port, each, time_s + 0.5) as told:
                    under = run(load, port, {"proxy": pids}, directory)
                ratio = under.p99_us / quiet.p99_us
                attacks = told.get(timeout=5)
                missed += ratio > GOAL or attacks.is_endless
                print(
                    f"{each:14}{quiet.p50_us:10.0f}{quiet.p99_us:10.0f}{under.p50_us:12.0f}"
                    f"{under.p99_us:10.0f}{ratio:7.2f}{attacks.count:8}"
                    f"{100 * under.shares['proxy']:8.0f}{100 * under.others:10.0f}"
                    f"{'  never cut off' if attacks.is_endless else ''}",
                    flush=True,
                )
    print(f"{missed} beyond {GOAL} x or never cut off; every call of the client was answered")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
