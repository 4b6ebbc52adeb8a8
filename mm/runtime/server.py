"""A small gRPC server for model runtimes: listeners, connections, the life of calls.

Works on grpclib's protocol layer, below its ``Server``, because one mesh instance brings all its
calls over one connection: grpclib's own server allows 100 at a time, leaves calls with malformed
headers unanswered, lets one non-ASCII header end the connection with all calls on it, and on
Python 3.12 and later never closes while a client stays connected. What a call is, is in
``call.py``.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import anyio
from anyio.abc import TaskGroup
from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler, Connection, EventsProcessor, H2Protocol, Stream
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import Event
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from mm.errors import MeshError, StartupError, StatusCode
from mm.runtime.call import Call, CallError, Handler, MessageBuffer, RawHeaders

logger = logging.getLogger(__name__)

_GRPC: Final = b"application/grpc"


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What clients may ask of a server."""

    #: Calls at a time on one connection. The mesh sends everything over one.
    connection_calls_max: int = 20_000
    message_bytes_max: int = 64 * 2**20
    header_list_bytes_max: int = 64 * 2**10
    #: Bytes that a client may send ahead of what the handler has read, per call.
    stream_window_bytes: int = 1 * 2**20
    #: The same for all calls of a connection together: few slow readers must not stop the rest.
    connection_window_bytes: int = 64 * 2**20
    #: How long calls in flight may take to end once the server stops.
    stop_grace_s: float = 5.0
    #: How long connections may take to close after that.
    close_timeout_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a TCP port, 0 for a free one, or the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``PORT``, ``HOST:PORT``, ``unix:PATH`` or ``unix://PATH``."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:").removeprefix("//")
            if not path:
                raise StartupError(f"address {text!r} has no path; write unix:///run/some.sock")
            return cls(path=path)
        host, _, port = text.rpartition(":")
        if not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
            raise StartupError(
                f"address {text!r}; allowed are PORT, HOST:PORT (0-65535) and unix://PATH"
            )
        return cls(host=host.strip("[]") or "127.0.0.1", port=int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def bind(self) -> socket.socket:
        """Answer a socket that listens here; ``StartupError`` says why not."""
        try:
            if self.path:
                return self._bind_path()
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            return socket.create_server((self.host, self.port), family=family, backlog=512)
        except OSError as exc:
            why = "in use" if exc.errno == errno.EADDRINUSE else exc.strerror or exc
            raise StartupError(f"cannot listen on {self}: {why}") from exc

    def _bind_path(self) -> socket.socket:
        with socket.socket(socket.AF_UNIX) as probe:
            # A socket file outlives a killed process: it is in the way, but nobody answers.
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
            else:
                raise OSError(errno.EADDRINUSE, "in use")
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(self.path)
            listener.listen(512)
        except OSError:
            listener.close()
            raise
        return listener


def address_of(listener: socket.socket) -> Address:
    """Answer where a listening socket really is (port 0 has become a number)."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return Address(path=name)
    return Address(host=name[0], port=name[1])


class GrpcServer:
    """Serves ``methods``, keyed by full name with the leading slash.

    Calls are tasks of the group that ``serving`` opens. A bug in a handler ends its call with
    INTERNAL and is logged with a traceback.
    """

    def __init__(self, methods: Mapping[str, Handler], limits: ServerLimits | None = None) -> None:
        self._methods = methods
        self.limits = limits or ServerLimits()
        self._tasks: TaskGroup | None = None
        self._connections: set[_Protocol] = set()
        self._is_stopping = False
        self._calls_in_flight = 0
        #: Replaced by whoever waits for quiet.
        self._progress = anyio.Event()

    @asynccontextmanager
    async def serving(self, listeners: Sequence[socket.socket]) -> AsyncIterator[None]:
        """Serve on sockets that listen. On the way out calls in flight get ``stop_grace_s``."""
        loop = asyncio.get_running_loop()
        self._is_stopping = False
        async with anyio.create_task_group() as self._tasks:
            servers = []
            for listener in listeners:
                start = (
                    loop.create_unix_server
                    if listener.family == socket.AF_UNIX
                    else loop.create_server
                )
                servers.append(await start(partial(_Protocol, self), sock=listener))
            try:
                yield
            finally:
                paths = [address_of(listener).path for listener in listeners]
                for server in servers:
                    server.close()
                for path in filter(None, paths):
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                await self._stop()
                self._tasks.cancel_scope.cancel()

    async def _stop(self) -> None:
        self._is_stopping = True
        with anyio.move_on_after(self.limits.stop_grace_s, shield=True):
            await self._quiet(lambda: self._calls_in_flight == 0)
        for connection in list(self._connections):
            connection.go_away()
        with anyio.move_on_after(self.limits.close_timeout_s, shield=True):
            await self._quiet(lambda: not self._connections)
        for connection in list(self._connections):
            connection.abort()

    async def _quiet(self, is_quiet: Callable[[], bool]) -> None:
        while not is_quiet():
            self._progress = anyio.Event()
            await self._progress.wait()

    # --- called by connections --------------------------------------------------------------

    def connected(self, connection: _Protocol) -> None:
        """Count a connection."""
        self._connections.add(connection)

    def disconnected(self, connection: _Protocol) -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        self._progress.set()

    def start_call(
        self,
        scope: anyio.CancelScope,
        stream: Stream,
        headers: RawHeaders,
        release: Callable[[], None],
    ) -> None:
        """Start the task of a call; ``scope`` is cancelled if the client goes away."""
        assert self._tasks is not None
        self._calls_in_flight += 1
        self._tasks.start_soon(self._run_call, scope, stream, headers, release)

    async def _run_call(
        self,
        scope: anyio.CancelScope,
        stream: Stream,
        headers: RawHeaders,
        release: Callable[[], None],
    ) -> None:
        try:
            with scope:
                await self._answer(Call(stream, headers, self.limits.message_bytes_max))
        except ProtocolError:
            # The stream or its connection was closed under the call. Nobody is left to tell.
            logger.debug("client gone", exc_info=True)
        finally:
            self._calls_in_flight -= 1
            self._progress.set()
            with suppress(ProtocolError):  # as above
                release()

    async def _answer(self, call: Call) -> None:
        code, message, details = StatusCode.OK, "", b""
        try:
            handler = self._handler_of(call)
            timeout_s = call.timeout_s()
            with anyio.fail_after(timeout_s) as limit:
                await handler(call)
        except CallError as exc:
            code, message, details = exc.code, exc.message, exc.details
        except MeshError as exc:
            code, message = exc.code, exc.message
        except ProtocolError:
            raise
        except Exception as exc:
            if isinstance(exc, TimeoutError) and timeout_s is not None and limit.cancelled_caught:
                code, message = StatusCode.DEADLINE_EXCEEDED, f"over the call's {timeout_s} s"
            else:
                logger.exception("bug in the handler of %s", call.path)
                code, message = StatusCode.INTERNAL, f"{type(exc).__name__}: {exc}"
        await call.finish(code, message, details)

    def _handler_of(self, call: Call) -> Handler:
        subtype = (call.header(b"content-type") or b"").partition(b";")[0].removeprefix(_GRPC)
        if subtype not in (b"", b"+proto") or not call.header(b"content-type"):
            text = f"content-type {call.header(b'content-type')!r}; application/grpc is served"
            raise CallError(StatusCode.INVALID_ARGUMENT, text)
        if self._is_stopping:
            raise CallError(StatusCode.UNAVAILABLE, "the server is stopping")
        handler = self._methods.get(call.path)
        if handler is None:
            raise CallError(StatusCode.UNIMPLEMENTED, f"unknown method {call.path}")
        return handler


class _Calls(AbstractHandler):
    """grpclib's idea of a handler, one a connection: knows the calls to cancel."""

    def __init__(self, server: GrpcServer) -> None:
        self._server = server
        self._scopes: dict[Stream, anyio.CancelScope] = {}

    def accept(self, stream: Stream, headers: Any, release_stream: Any) -> None:
        assert stream.id is not None
        stream.buffer = cast(
            Any,
            MessageBuffer(
                partial(stream.connection.ack, stream.id), self._server.limits.message_bytes_max
            ),
        )
        scope = self._scopes[stream] = anyio.CancelScope()

        def release() -> None:
            self._scopes.pop(stream, None)
            release_stream()

        self._server.start_call(scope, stream, headers, release)

    def cancel(self, stream: Stream) -> None:
        if scope := self._scopes.get(stream):
            scope.cancel()

    def close(self) -> None:
        for scope in self._scopes.values():
            scope.cancel()


class _Events(EventsProcessor):
    """grpclib's, but frames of kinds that it does not know are ignored, as HTTP/2 demands."""

    def process(self, event: Event) -> None:
        # grpclib deletes the table when the connection closes.
        if type(event) in getattr(self, "processors", ()):
            super().process(event)


class _Protocol(H2Protocol):
    """One connection, with the limits of the server instead of h2's defaults."""

    def __init__(self, server: GrpcServer) -> None:
        super().__init__(
            _Calls(server),
            Configuration().__for_server__(),
            H2Configuration(
                client_side=False,
                header_encoding=None,  # raw: a header that is not ASCII is one call's trouble
                validate_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_inbound_headers=False,
                normalize_outbound_headers=False,
            ),
        )
        self._server = server
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        limits = self._server.limits
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        h2 = H2Connection(config=self.h2_config)
        h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: limits.connection_calls_max,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.header_list_bytes_max,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
            },
        )
        h2.initiate_connection()
        h2.increment_flow_control_window(limits.connection_window_bytes - 65_535)
        self.connection = Connection(h2, self._transport, config=self.config)
        self.connection.flush()
        self.connection.initialize()
        self.processor = _Events(self.handler, self.connection)
        self._server.connected(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._server.disconnected(self)

    def go_away(self) -> None:
        """Tell the client that no further calls are taken, then close when all is written."""
        assert self._transport is not None
        with suppress(ProtocolError):  # already closed by the client
            self.connection._connection.close_connection()
            self.connection.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close without writing what is left."""
        assert self._transport is not None
        self._transport.abort()
