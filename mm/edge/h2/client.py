"""The client end: connections to one address, opened as they are needed, and streams on them.

A ``Channel`` never fails a call because a connection says GOAWAY or is full: the call goes to
another connection. It fails calls when nobody answers (``UnreachableError``), at once or within
``connect_timeout_s``. It repeats nothing that was sent: that is for those who know what was.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import OrderedDict
from typing import TYPE_CHECKING

from mm.core import call_texts
from mm.core.headers import HeaderList
from mm.edge.addresses import split_address
from mm.edge.h2.limits import TransportLimits
from mm.edge.h2.link import Link
from mm.edge.h2.liveness import Liveness
from mm.edge.h2.stream import FaultKind, RawStream, StreamFault, StreamSink
from mm.errors import MeshError, StatusCode

if TYPE_CHECKING:
    from mm.edge.h2.tls import TlsEnd

#: Time for what was written last to leave when a channel closes.
_CLOSE_TIMEOUT_S = 1.0
_UNIX = "unix:"
#: A listener takes what waits in its backlog in one go, as soon as its owner comes to it.
_CONNECT_AGAIN_S = 0.02


class UnreachableError(MeshError):
    """Nobody answers at an address, or the connection broke before a call got on it."""

    code = StatusCode.UNAVAILABLE


class ChannelFullError(UnreachableError):
    """All connections to an address are full, and so is the line for them, or it does not move."""


class ClientLink(Link):
    """A connection that this process made."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel.limits)
        self.channel = channel
        #: Done when the other side's SETTINGS are here, failed when the connection is gone.
        self.ready: asyncio.Future[None] = self.loop.create_future()
        self._liveness = Liveness(self)

    def open(self, headers: HeaderList, sink: StreamSink, end: bool) -> RawStream:
        """Begin a stream; only while ``engine.can_open()``."""
        stream_id = self.engine.get_next_available_stream_id()
        stream = RawStream(self, stream_id, sink)
        self.engine.submit_headers(stream_id, headers, end)
        self.streams[stream_id] = stream
        stream.local_ended = end
        self.request_flush()
        self._liveness.begin()
        return stream

    def data_received(self, data: bytes) -> None:
        """Take bytes, as any link does."""
        self._liveness.heard()
        super().data_received(data)

    def handshake_failed(self, reason: str) -> None:
        """There will be no connection."""
        self.lost = True
        self._not_ready(call_texts.NO_TLS % (self.channel.address, reason))

    @property
    def other_end(self) -> str:
        """As the channel has it: a name, not what it was resolved to."""
        return self.channel.address

    def connection_lost(self, exc: BaseException | None) -> None:
        """Tell the channel."""
        super().connection_lost(exc)
        self._liveness.stop()
        self._not_ready(call_texts.NO_HTTP2 % self.channel.address)
        self.channel.link_lost(self)

    def _not_ready(self, why: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(UnreachableError(why))
            self.ready.exception()  # Known here; nobody need be waiting any more.

    def settings_received(self) -> None:
        """Streams may begin, or more of them."""
        if not self.ready.done():
            self.ready.set_result(None)
        self.channel.room_made()

    def goaway_received(self, last_id: int, code: int) -> None:
        """Give back the streams that the other side will not look at; the others go on."""
        text = call_texts.CONNECTION_CLOSING % self.channel.address
        fault = StreamFault(FaultKind.REFUSED, text, code)
        for stream in [stream for stream in self.streams.values() if stream.id > last_id]:
            self.engine.submit_reset(stream.id, 0)
            stream.terminate(fault)
        self._close_if_done()
        self.channel.room_made()

    def release(self, stream: RawStream) -> None:
        """Forget a stream; another may take its place."""
        super().release(stream)
        self._liveness.answered()
        if self.engine.goaway_last_id is not None:
            self._close_if_done()
        else:
            self.channel.room_made()

    def _close_if_done(self) -> None:
        if not self.streams and not self.lost:
            self.loop.call_soon(self.close_gently)

    def close_gently(self) -> None:
        """Close once all that was written has left."""
        if not self.lost:
            self._flush()
            self.connection.close_gently()


class Channel:
    """Streams to one address: "host:port", or "unix:" and a path.

    Invariants: 1. At most ``channel_connections_max`` connections exist. 2. A call waits only
    while a connection is being made, or all that may exist are full: no more of them in either case
    than ``room_waiters_max``, nobody longer than ``connect_timeout_s`` or ``room_wait_s``.
    """

    def __init__(self, address: str, limits: TransportLimits, tls: TlsEnd | None = None) -> None:
        # A record may say anything, and texts that name it have to be sent.
        self.address = address.encode(errors="backslashreplace").decode()
        self.limits = limits
        #: None: plain text.
        self._tls = tls
        #: What requests say in :authority.
        self.authority = b"localhost" if address.startswith(_UNIX) else self.address.encode()
        self.links: list[ClientLink] = []
        self.closed = False
        #: Event loop time of the last call begun, for whoever closes idle channels.
        self.used_s = 0.0
        self._connecting: asyncio.Task[None] | None = None
        #: Calls that wait for it.
        self._connect_waiters_count = 0
        #: Those that wait for the end of a connection.
        self._ends: list[asyncio.Future[None]] = []
        #: Those that wait for room, in their order; whoever gives up leaves at once.
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._failure: UnreachableError | None = None
        self._failed_s = 0.0

    @property
    def open_count(self) -> int:
        """Streams open now, over all connections."""
        return sum(len(link.streams) for link in self.links)

    def try_open(self, headers: HeaderList, sink: StreamSink, end: bool) -> RawStream | None:
        """Begin a stream on a connection that is there and has room; None if none has."""
        for link in self.links:
            if link.engine.can_open() and link.ready.done() and not link.lost:
                return link.open(headers, sink, end)
        return None

    async def open(self, headers: HeaderList, sink: StreamSink, end: bool = False) -> RawStream:
        """Begin a stream, on a new connection if need be.

        Raises ``UnreachableError``, of which ``ChannelFullError`` is one.
        """
        until_s: float | None = None
        while True:
            stream = self.try_open(headers, sink, end)
            if stream is not None:
                return stream
            if self.closed:
                raise UnreachableError(f"the channel to {self.address} is closed")
            if len(self.links) < self.limits.channel_connections_max:
                await self._connect()
            else:
                if until_s is None:
                    until_s = asyncio.get_running_loop().time() + self.limits.room_wait_s
                await self._wait_room(until_s)

    async def close(self) -> None:
        """Drop all connections; calls on them are lost."""
        self.closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError, UnreachableError):
                await self._connecting
        for link in list(self.links):
            link.close_gently()
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + _CLOSE_TIMEOUT_S
        while self.links and loop.time() < deadline_s:
            waiter = loop.create_future()
            self._waiters[waiter] = None
            await asyncio.wait((waiter,), timeout=deadline_s - loop.time())
        for link in list(self.links):
            link.connection.close()
        self.room_made()

    async def wait_disconnected(self) -> None:
        """Connect if there is no connection, and return when the first of those there are ends.

        Raises ``UnreachableError``.
        """
        if not self.links:
            await self._connect()
        if not self.links:
            return  # it ended already
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ends.append(end)
        try:
            await end
        finally:
            if end in self._ends:
                self._ends.remove(end)

    # --- connecting --------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Make one connection, together with whoever else waits for one."""
        loop = asyncio.get_running_loop()
        if self._connecting is None:
            if self._failure and loop.time() - self._failed_s < self.limits.connect_pause_s:
                raise UnreachableError(self._failure.message)
            # A task of its own: a caller that gives up must not take it from the others.
            self._connecting = loop.create_task(self._make_connection())
            self._connecting.add_done_callback(self._connected)
        if self._connect_waiters_count >= self.limits.room_waiters_max:
            raise self._full("a connection is being made")
        self._connect_waiters_count += 1
        try:
            await asyncio.shield(self._connecting)
        finally:
            self._connect_waiters_count -= 1

    def _full(self, why: str) -> ChannelFullError:
        return ChannelFullError(
            f"too many calls for {self.address}: {why}, and the limit is"
            f" {self.limits.room_waiters_max} calls that wait (room_waiters_max); retry later",
            code=StatusCode.RESOURCE_EXHAUSTED,
        )

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        error = None if task.cancelled() else task.exception()
        self._failure = error if isinstance(error, UnreachableError) else None
        self._failed_s = asyncio.get_running_loop().time()

    async def _make_connection(self) -> None:
        loop = asyncio.get_running_loop()
        link = ClientLink(self)
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(self.limits.connect_timeout_s):
                if self.address.startswith(_UNIX):
                    sock = await _unix_connection(self.address[len(_UNIX) :])
                    transport, _ = await loop.create_unix_connection(lambda: link, sock=sock)
                else:
                    host, port, _ = split_address(self.address)
                    transport, _ = await loop.create_connection(
                        lambda: self._secured(link), host, port
                    )
                await link.ready
        except TimeoutError:
            if transport is not None:
                transport.abort()
            raise UnreachableError(
                call_texts.NO_ANSWER % (self.address, self.limits.connect_timeout_s)
            ) from None
        except (OSError, ValueError) as error:
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
            raise UnreachableError(call_texts.NOT_CONNECTED % (self.address, why)) from error
        self.links.append(link)

    def _secured(self, link: ClientLink) -> asyncio.Protocol:
        if self._tls is None:
            return link
        # Not at the top of the file: plain text does without the extension.
        from mm.edge.h2.tls import TlsTransport

        return TlsTransport(link, self._tls, server_side=False)

    def link_lost(self, link: ClientLink) -> None:
        """Forget a connection."""
        if link in self.links:
            self.links.remove(link)
            ends, self._ends = self._ends, []
            for end in ends:
                if not end.done():
                    end.set_result(None)
        while self._waiters:
            self.room_made()

    # --- waiting for room ---------------------------------------------------------------------

    async def _wait_room(self, until_s: float) -> None:
        limits = self.limits
        if len(self._waiters) >= limits.room_waiters_max:
            raise self._full("all its connections are full")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            async with asyncio.timeout_at(until_s):
                await self._room(waiter)
        except TimeoutError:
            raise ChannelFullError(
                f"no room for a call on the connections to {self.address} in"
                f" {limits.room_wait_s:g} s"
            ) from None

    async def _room(self, waiter: asyncio.Future[None]) -> None:
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.room_made()
            self._waiters.pop(waiter, None)
            raise

    def room_made(self) -> None:
        """Wake one of those who wait for a full connection."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(None)
                return


async def _unix_connection(path: str) -> socket.socket:
    """Connect to a Unix socket. One whose backlog is full refuses at once, where TCP would try
    again by itself, and the event loops take that for the end, or for a connection.
    """
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                await asyncio.sleep(_CONNECT_AGAIN_S)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


class ChannelPool:
    """One channel an address, and a second one for calls that may wait there (design section 5).

    A call that waits for a load holds its stream; hits on the same connection would queue behind
    a thousand of those.
    """

    def __init__(
        self, limits: TransportLimits, *, idle_s: float = 300.0, tls: TlsEnd | None = None
    ) -> None:
        self.limits = limits
        self.idle_s = idle_s
        #: None: plain text.
        self.tls = tls
        self._channels: dict[tuple[str, bool], Channel] = {}
        self._swept_s = 0.0

    def get(self, address: str, *, may_wait: bool = False) -> Channel:
        """Answer the channel to an address, new if there is none."""
        now_s = asyncio.get_running_loop().time()
        channel = self._channels.get((address, may_wait))
        if channel is None:
            channel = self._channels[address, may_wait] = Channel(address, self.limits, self.tls)
        channel.used_s = now_s
        if now_s - self._swept_s > self.idle_s / 4:
            self._swept_s = now_s
            self._close_idle(now_s)
        return channel

    def _close_idle(self, now_s: float) -> None:
        """Close channels to instances that are gone, or that nobody needs any more."""
        for key, channel in list(self._channels.items()):
            if now_s - channel.used_s > self.idle_s and not channel.open_count:
                del self._channels[key]
                channel.closed = True
                for link in list(channel.links):
                    link.close_gently()

    async def close(self) -> None:
        """Drop all connections."""
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))
