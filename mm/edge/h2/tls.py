"""TLS of one connection, between its socket and its link, at either end.

Owns the handshake and its limit, records in and out, and what is said to those who speak something
else. Contexts are ``mm.edge.tls``'s, and what is done with a record OpenSSL's, as in the wire
(mm/wire/_wire_tls.pxi). asyncio's own TLS tells nobody why a handshake failed, and sends no alert.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any, Final, cast

from mm.edge.h2.link import Link
from mm.mesh.seldom import Seldom
from mm.wire._wire import TlsContext, TlsError, TlsSession

logger = logging.getLogger(__name__)


def _refusal(status: str, text: str) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: text/plain\r\n"
        f"content-length: {len(text)}\r\n\r\n{text}"
    ).encode()


#: To HTTP/1.1 without TLS, and within. The wire says the same (mm/wire/_wire_tls.pxi).
PLAIN_HTTP: Final = _refusal("400 Bad Request", "this port speaks TLS only\n")
NOT_H2: Final = _refusal("505 HTTP Version Not Supported", "gRPC over HTTP/2 only (ALPN h2)\n")


@dataclass(slots=True)
class HandshakeCounts:
    """Of one instance, since its start."""

    handshakes: int = 0
    handshakes_failed: int = 0
    #: Of these, those that took too long.
    handshakes_late: int = 0


@dataclass(slots=True)
class TlsEnd:
    """How one listener, or the calls to others, speak TLS; the context may be exchanged."""

    context: TlsContext
    counts: HandshakeCounts
    handshake_s: float
    #: A port that is scanned must not fill the log.
    complaints: Seldom = field(default_factory=Seldom)


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """To the socket a protocol, to the link a transport.

    Invariants: 1. The link is told nothing before the handshake is complete, or has failed. 2. It
    is told either ``handshake_failed`` or ``connection_made`` and ``connection_lost``. 3. What
    OpenSSL has to say leaves at once: nothing waits here but records that have not come whole.
    """

    def __init__(self, link: Link, end: TlsEnd, *, server_side: bool) -> None:
        super().__init__()
        self.link = link
        self._end = end
        self._server_side = server_side
        # Made here and not later: this connection is of the context that is used now.
        self._tls = TlsSession(end.context, server_side)
        self._is_open = False
        self._is_begun = not server_side
        self._why_lost: ConnectionError | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- what asyncio tells ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake."""
        self._raw = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(self._end.handshake_s, self._late)
        self.link.handshake_begun(self)
        if not self._server_side:
            self._shake()

    def data_received(self, data: bytes) -> None:
        """Take records."""
        self._is_begun = True
        self._tls.feed(data)
        if self._is_open or self._shake():
            self._read()

    def eof_received(self) -> bool | None:
        """The socket's other side closed its half, without a word in TLS."""
        return self.link.eof_received() if self._is_open else False

    def connection_lost(self, exc: BaseException | None) -> None:
        """The socket is gone."""
        if self._is_open:
            self._is_open = False
            self.link.connection_lost(self._why_lost or exc)
        elif self._is_begun:
            self._fail(str(exc) if exc else "it closed the connection")
        elif self._timer is not None:
            # Probes of ports connect and say nothing.
            self._stop_timer()
            self.link.handshake_failed("it said nothing")

    def pause_writing(self) -> None:
        """The socket takes no more."""
        if self._is_open:
            self.link.pause_writing()

    def resume_writing(self) -> None:
        """The socket takes more."""
        if self._is_open:
            self.link.resume_writing()

    # --- the handshake -----------------------------------------------------------------------

    def _shake(self) -> bool:
        """Go on with the handshake; answers whether it is complete."""
        if self._timer is None:
            return False
        try:
            is_complete = self._tls.shake()
        except TlsError as error:
            if self._server_side and error.is_http:
                self._raw.write(PLAIN_HTTP)
            else:
                self._send()  # the alert, which says why
            self._raw.close()
            self._fail(str(error))
            return False
        self._send()
        if not is_complete:
            return False
        if not self._tls.speaks_h2():
            if self._server_side:
                self._tls.write(NOT_H2)
            self.close()
            self._fail("it does not offer h2 by ALPN")
            return False
        self._stop_timer()
        self._end.counts.handshakes += 1
        self._is_open = True
        self.link.connection_made(self)
        return True

    def _late(self) -> None:
        self._raw.abort()
        self._end.counts.handshakes_late += 1
        self._fail(f"no TLS handshake in {self._end.handshake_s:g} s")

    def _fail(self, reason: str) -> None:
        if self._timer is None:
            return
        self._stop_timer()
        self._end.counts.handshakes_failed += 1
        if self._server_side:
            level = self._end.complaints.level(asyncio.get_running_loop().time())
            address = self._raw.get_extra_info("peername")
            logger.log(level, "no TLS with the client at %s: %s", address, reason)
        self.link.handshake_failed(reason)

    def _stop_timer(self) -> None:
        assert self._timer is not None
        self._timer.cancel()
        self._timer = None

    # --- records -----------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            data = self._tls.read()
        except TlsError as error:
            # In TLS 1.3 the other side may refuse us after our handshake is complete.
            self._why_lost = ConnectionError(f"in TLS: {error}")
            self._send()
            self._raw.close()
            return
        self._send()
        if data is None:
            if not self._raw.is_closing() and not self.link.eof_received():
                self.close()
        elif data and not self._raw.is_closing():
            self.link.data_received(data)

    def _send(self) -> None:
        data = self._tls.take()
        if data and not self._raw.is_closing():
            self._raw.write(data)

    # --- what the link uses ------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Seal and send."""
        if self._raw.is_closing():
            return
        try:
            self._tls.write(bytes(data))
        except TlsError as error:
            logger.debug("dropping a TLS connection: %s", error)
            self._raw.abort()
            return
        self._send()

    def close(self) -> None:
        """Close once all that was written has left, and say so in TLS."""
        if self._raw.is_closing():
            return
        self._tls.close()  # the other side's own word is not waited for
        self._send()
        self._raw.close()

    def abort(self) -> None:
        """Drop the connection."""
        self._raw.abort()

    def is_closing(self) -> bool:
        """Answer whether the socket is closed, or will be."""
        return self._raw.is_closing()

    def pause_reading(self) -> None:
        """Take no more from the socket."""
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Take from the socket again."""
        self._raw.resume_reading()

    def certificate_names(self) -> tuple[str, ...]:
        """Answer what the other side's certificate calls it."""
        return self._tls.certificate_names()

    def get_write_buffer_size(self) -> int:
        """Answer what waits for the socket."""
        return self._raw.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Answer what is known of the socket."""
        return self._raw.get_extra_info(name, default)
