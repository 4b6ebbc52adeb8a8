"""A small HTTP/1.1 server for questions without a body: probes, hooks and pages of metrics.

Owns the bytes and their bounds. It reads the head of one request a connection, answers and closes:
so kubelet and Prometheus ask, and nothing that a body, a second request or a proxy in between could
mean is ever parsed. What the paths mean is ``life_cycle``'s and ``metrics``'.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, cast
from urllib.parse import parse_qs

from mm.edge.h2.crowd import key_of
from mm.edge.h2.listening import listening_socket
from mm.limits import Limits

logger = logging.getLogger(__name__)

#: A method is any token: the Java mesh answered them all alike (around 20.1).
_REQUEST_LINE: Final = re.compile(rb"([!#-'*+\-.^-z|~0-9A-Z]{1,32}) (/[!-~]*) HTTP/1\.[01]")
_HEAD_END: Final = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for."""

    method: str
    #: Without query, and without a slash at its end.
    path: str
    query_text: str
    #: The lines after the first.
    header_lines: tuple[bytes, ...]

    @property
    def query(self) -> Mapping[str, list[str]]:
        """All values by name."""
        return parse_qs(self.query_text)

    def header(self, name: str) -> str:
        """Answer the value of a header, its name in lower case; empty without one."""
        for line in self.header_lines:
            found, _, value = line.partition(b":")
            if found.strip().lower() == name.encode():
                return value.strip().decode("latin-1")
        return ""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer; most are a status alone."""

    status: HTTPStatus
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


Answer = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """Listens on one port.

    Bounds: ``probe_connections_max`` connections, of which the oldest that has not asked yet makes
    way for a new one, so that whoever only connects keeps out nobody; if all wait for answers, the
    oldest of the address that has the most does, so neither does whoever asks;
    ``probe_head_bytes_max`` bytes in ``probe_request_s`` for a request. An answer has no bound
    here: it may take as long as an instance takes to stop.
    """

    def __init__(self, answer: Answer, limits: Limits, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.limits = limits
        self.tls = tls
        #: In the order in which they came.
        self.connections: dict[_Connection, None] = {}
        self._listener: asyncio.Server | None = None
        self._emptied = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Listen, and answer the port; raises ``OSError``."""
        sock = listening_socket(host, port)
        loop = asyncio.get_running_loop()
        limits = self.limits
        self._listener = await loop.create_server(
            lambda: _Connection(self),
            sock=sock,
            ssl=self.tls,
            ssl_handshake_timeout=limits.probe_request_s if self.tls else None,
            ssl_shutdown_timeout=limits.metric_page_s if self.tls else None,
        )
        return int(sock.getsockname()[1])

    async def stop(self) -> None:
        """Take no connections, and return when those that asked have their answers.

        Whoever wants it sooner cancels it, and the rest is cut off.
        """
        if self._listener is None:
            return
        self._listener.close()
        try:
            for connection in list(self.connections):
                if not connection.has_asked:
                    connection.drop()
            while self.connections:
                self._emptied.clear()
                await self._emptied.wait()
        finally:
            for connection in list(self.connections):
                connection.drop()

    def came(self, connection: _Connection) -> None:
        """Take a connection; if there are too many, one goes."""
        self.connections[connection] = None
        if len(self.connections) > self.limits.probe_connections_max:
            victim = self._in_the_way(connection)
            # At once: whoever comes next in this turn has another one go.
            self.went(victim)
            victim.drop()

    def _in_the_way(self, newest: _Connection) -> _Connection:
        """Answer which has to go: one of an address that has more than half of the places, else one
        that has not asked, else one of the address that has the most.
        """
        ((address, count),) = Counter(each.address for each in self.connections).most_common(1)
        of_it = [each for each in self.connections if each.address == address]
        has_half = count > self.limits.probe_connections_max // 2
        for each in of_it if has_half else self.connections:
            if each is not newest and not each.has_asked:
                return each
        return newest if count == 1 else of_it[0]

    def went(self, connection: _Connection) -> None:
        """Forget a connection."""
        self.connections.pop(connection, None)
        if not self.connections:
            self._emptied.set()


class _Connection(asyncio.Protocol):
    """One connection: a head is read, one answer written, and what else comes is thrown away."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._head = bytearray()
        self._answering: asyncio.Task[None] | None = None
        self._has_answered = False
        self._surplus_bytes = 0
        #: Of the client, as connections are counted.
        self.address = ""

    @property
    def has_asked(self) -> bool:
        """Whether a request came, and its answer has not gone."""
        return self._answering is not None and not self._has_answered

    def drop(self) -> None:
        """Cut it off."""
        self._transport.abort()

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.address = key_of(transport.get_extra_info("peername"))
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(
            self._server.limits.probe_request_s, self._reply, HTTPStatus.REQUEST_TIMEOUT
        )
        self._server.came(self)

    def data_received(self, data: bytes) -> None:
        if self._answering is not None or self._has_answered:
            # The rest of a request is read, because closing on unread bytes could take the answer
            # away again (RFC 9112, 9.6); but not without end.
            self._surplus_bytes += len(data)
            if self._surplus_bytes > self._server.limits.probe_surplus_bytes_max:
                self.drop()
            return
        self._head += data
        end = self._head.find(_HEAD_END)
        if (end if end >= 0 else len(self._head)) > self._server.limits.probe_head_bytes_max:
            self._reply(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif end >= 0:
            self._read(bytes(self._head[:end]))

    def eof_received(self) -> bool:
        # Whoever left looks like one that only asks nothing more. An answer that there is already
        # is sent; nobody's place is kept for longer.
        if self.has_asked and self._server.tls is None:
            self._timer = self._loop.call_later(self._server.limits.probe_linger_s, self.drop)
            return True
        self._transport.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if self._answering is not None:
            self._answering.cancel()
        self._server.went(self)

    # --- the request, and its answer ---

    def _read(self, head: bytes) -> None:
        self._head.clear()
        first, *lines = head.split(b"\r\n")
        match = _REQUEST_LINE.fullmatch(first)
        if match is None:
            self._reply(HTTPStatus.BAD_REQUEST)
            return
        self._timer.cancel()
        path, _, query = match[2].decode("ascii").partition("?")
        request = Request(
            match[1].decode("ascii"), path.removesuffix("/") or "/", query, tuple(lines)
        )
        self._answering = self._loop.create_task(self._answer(request))

    async def _answer(self, request: Request) -> None:
        try:
            response = await self._server.answer(request)
        except Exception:
            # One question that goes wrong must not end what serves models; it is told.
            logger.exception("no answer to a request for %s", request.path)
            response = Response(HTTPStatus.INTERNAL_SERVER_ERROR)
        self._reply(
            response.status, response.headers, response.body, no_body=request.method == "HEAD"
        )

    def _reply(
        self,
        status: HTTPStatus,
        headers: tuple[tuple[str, str], ...] = (),
        body: bytes = b"",
        *,
        no_body: bool = False,
    ) -> None:
        if self._has_answered or self._transport.is_closing():
            return
        self._has_answered = True
        self._timer.cancel()
        head = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers),
            "Connection: close\r\n\r\n",
        ]
        self._transport.write("\r\n".join(head).encode("ascii") + (b"" if no_body else body))
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            # TLS knows no half of a connection: it is closed when all has been sent.
            self._transport.close()
        # The client closes when it has read this; one that does not is not waited for.
        limits = self._server.limits
        wait_s = limits.metric_page_s if body else limits.probe_linger_s
        self._timer = self._loop.call_later(wait_s, self.drop)
