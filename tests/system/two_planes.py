"""The same calls through two data planes, each a real `mm serve`, and what became of them.

A runtime of raw frames stands behind each, and answers by the script of the call; models are
managed by the example runtime. Calls are sent one after the other, to both planes at once.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError

from mm.core.headers import Header, HeaderList
from tests.edge.raw_h2 import PATIENCE_S, RawPeer, connect
from tests.system.random_calls import RandomCall, Script

#: What a proxy puts in place of what the client said, and that depends on time.
TIMED = (b"grpc-timeout",)
#: Names a call to the runtime, where what is left of one may come during the next.
CALL = b"x-call"
#: Of a frame of DATA without further ado.
FRAME_BYTES = 16_384


@dataclass(slots=True)
class Attempt:
    """What one request of a data plane to its runtime was."""

    headers: HeaderList
    body: bytes = b""
    #: "whole", or the code of its reset.
    end: str = ""

    def view(self) -> tuple[Any, ...]:
        """Answer what must be the same: neither the port nor the time that is left is."""
        fixed = [
            (name, re.sub(rb":\d+$", b":port", value) if name == b":authority" else value)
            for name, value in self.headers
            if name not in TIMED
        ]
        timed = [name for name, _ in self.headers if name in TIMED]
        return fixed, timed, self.body, self.end


@dataclass(slots=True)
class Seen:
    """What the client got."""

    headers: list[HeaderList] = field(default_factory=list)
    body: bytes = b""
    end: str = ""


class ScriptedRuntime:
    """Serves one data plane; has the script of the one call that is under way."""

    def __init__(self) -> None:
        self.script = Script()
        self.attempts: list[Attempt] = []
        self.changed = asyncio.Event()
        self._number = 0
        self._begun: set[tuple[RawPeer, int]] = set()
        self._of: dict[tuple[RawPeer, int], Attempt] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, script: Script) -> Header:
        """Expect the next call; answers the header by which it is known."""
        self.script = script
        self.attempts = []
        self._number += 1
        return CALL, b"%d" % self._number

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection."""
        peer = RawPeer(reader, writer, client_side=False)
        peer.start(1000)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await peer.read():
                events, peer.events = peer.events, []
                for event in events:
                    self._hear(peer, event)
                peer.flush()
        except asyncio.CancelledError:
            pass  # how `close` ends it
        finally:
            self._tasks.discard(task)
            writer.close()

    async def close(self) -> None:
        """Close all connections."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _hear(self, peer: RawPeer, event: Event) -> None:
        stream_id = getattr(event, "stream_id", None)
        key = (peer, stream_id or 0)
        if isinstance(event, RequestReceived):
            attempt = Attempt(list(event.headers))  # type: ignore[arg-type]
            self._of[key] = attempt
            if (CALL, b"%d" % self._number) not in attempt.headers:
                self._begun.add(key)  # of a call that ended before this came
                return
            self.attempts.append(attempt)
            if self.script.echoes:
                ok = [(b":status", b"200"), (b"content-type", b"application/grpc")]
                with suppress(ProtocolError):
                    peer.h2.send_headers(stream_id, ok)
            self._reach(key, "headers")
        elif isinstance(event, DataReceived):
            self._of[key].body += event.data
            peer.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
            if self.script.echoes and event.data and key not in self._begun:
                with suppress(ProtocolError):
                    self._send(peer, stream_id, event.data)
            self._reach(key, "message")
        elif isinstance(event, StreamEnded):
            self._of[key].end = "whole"
            self._reach(key, "end")
        elif isinstance(event, StreamReset):
            self._of[key].end = self._of[key].end or f"reset {int(event.error_code or 0)}"
        self.changed.set()

    def _reach(self, key: tuple[RawPeer, int], what: str) -> None:
        """Answer, if it is time to."""
        if key in self._begun or (what != self.script.begins_at and what != "end"):
            return
        self._begun.add(key)
        with suppress(ProtocolError):  # the proxy has given it up
            self._answer(*key)

    def _answer(self, peer: RawPeer, stream_id: int) -> None:
        steps = self.script.steps
        for at, (step, value) in enumerate(steps):
            last = self.script.ends and at == len(steps) - 1
            if step == "headers":
                peer.h2.send_headers(stream_id, value, end_stream=last)
            elif step == "data":
                self._send(peer, stream_id, value, end=last)
            else:
                peer.h2.reset_stream(stream_id, value)
                self._of[peer, stream_id].end = "reset here"

    def _send(self, peer: RawPeer, stream_id: Any, data: Any, *, end: bool = False) -> None:
        pieces = [data[at : at + FRAME_BYTES] for at in range(0, len(data), FRAME_BYTES)]
        pieces = pieces or [b""]
        for piece in pieces:
            assert len(piece) <= peer.h2.local_flow_control_window(stream_id)
            peer.h2.send_data(stream_id, piece, end_stream=end and piece is pieces[-1])

    def is_done(self) -> bool:
        """Answer whether every attempt has its end."""
        return all(attempt.end for attempt in self.attempts)


class Plane:
    """One data plane: where clients call, and its runtime."""

    def __init__(self, name: str, port: int, runtime: ScriptedRuntime) -> None:
        self.name = name
        self.runtime = runtime
        self._port = port
        self._peer: RawPeer | None = None
        self._context: Any = None

    async def do(self, call: RandomCall) -> tuple[Seen, list[Attempt]]:
        """Send a call, and answer what became of it."""
        if self._peer is None or self._peer.closed:
            await self.close()
            self._context = connect(self._port)
            self._peer = await self._context.__aenter__()
        headers = [*call.headers, self.runtime.begin(call.script)]
        seen = Seen()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._exchange(self._peer, headers, call, seen)
                while not self.runtime.is_done():
                    self.runtime.changed.clear()
                    await self.runtime.changed.wait()
        except TimeoutError:
            seen.end += ": never ended"
            self._peer.closed = True
        return seen, self.runtime.attempts

    async def close(self) -> None:
        """Close the client's connection."""
        if self._context is not None:
            await self._context.__aexit__(None, None, None)
            self._context = self._peer = None

    async def _exchange(
        self, peer: RawPeer, headers: HeaderList, call: RandomCall, seen: Seen
    ) -> None:
        last = call.ends == "with the last piece"
        stream_id = peer.begin(headers, end=not call.pieces and last)
        sent = 0
        for number, piece in enumerate(call.pieces):
            cut = [piece[at : at + FRAME_BYTES] for at in range(0, len(piece), FRAME_BYTES)]
            for at, frame in enumerate(cut or [b""]):
                await self._wait_window(peer, stream_id, len(frame), seen)
                if seen.end:
                    return
                is_last = number == len(call.pieces) - 1 and at >= len(cut) - 1
                peer.send(stream_id, frame, end=last and is_last)
            sent += len(piece)
            while call.interactive and len(seen.body) < sent and not seen.end:
                await self._read(peer, stream_id, seen)
        if call.ends == "alone" and not seen.end:
            peer.send(stream_id, b"", end=True)
        if call.ends == "never":
            await self._reset(peer, stream_id, seen, call)
        while not seen.end:
            await self._read(peer, stream_id, seen)

    async def _wait_window(self, peer: RawPeer, stream_id: int, size: int, seen: Seen) -> None:
        while not seen.end and peer.h2.local_flow_control_window(stream_id) < size:
            await self._read(peer, stream_id, seen)

    async def _reset(self, peer: RawPeer, stream_id: int, seen: Seen, call: RandomCall) -> None:
        """Give up once the whole request is at the runtime, or it was refused before."""
        whole = len(b"".join(call.pieces))
        reading = asyncio.ensure_future(self._read_all(peer, stream_id, seen))
        while not seen.end:
            there = self.runtime.attempts
            if there and len(there[-1].body) == whole and self._has_all(seen, call):
                break
            self.runtime.changed.clear()
            changed = asyncio.ensure_future(self.runtime.changed.wait())
            await asyncio.wait((changed, reading), return_when=asyncio.FIRST_COMPLETED, timeout=0.1)
            changed.cancel()
        reading.cancel()
        await asyncio.wait((reading,))
        if not seen.end:
            peer.h2.reset_stream(stream_id, call.reset_code)
            peer.flush()
            seen.end = "given up"

    def _has_all(self, seen: Seen, call: RandomCall) -> bool:
        return bool(seen.headers) or not call.script.steps

    async def _read_all(self, peer: RawPeer, stream_id: int, seen: Seen) -> None:
        while not seen.end:
            await self._read(peer, stream_id, seen)

    async def _read(self, peer: RawPeer, stream_id: int, seen: Seen) -> None:
        """Take what comes next."""
        try:
            if not peer.events and not await peer.read():
                seen.end = "connection closed"
        except ProtocolError as error:
            seen.end, peer.closed = type(error).__name__, True
        events, peer.events = peer.events, []
        for event in events:
            if isinstance(event, ConnectionTerminated):
                seen.end = f"GOAWAY {int(event.error_code or 0)}"
                peer.closed = True
            elif getattr(event, "stream_id", 0) != stream_id or seen.end:
                continue
            elif isinstance(event, ResponseReceived | TrailersReceived):
                seen.headers.append(list(event.headers))  # type: ignore[arg-type]
            elif isinstance(event, DataReceived):
                seen.body += event.data
                peer.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
                peer.flush()
            elif isinstance(event, StreamEnded):
                seen.end = "whole"
            elif isinstance(event, StreamReset):
                seen.end = f"reset {int(event.error_code or 0)}"


@asynccontextmanager
async def runtimes(ports: list[int]) -> AsyncIterator[list[ScriptedRuntime]]:
    """Scripted runtimes on these ports."""
    found = [ScriptedRuntime() for _ in ports]
    servers = [
        await asyncio.start_server(runtime.accept, "127.0.0.1", port)
        for runtime, port in zip(found, ports, strict=True)
    ]
    try:
        yield found
    finally:
        for server, runtime in zip(servers, found, strict=True):
            server.close()
            await runtime.close()


def describe(call: RandomCall) -> str:
    """Answer what one needs to know of a call that went wrong."""
    sizes = [len(piece) for piece in call.pieces]
    steps = [f"{step} {value!r:.200}" for step, value in call.script.steps]
    headers = [(name, value[:60]) for name, value in call.headers]
    script = (call.script.begins_at, steps, call.script.echoes, call.script.ends)
    return f"headers {headers}\npieces {sizes}, ends {call.ends}\nanswer {script}"


def differences(
    call: RandomCall, one: tuple[Seen, list[Attempt]], other: tuple[Seen, list[Attempt]]
) -> list[str]:
    """Answer in what two planes differ, for a person to read.

    Where a call ends while its request is under way, how much of that has come to the runtime, and
    whether it hears that there is no more, are of the moment.
    """
    found = []
    for what in ("headers", "body", "end"):
        a, b = (getattr(each[0], what) for each in (one, other))
        if call.ends_within_answer and what == "headers" and a and b:
            a, b = (each[-1][-2:] for each in (a, b))
        if call.ends_within_answer and what == "body":
            continue
        if a != b:
            found.append(f"the client's {what}:\n    {a!r:.700}\n    {b!r:.700}")
    if len(one[1]) != len(other[1]) and not call.is_racy:
        found.append(f"attempts: {len(one[1])} and {len(other[1])}")
    attempts = [each[1] for each in (one, other)]
    if call.is_for_several:
        attempts = [sorted(each, key=lambda attempt: attempt.headers) for each in attempts]
    for mine, theirs in zip(*attempts, strict=False):
        for name, a, b in zip(
            ("headers", "timed", "body", "end"), mine.view(), theirs.view(), strict=True
        ):
            if call.is_racy and name == "end":
                continue
            if call.is_racy and name == "body" and (a.startswith(b) or b.startswith(a)):
                continue
            if a != b:
                found.append(f"the runtime's {name}:\n    {a!r:.700}\n    {b!r:.700}")
    return found


def new_rng(seed: int, number: int) -> random.Random:
    """Answer the chance of one call, so that it can be repeated alone."""
    return random.Random(f"{seed} {number}")
