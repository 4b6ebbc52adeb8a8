"""The other end of a connection, frame by frame: an h2 that may break every rule."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from mm.core.headers import HeaderList

#: Ends what hangs; no test asserts how fast anything is by it.
PATIENCE_S = 60.0
E = TypeVar("E", bound=Event)

REQUEST: HeaderList = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/t.S/Echo"),
    (b":authority", b"a"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]


class PeerClosedError(Exception):
    """The connection ended while something was expected on it."""


class LastingConnection(H2Connection):
    """For h2 a GOAWAY is the end; here it is an event, as for those who do it right."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        event = ConnectionTerminated()
        event.error_code = ErrorCodes(frame.error_code)
        event.last_stream_id = frame.last_stream_id
        return [], [event]


class RawPeer:
    """One end. What it received is in ``events``; nothing is acknowledged unless told."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, client_side: bool
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.h2 = LastingConnection(
            H2Configuration(
                client_side=client_side,
                header_encoding=None,
                validate_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_inbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.events: list[Event] = []
        self.closed = False

    def start(self, streams_max: int = 100, window_bytes: int = 65_535) -> None:
        """Begin to speak; ``window_bytes`` is the room of a stream, and of all together if more."""
        values = {
            SettingCodes.MAX_CONCURRENT_STREAMS: streams_max,
            SettingCodes.INITIAL_WINDOW_SIZE: window_bytes,
        }
        client_side = self.h2.config.client_side
        self.h2.local_settings = Settings(client=client_side, initial_values=values)
        self.h2.initiate_connection()
        if window_bytes > 65_535:
            self.h2.increment_flow_control_window(window_bytes - 65_535)
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def send_frame(self, frame: Frame) -> None:
        self.flush()
        self.writer.write(frame.serialize())

    def begin(self, headers: HeaderList = REQUEST, *, end: bool = False) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, headers, end_stream=end)
        self.flush()
        return stream_id

    def send(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(stream_id, data, end_stream=end)
        self.flush()

    def reset(self, stream_id: int, code: int = ErrorCodes.NO_ERROR) -> None:
        self.h2.reset_stream(stream_id, code)
        self.flush()

    async def read(self) -> bool:
        """Take what comes next; False at the end of the connection."""
        try:
            data = await asyncio.wait_for(self.reader.read(2**20), PATIENCE_S)
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return False
        self.events += self.h2.receive_data(data)
        self.flush()
        return True

    async def wait_for(self, kind: type[E], matches: Callable[[E], bool] = lambda _: True) -> E:
        """Take events until one matches; answer it and drop it."""
        while True:
            for event in self.events:
                if isinstance(event, kind) and matches(event):
                    self.events.remove(event)
                    return event
            if not await self.read():
                raise PeerClosedError(f"closed before {kind.__name__}: {self.events}"[:500])

    async def wait_on(self, kind: type[E], stream_id: int) -> E:
        return await self.wait_for(kind, lambda event: getattr(event, "stream_id", 0) == stream_id)

    async def wait_ended(self) -> int:
        """Wait for the end of the next request; answer its stream."""
        event = await self.wait_for(StreamEnded)
        assert event.stream_id is not None
        return event.stream_id

    async def wait_answer(self, stream_id: int) -> tuple[dict[bytes, bytes], bytes]:
        """Answer all headers and trailers of a response, and its body, acknowledged."""
        headers: dict[bytes, bytes] = {}
        body = b""
        while True:
            await self.wait_pending(stream_id)
            for event in [e for e in self.events if getattr(e, "stream_id", 0) == stream_id]:
                self.events.remove(event)
                if isinstance(event, ResponseReceived | TrailersReceived):
                    headers.update(dict(event.headers))  # type: ignore[arg-type]
                elif isinstance(event, DataReceived):
                    body += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, stream_id)
                    self.flush()
                elif isinstance(event, StreamReset):
                    raise AssertionError(f"stream {stream_id} was reset: {event}")
                elif isinstance(event, StreamEnded):
                    return headers, body

    async def wait_pending(self, stream_id: int) -> None:
        while not any(getattr(event, "stream_id", 0) == stream_id for event in self.events):
            if not await self.read():
                raise PeerClosedError(f"closed before stream {stream_id}"[:500])

    async def wait_closed(self) -> ConnectionTerminated | None:
        """Read to the end of the connection; answer the GOAWAY if there was one."""
        while await self.read():
            pass
        ends = [event for event in self.events if isinstance(event, ConnectionTerminated)]
        return ends[-1] if ends else None

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def connect(port: int, *, start: bool = True) -> AsyncIterator[RawPeer]:
    """A hostile client."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    peer = RawPeer(reader, writer, client_side=True)
    if start:
        peer.start()
    try:
        yield peer
    finally:
        await peer.close()


@asynccontextmanager
async def listen(
    serve: Callable[[RawPeer], Awaitable[Any]],
) -> AsyncIterator[tuple[str, list[RawPeer]]]:
    """A hostile server: ``serve`` runs for each connection. Yields address and connections."""
    peers: list[RawPeer] = []
    tasks: list[asyncio.Task[Any]] = []
    failures: list[BaseException] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = RawPeer(reader, writer, client_side=False)
        peers.append(peer)
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        try:
            await serve(peer)
        except (PeerClosedError, asyncio.CancelledError):
            pass  # How connections end; what a test waits for, it waits for elsewhere.
        except AssertionError as failure:
            failures.append(failure)
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"127.0.0.1:{port}", peers
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
    for failure in failures:
        raise failure


def resets(code: int) -> Callable[[RawPeer], Awaitable[None]]:
    """A server that resets the first request, once it has all of it, and then only listens."""

    async def serve(peer: RawPeer) -> None:
        peer.start()
        peer.reset(await peer.wait_ended(), code)
        await peer.wait_closed()

    return serve
