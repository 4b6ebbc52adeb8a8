"""A runtime of raw frames that treats each call as its script says, whatever that does to HTTP/2.

It serves the instances of one data plane of the differential test (``two_planes.py``), which sends
one call after the other, so the script at hand is that of the call under way. It asks nobody to
slow down: what it sends waits for windows as it must.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from hyperframe.frame import GoAwayFrame

from mm.core.headers import Header, HeaderList
from tests.edge.raw_h2 import RawPeer
from tests.system.random_answers import Script, Steps

#: What a proxy puts in place of what the client said, and that depends on time.
TIMED = (b"grpc-timeout",)
#: Names a call to the runtime, where what is left of one may come during the next.
CALL = b"x-call"
#: Of a frame of DATA without further ado.
FRAME_BYTES = 16_384
#: An end of a connection that loses what the other side has not read.
_LINGER_NOT = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Attempt:
    """What one request of a data plane to its runtime was."""

    headers: HeaderList
    body: bytearray = field(default_factory=bytearray)
    #: "whole", or the code of its reset.
    end: str = ""
    #: Of which instance.
    place: int = 0

    def view(self) -> tuple[Any, ...]:
        """Answer what must be the same: neither the port nor the time that is left is."""
        fixed = [
            (name, re.sub(rb":\d+$", b":port", value) if name == b":authority" else value)
            for name, value in self.headers
            if name not in TIMED and name != CALL
        ]
        timed = [name for name, _ in self.headers if name in TIMED]
        return fixed, timed, bytes(self.body), self.end


class _Peer(RawPeer):
    """A connection to a data plane, which may be closed in one direction."""

    is_ended = False

    @property
    def place(self) -> int:
        """Which instance it is."""
        return int(self.writer.get_extra_info("sockname")[1])

    def flush(self) -> None:
        if self.is_ended:
            self.h2.data_to_send()
        else:
            super().flush()

    def end(self) -> None:
        """Say no more; the other end closes it then."""
        self.flush()
        self.is_ended = True
        self.writer.write_eof()

    def abort(self) -> None:
        """Lose what the other side has not read, too."""
        self.flush()
        self.is_ended = True
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        self.writer.transport.abort()


Key = tuple[_Peer, int]


@dataclass(slots=True)
class _Answer:
    """What is still to be sent on a stream."""

    steps: deque[tuple[str, Any]]
    ends: bool
    #: Of the message whose turn it is.
    sent: int = 0


class ScriptedRuntime:
    """Serves one data plane, on a port for each instance of it; has the script of the one call that
    is under way.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = ports
        self.script = Script()
        self.attempts: list[Attempt] = []
        self.changed = asyncio.Event()
        #: How much of a body the client has; -1: not even headers.
        self.client_has = -1
        self._servers: list[asyncio.Server] = []
        self._number = 0
        self._begun: set[Key] = set()
        self._of: dict[Key, Attempt] = {}
        self._answers: dict[Key, _Answer] = {}
        self._tasks: dict[_Peer, asyncio.Task[Any]] = {}

    def begin(self, script: Script) -> Header:
        """Expect the next call; answers the header by which it is known."""
        self.script = script
        self.attempts = []
        self.client_has = -1
        self._number += 1
        return CALL, b"%d" % self._number

    # --- connections --------------------------------------------------------------------------

    async def listen(self) -> None:
        """Be there."""
        self._servers = [
            await asyncio.start_server(self._accept, "127.0.0.1", port) for port in self.ports
        ]

    async def go_away(self) -> None:
        """Be gone, and known to be: nobody listens, and the other ends are closed, too."""
        for server in self._servers:
            server.close()
        for peer in self._tasks:
            if not peer.is_ended:
                peer.end()
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def close(self) -> None:
        """Close all connections."""
        for server in self._servers:
            server.close()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _Peer(reader, writer, client_side=False)
        peer.start(1000)
        task = asyncio.current_task()
        assert task is not None
        self._tasks[peer] = task
        try:
            while await self._read(peer):
                events, peer.events = peer.events, []
                for event in events:
                    self._hear(peer, event)
                peer.flush()
        except asyncio.CancelledError:
            pass  # how `close` ends it
        finally:
            del self._tasks[peer]
            writer.close()

    @staticmethod
    async def _read(peer: _Peer) -> bool:
        while True:
            with suppress(TimeoutError):  # the calls of a while were not for here
                return await peer.read()

    # --- what comes ---------------------------------------------------------------------------

    def _hear(self, peer: _Peer, event: Event) -> None:
        stream_id = getattr(event, "stream_id", None)
        key = (peer, stream_id or 0)
        if isinstance(event, RequestReceived):
            attempt = Attempt(list(event.headers), place=peer.place)  # type: ignore[arg-type]
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
                answer = self._answers.setdefault(key, _Answer(deque(), ends=False))
                answer.steps.append(("data", event.data))
                self._pump(key)
            self._reach(key, "message")
        elif isinstance(event, StreamEnded):
            self._of[key].end = self._of[key].end or "whole"
            self._reach(key, "end")
        elif isinstance(event, StreamReset):
            self._answers.pop(key, None)
            self._of[key].end = self._of[key].end or f"reset {int(event.error_code or 0)}"
        elif isinstance(event, WindowUpdated | RemoteSettingsChanged):
            for each in [each for each in self._answers if each[0] is peer]:
                self._pump(each)
        self.changed.set()

    def client_got(self, body_bytes: int) -> None:
        """The client has so much now."""
        self.client_has = body_bytes
        for each in list(self._answers):
            self._pump(each)
            each[0].flush()

    def _reach(self, key: Key, what: str) -> None:
        """Answer, if it is time to."""
        if key in self._begun or (what != self.script.begins_at and what != "end"):
            return
        self._begun.add(key)
        answer = self._answers.setdefault(key, _Answer(deque(), ends=False))
        answer.steps.extend(self._steps(self._of[key]))
        answer.ends = self.script.ends
        self._pump(key)

    def _steps(self, attempt: Attempt) -> Steps:
        script = self.script
        is_first = attempt is self.attempts[0] if self.attempts else False
        return script.first if script.first is not None and is_first else script.steps

    # --- what goes ----------------------------------------------------------------------------

    def _pump(self, key: Key) -> None:
        """Send what windows allow."""
        answer = self._answers.get(key)
        try:
            while answer is not None and answer.steps and self._step(key, answer):
                answer.steps.popleft()
                answer.sent = 0
        except ProtocolError:
            answer = None  # the proxy has given it up
        if answer is None or (not answer.steps and key in self._begun):
            self._answers.pop(key, None)

    def _step(self, key: Key, answer: _Answer) -> bool:
        """Do what is next, or a part of it; answers whether it is done."""
        peer, stream_id = key
        step, value = answer.steps[0]
        last = answer.ends and len(answer.steps) == 1
        if step == "headers":
            peer.h2.send_headers(stream_id, value, end_stream=last)
        elif step == "data":
            return self._send(key, answer, value, last)
        elif step == "reset":
            peer.h2.reset_stream(stream_id, value)
            self._of[key].end = "reset here"
        elif step == "until":
            return self.client_has >= value
        elif step == "goaway":
            peer.send_frame(GoAwayFrame(0, last_stream_id=max(0, stream_id - 2)))
            self._of[key].end = "refused"
        else:
            self._close(peer, value)
        return True

    def _send(self, key: Key, answer: _Answer, data: bytes, last: bool) -> bool:
        peer, stream_id = key
        while True:
            left = len(data) - answer.sent
            size = min(FRAME_BYTES, left, peer.h2.local_flow_control_window(stream_id))
            if size == 0 and left:
                return False
            piece = data[answer.sent : answer.sent + size]
            answer.sent += size
            peer.h2.send_data(stream_id, piece, end_stream=last and size == left)
            if size == left:
                return True

    def _close(self, peer: _Peer, how: str) -> None:
        """End a connection: no more is sent, or all that is not read yet is lost, too."""
        for (each, _), attempt in self._of.items():
            if each is peer:
                attempt.end = attempt.end or "closed here"
        if how == "gently":
            peer.end()
        else:
            peer.abort()

    def is_done(self) -> bool:
        """Answer whether every attempt has its end."""
        return all(attempt.end for attempt in self.attempts)


@asynccontextmanager
async def runtimes(ports: Sequence[Sequence[int]]) -> AsyncIterator[list[ScriptedRuntime]]:
    """Scripted runtimes, each on these ports."""
    found = [ScriptedRuntime(each) for each in ports]
    for runtime in found:
        await runtime.listen()
    try:
        yield found
    finally:
        for runtime in found:
            await runtime.close()
