"""The server end: listeners, connections, and one task for each call.

A handler gets an ``IncomingCall`` and answers it; what it raises becomes a status. Handlers work
on whole messages (``mm.edge.unary``) or take the raw body themselves (``mm.edge.proxy``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from h2.errors import ErrorCodes

from mm.core import call_texts
from mm.core.headers import (
    HeaderList,
    MalformedHeadersError,
    read_request_head,
    status_trailers,
)
from mm.edge.h2.accepting import Acceptor
from mm.edge.h2.crowd import Crowd
from mm.edge.h2.incoming import IncomingCall
from mm.edge.h2.limits import TransportLimits, wire_limits
from mm.edge.h2.link import Link
from mm.edge.h2.listening import BACKLOG, listening_socket, unix_socket
from mm.edge.h2.stream import NOBODY, RawStream
from mm.edge.h2.turns import CALLS_A_TURN, PARKED_MAX, TurnQueue
from mm.errors import MeshError, StatusCode
from mm.mesh.seldom import Seldom

if TYPE_CHECKING:
    from mm.edge.h2.tls import TlsEnd

logger = logging.getLogger(__name__)

#: A client that is told that we stop has calls on their way to us: as long as it takes to answer a
#: ping, or this long if it does not answer pings.
_GOAWAY_HEARD_S = 1.0
#: No client sends this in a ping of its own.
_GOAWAY_PING = b"goodbye?"
_LAST_ID_MAX = 2**31 - 1
#: Time for what was written last to leave when the server stops.
_CLOSE_TIMEOUT_S = 1.0


Handler = Callable[[IncomingCall], Awaitable[None]]


class ServerLink(Link):
    """A client's connection."""

    is_server = True
    calls_a_turn = CALLS_A_TURN

    def __init__(self, server: GrpcServer, limits: TransportLimits | None = None) -> None:
        super().__init__(limits or server.limits)
        self.server = server
        #: The wire is at the other end, and its words are heard.
        self.is_wire = limits is not None
        self.draining = False
        #: Until the client has heard of our GOAWAY.
        self._goaway_timer: asyncio.TimerHandle | None = None
        self._resets_left = float(server.limits.resets_burst)
        self._resets_counted_s = time.monotonic()
        self._handshake: asyncio.TimerHandle | None = None
        self._age: asyncio.TimerHandle | None = None
        self._address = ""
        self._rests = False
        #: Calls whose handler waits for something before it can begin, such as a load.
        self.parked_count = 0
        #: Calls of the mesh's own, such as those that manage models.
        self.own_count = 0
        self._certificate_names: tuple[str, ...] | None = None

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """What the client's certificate calls it, in its order; nothing without one."""
        if self._certificate_names is None:
            transport: Any = self.transport
            ask = getattr(transport, "certificate_names", tuple)
            self._certificate_names = ask()
        return self._certificate_names

    def handshake_begun(self, transport: asyncio.Transport) -> None:
        """Have a place until the handshake is complete, unless there are too many."""
        server = self.server
        server.handshakes[self] = transport
        too_many = len(server.links) + len(server.handshakes) > self.limits.connections_max
        if self._enter_crowd(transport) or too_many:
            # Whoever comes in the same turn finds the place free.
            self.handshake_failed("too many connections")
            transport.abort()

    def handshake_failed(self, reason: str) -> None:
        """Give the place back."""
        self.server.handshakes.pop(self, None)
        self._leave_crowd()

    def _enter_crowd(self, transport: asyncio.BaseTransport) -> bool:
        """Count among those of an address, once; answers whether these are too many."""
        if self._address:
            return False
        crowd = self.server.crowd
        self._address = crowd.enter(transport.get_extra_info("peername"))
        return 0 < self.limits.per_address_max < crowd.counts[self._address]

    def _leave_crowd(self) -> None:
        self.server.crowd.leave(self._address)
        self._address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, unless there are too many."""
        self.server.handshakes.pop(self, None)
        super().connection_made(transport)
        self.server.links.add(self)
        if len(self.server.links) > self.limits.connections_max:
            self._refuse("too many connections")
            return
        if self._enter_crowd(transport):
            self._refuse("too many connections of one address")
            return
        self._handshake = self.loop.call_later(self.limits.greeting_s, self.connection.close)

    def _refuse(self, why: str) -> None:
        logger.log(self.complaint_level(), "refusing %s: %s", self.peer_address, why)
        self.connection.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancel the calls of the connection."""
        for timer in (self._handshake, self._goaway_timer, self._age):
            if timer is not None:
                timer.cancel()
        self._leave_crowd()
        super().connection_lost(exc)
        self.server.link_lost(self)

    def complaint_level(self) -> int:
        """Clients are many, and whoever wants to can connect again: once a minute."""
        return self.server.complaints.level(self.loop.time())

    def is_crowded(self) -> bool:
        """Answer whether many calls wait here: more of the kind are likely to come."""
        return self.parked_count > PARKED_MAX

    def is_in_no_hurry(self) -> bool:
        """Answer whether, if it is behind, it leaves one half of the turns to others. Calls of the
        mesh's own wait for turns only then: to do so always costs a sixth of their rate.
        """
        return self.own_count > PARKED_MAX or self.is_crowded()

    def fall_behind(self) -> None:
        """Wait for the next turn among all connections that have more than one turn takes."""
        self.is_behind = True
        self.server.queue.add(self)

    def rest(self) -> None:
        """Read nothing until all that was read is looked at."""
        if not self._rests and not self.transport.is_closing():
            self._rests = True
            self.transport.pause_reading()

    def take_queued_turn(self) -> bool:
        """Go on where the last turn ended; answers whether it stays in the queue."""
        if self.take_turn():
            self.rest()
            return True
        self.is_behind = self._rests and not self.transport.is_closing()
        if self.is_behind:
            self._rests = False
            self.transport.resume_reading()
        return self.is_behind

    def settings_received(self) -> None:
        """The handshake is complete."""
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
            if self.limits.age_s:
                # Of clients that came together not all have to come back together.
                age_s = self.limits.age_s * random.uniform(0.9, 1.1)
                self._age = self.loop.call_later(age_s, self._grow_old)

    def _grow_old(self) -> None:
        """Send the client away; its calls have their grace."""
        self.drain()
        if self.limits.age_grace_s:
            self._age = self.loop.call_later(self.limits.age_grace_s, self.connection.close)

    def reset_received(self) -> None:
        """Count a reset; a client that does little else is dropped."""
        now_s = time.monotonic()
        limits = self.limits
        self._resets_left = min(
            float(limits.resets_burst),
            self._resets_left + (now_s - self._resets_counted_s) * limits.resets_per_s,
        )
        self._resets_counted_s = now_s
        self._resets_left -= 1
        if self._resets_left < 0 and not self.draining:
            level = self.complaint_level()
            logger.log(level, "dropping %s: it resets streams too fast", self.peer_address)
            self.draining = True
            self.engine.submit_goaway(ErrorCodes.ENHANCE_YOUR_CALM)
            self._flush()
            self.connection.close_gently()

    def accept(self, stream_id: int, headers: HeaderList, ended: bool) -> None:
        """Begin to serve a call, or answer at once that it cannot be."""
        try:
            head = read_request_head(
                headers, self.limits.header_list_bytes_max, is_wire=self.is_wire
            )
        except MalformedHeadersError as error:
            self._answer_malformed(stream_id, error, ended)
            return
        call = IncomingCall(self, headers, head)
        stream = RawStream(self, stream_id, call)
        self.streams[stream_id] = stream
        call.stream = stream
        call.task = self.loop.create_task(self.server.serve(call))
        if ended:
            stream.remote_ended = True
            call.data_received(b"", 0, True)

    def _answer_malformed(self, stream_id: int, error: MalformedHeadersError, ended: bool) -> None:
        stream = RawStream(self, stream_id, NOBODY)
        self.streams[stream_id] = stream
        stream.remote_ended = ended
        status = b"%d" % error.http_status
        head = [(b":status", status), (b"content-type", b"application/grpc")]
        stream.send_headers(head + status_trailers(error.code, error.message), end=True)

    def release(self, stream: RawStream) -> None:
        """Forget a stream; the last one of a draining connection closes it."""
        super().release(stream)
        if self.draining and not self.streams:
            self.loop.call_soon(self._close_drained)

    def drain(self) -> None:
        """Have the client send no more calls; close when those that it has sent are finished.

        In two steps: those on their way to us would else come back untouched, and not every client
        sends them again. A client that was dropped has been told already, and a last id must not
        rise (RFC 9113, 6.8).
        """
        if self.draining:
            return
        self.draining = True
        if not self.lost:
            self.engine.submit_goaway(last_id=_LAST_ID_MAX)
            self.engine.ping(_GOAWAY_PING)
            self._flush()
            self._goaway_timer = self.loop.call_later(_GOAWAY_HEARD_S, self._refuse_more)

    def ping_answered(self, data: bytes) -> None:
        """What comes after the answer was sent by a client that knew."""
        if data == _GOAWAY_PING and self._goaway_timer is not None:
            self._refuse_more()

    def _refuse_more(self) -> None:
        if self._goaway_timer is not None:
            self._goaway_timer.cancel()
            self._goaway_timer = None
            self.engine.submit_goaway()
            if self.server.is_stopping:
                self.server.end_watches(self)
            self._flush()
            self._close_drained()

    def close_now(self) -> None:
        """Close, whatever the client knows: its time is up."""
        self._refuse_more()
        if not self.lost:
            self._close()

    def _close_drained(self) -> None:
        if not (self.lost or self.streams or self._goaway_timer):
            self._close()

    def _close(self) -> None:
        self._flush()
        self.connection.close_gently()


class GrpcServer:
    """Listens on a TCP port or a Unix socket and runs ``handler`` for each call.

    ``external`` tells whether clients (True) or other instances of the mesh call here: only the
    latter are told hop results.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        limits: TransportLimits,
        external: bool,
        tls: TlsEnd | None = None,
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.external = external
        #: None: plain text.
        self.tls = tls
        self.links: set[ServerLink] = set()
        self.crowd = Crowd()
        self.complaints = Seldom()
        #: Connections whose TLS handshake is not complete.
        self.handshakes: dict[ServerLink, asyncio.Transport] = {}
        self.queue = TurnQueue()
        self.calls: set[IncomingCall] = set()
        #: What calls hold of their requests (``IncomingCall.hold``).
        self.held_bytes = 0
        #: Else a connection that drains is only old, and its watches have their grace as all calls.
        self.is_stopping = False
        self._listener: Acceptor | None = None
        self._path: str | None = None
        self._quiet = asyncio.Event()

    async def start(
        self, host: str | None = None, port: int | None = None, *, path: str | None = None
    ) -> int:
        """Listen, and answer the port (0 for a Unix socket). Raises ``OSError``."""
        assert (port is None) != (path is None)
        if path is not None:
            await self.start_on(await asyncio.to_thread(unix_socket, path))
            return 0
        assert port is not None
        sock = listening_socket(host, port)
        await self.start_on(sock)
        return int(sock.getsockname()[1])

    async def start_on(self, sock: socket.socket) -> None:
        """Listen on a socket that is bound already, TCP or Unix."""
        if sock.family == socket.AF_UNIX:
            self._path = sock.getsockname()
        sock.listen(BACKLOG)
        self._listener = Acceptor(sock, self._make_link)
        self._listener.start()

    async def adopt(self, sock: socket.socket) -> None:
        """Serve a connected socket at whose other end the wire is."""
        loop = asyncio.get_running_loop()
        limits = wire_limits(self.limits)
        await loop.connect_accepted_socket(lambda: ServerLink(self, limits), sock)

    def _make_link(self) -> asyncio.Protocol:
        link = ServerLink(self)
        if self.tls is None:
            return link
        # Not at the top of the file: plain text does without the extension.
        from mm.edge.h2.tls import TlsTransport

        return TlsTransport(link, self.tls, server_side=True)

    async def serve(self, call: IncomingCall) -> None:
        """Run the handler for a call and make its errors statuses."""
        self.calls.add(call)
        try:
            await self.handler(call)
            if not (call.status_sent or call.answered):
                logger.error("the handler of %s ended without an answer", call.method)
                call.send_status(StatusCode.INTERNAL, "internal error")
        except MeshError as error:
            call.fail(error)
        except asyncio.CancelledError:
            # By the client, its deadline or ``stop``, which have answered; else by the handler.
            call.send_status(StatusCode.CANCELLED, "cancelled")
        except Exception:
            logger.exception("call of %s failed", call.method)
            call.send_status(StatusCode.INTERNAL, "internal error")
        finally:
            call.finish()
            self.calls.discard(call)
            if not self.calls:
                self._quiet.set()

    def link_lost(self, link: ServerLink) -> None:
        """Forget a connection."""
        self.links.discard(link)
        if not self.links:
            self._quiet.set()

    def end_watches(self, link: ServerLink) -> None:
        """End those calls of a connection that would never end by themselves."""
        streams = list(link.streams.values())
        calls = [each.sink for each in streams if isinstance(each.sink, IncomingCall)]
        _cancel([call for call in calls if not call.holds_stop])

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, let those that run finish within ``grace_s``, then close."""
        self.is_stopping = True
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(os.unlink, self._path)
        for handshake in list(self.handshakes.values()):
            handshake.abort()
        for link in list(self.links):
            link.drain()
            self.end_watches(link)
        await self._wait_while(lambda: bool(self.links), grace_s)
        tasks = _cancel(list(self.calls))
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
        for link in list(self.links):
            link.close_now()
        await self._wait_while(lambda: bool(self.links), _CLOSE_TIMEOUT_S)
        for link in list(self.links):
            link.connection.close()
        await self._wait_while(lambda: bool(self.links), _CLOSE_TIMEOUT_S)

    async def _wait_while(self, busy: Callable[[], bool], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while busy():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            self._quiet.clear()
            try:
                await asyncio.wait_for(self._quiet.wait(), left_s)
            except TimeoutError:
                return


def _cancel(calls: list[IncomingCall]) -> list[asyncio.Task[None]]:
    """End calls because the server stops; answer their tasks."""
    for call in calls:
        call.send_status(StatusCode.UNAVAILABLE, call_texts.SHUTTING_DOWN)
        call.task.cancel()
    return [call.task for call in calls]
