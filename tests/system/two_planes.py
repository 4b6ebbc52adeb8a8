"""The same calls through two data planes, each two real `mm serve`, and what became of them.

A runtime of raw frames (``scripted_runtime.py``) stands behind the instances of each, and answers
by the script of the call; models are managed by the example runtime. Calls are sent one after the
other, to both planes at once.
"""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import dataclass, field
from typing import Any

from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError

from mm.core.headers import HeaderList
from mm.edge.h2.messages import frame_message
from tests.edge.raw_h2 import PATIENCE_S, REQUEST, RawPeer, connect
from tests.system.meshes import Instance
from tests.system.processes import eventually
from tests.system.random_answers import OK, OK_STATUS, Script
from tests.system.random_calls import HELD, MODEL, RandomCall
from tests.system.scripted_runtime import FRAME_BYTES, Attempt, ScriptedRuntime

#: In texts: the ports are of the run.
_PORT = re.compile(rb"((?:localhost|127\.0\.0\.1):)\d+")
_PLAIN_SCRIPT = Script(steps=(("headers", list(OK)), ("headers", [OK_STATUS])))


@dataclass(slots=True)
class Seen:
    """What the client got."""

    headers: list[HeaderList] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    end: str = ""


class Plane:
    """One data plane: the instance that clients call, another one, and their runtime."""

    def __init__(
        self, name: str, called: Instance, other: Instance, runtime: ScriptedRuntime
    ) -> None:
        self.name = name
        self.runtime = runtime
        self._called, self._other = called, other
        self._peer: RawPeer | None = None
        self._context: Any = None

    async def do(self, call: RandomCall) -> tuple[Seen, list[Attempt]]:
        """Send a call, and answer what became of it."""
        if call.fresh:
            at = self._other if call.is_far else self._called
            await asyncio.to_thread(self._load, call.fresh.decode(), at)
        if call.is_warm:
            assert (await self._exchange(self._plain(call.fresh), _PLAIN_SCRIPT))[0].end == "whole"
        if call.is_away:
            await self.runtime.go_away()
        try:
            return await self._exchange(call, call.script)
        finally:
            if call.is_away:
                await self.runtime.listen()
                await self._wait_back(MODEL)
            if call.is_away or call.script.breaks:
                await self._wait_back(HELD)

    def _load(self, model_id: str, at: Instance) -> None:
        self._called.register(model_id, "SIZE_1000_0_0")
        at.load_here(model_id)
        # The called one has to have heard of it, or it loads another copy.
        eventually(
            lambda: bool(self._called.status(model_id).model_copy_infos), what="the copy is known"
        )

    @staticmethod
    def _plain(model_id: bytes) -> RandomCall:
        return RandomCall(
            [*REQUEST, (b"mm-model-id", model_id)], (frame_message(b""),), _PLAIN_SCRIPT
        )

    async def _wait_back(self, model_id: bytes) -> None:
        """Return when the instance that is called gets answers from where this model is.

        Whoever broke a connection is left alone for half a second or more, by the clock of each
        plane, and calls for its models go elsewhere meanwhile. Only asking shows that it is over.
        """
        async with asyncio.timeout(PATIENCE_S):
            while True:
                seen, _ = await self._exchange(self._plain(model_id), _PLAIN_SCRIPT)
                said = dict(seen.headers[-1]) if seen.headers else {}
                if said.get(b"grpc-status") == b"0":
                    return

    async def _exchange(self, call: RandomCall, script: Script) -> tuple[Seen, list[Attempt]]:
        if self._peer is None or self._peer.closed:
            await self.close()
            self._context = connect(self._called.port)
            self._peer = await self._context.__aenter__()
        headers = [*call.headers, self.runtime.begin(script)]
        seen = Seen()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._send(self._peer, headers, call, seen)
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

    async def _send(self, peer: RawPeer, headers: HeaderList, call: RandomCall, seen: Seen) -> None:
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
        if not seen.end and call.hangs_up:
            await self.close()
            seen.end = "hung up"
        elif not seen.end:
            peer.reset(stream_id, call.reset_code)
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
        if seen.headers:
            self.runtime.client_got(len(seen.body))


def describe(call: RandomCall) -> str:
    """Answer what one needs to know of a call that went wrong."""
    sizes = [len(piece) for piece in call.pieces]
    steps = [f"{step} {value!r:.200}" for step, value in call.script.steps]
    headers = [(name, value[:60]) for name, value in call.headers]
    script = (call.script.begins_at, steps, call.script.echoes, call.script.ends)
    first = [f"{step} {value!r:.200}" for step, value in call.script.first or ()]
    return (
        f"headers {headers}\npieces {sizes}, ends {call.ends}, far {call.is_far},"
        f" away {call.is_away}\nfirst {first}\nanswer {script}"
    )


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
        if what == "headers":
            a, b = ([_without_ports(each) for each in lists] for lists in (a, b))
        if call.ends_within_answer and what == "headers" and a and b:
            a, b = (each[-1][-2:] for each in (a, b))
        if call.ends_within_answer and what == "body":
            continue
        if a != b:
            found.append(f"the client's {what}:\n    {a!r:.700}\n    {b!r:.700}")
    if len(one[1]) != len(other[1]) and not (call.is_racy or call.fails_everywhere):
        found.append(f"attempts: {_places(one[1])} and {_places(other[1])}")
    attempts = [each[1] for each in (one, other)]
    if call.is_for_several:
        # By what is compared: the ports by which instances differ are of the run.
        attempts = [sorted(each, key=lambda attempt: attempt.view()) for each in attempts]
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


def _places(attempts: list[Attempt]) -> str:
    return " then ".join(f"{each.place} ({each.end})" for each in attempts) or "none"


def _without_ports(headers: HeaderList) -> HeaderList:
    return [
        (name, _PORT.sub(rb"\1port", value) if name == b"grpc-message" else value)
        for name, value in headers
    ]


def new_rng(seed: int, number: int) -> random.Random:
    """Answer the chance of one call, so that it can be repeated alone."""
    return random.Random(f"{seed} {number}")
