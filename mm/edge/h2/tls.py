"""TLS of one connection, between its socket and its link, at either end.

Owns the handshake and its limit, records in and out, and what is said to those who speak something
else. Contexts are ``mm.edge.tls``'s. Written on memory BIOs, as asyncio's own, which tells nobody
why a handshake failed, and sends no alert then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from dataclasses import dataclass, field
from typing import Any, Final, cast

from mm.edge.h2.link import Link
from mm.mesh.seldom import Seldom

logger = logging.getLogger(__name__)

#: RFC 9113, 3.2: HTTP/2 over TLS is agreed on by this name and nothing else.
ALPN: Final = "h2"
_READ_BYTES: Final = 64 * 1024


def _refusal(status: str, text: str) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: text/plain\r\n"
        f"content-length: {len(text)}\r\n\r\n{text}"
    ).encode()


#: To HTTP/1.1 without TLS, and within. The wire says the same (mm/wire/_wire_tls.pxi).
PLAIN_HTTP: Final = _refusal("400 Bad Request", "this port speaks TLS only\n")
NOT_H2: Final = _refusal("505 HTTP Version Not Supported", "gRPC over HTTP/2 only (ALPN h2)\n")

_REASONS: Final = {
    "HTTP_REQUEST": "it speaks plain HTTP",
    "HTTPS_PROXY_REQUEST": "it speaks plain HTTP",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate",
}


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

    context: ssl.SSLContext
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
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        # Here and not later: this connection is of the context that is used now.
        self._tls = end.context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._is_open = False
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
        self._incoming.write(data)
        if self._is_open or self._shake():
            self._read()

    def eof_received(self) -> bool | None:
        """The socket's other side closed its half, without a word in TLS."""
        return self.link.eof_received() if self._is_open else False

    def connection_lost(self, exc: BaseException | None) -> None:
        """The socket is gone."""
        if self._is_open:
            self._is_open = False
            self.link.connection_lost(exc)
        else:
            self._fail(str(exc) if exc else "it closed the connection")

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
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return False
        except ssl.SSLError as error:
            if error.reason in ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST"):
                self._raw.write(PLAIN_HTTP)
            else:
                self._send()  # the alert, which says why
            self._raw.close()
            self._fail(_why(error))
            return False
        self._send()
        if self._tls.selected_alpn_protocol() != ALPN:
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
        pieces = []
        ended = False
        try:
            while piece := self._tls.read(_READ_BYTES):
                pieces.append(piece)
            ended = True  # close_notify
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            logger.debug("dropping a TLS connection: %s", _why(error))
            self._send()
            self._raw.close()
            return
        self._send()
        if pieces and not self._raw.is_closing():
            self.link.data_received(b"".join(pieces))
        if ended and not self._raw.is_closing() and not self.link.eof_received():
            self.close()

    def _send(self) -> None:
        if self._outgoing.pending and not self._raw.is_closing():
            self._raw.write(self._outgoing.read())

    # --- what the link uses ------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Seal and send."""
        if self._raw.is_closing():
            return
        left = memoryview(data)
        try:
            while left:
                left = left[self._tls.write(left) :]
        except ssl.SSLError as error:
            logger.debug("dropping a TLS connection: %s", _why(error))
            self._raw.abort()
            return
        self._send()

    def close(self) -> None:
        """Close once all that was written has left, and say so in TLS."""
        if self._raw.is_closing():
            return
        # The other side's own word is not waited for.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
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

    def get_write_buffer_size(self) -> int:
        """Answer what waits for the socket."""
        return self._raw.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Answer what is known of the socket."""
        return self._raw.get_extra_info(name, default)


def _why(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    reason = error.reason or str(error)
    return _REASONS.get(reason, reason.lower().replace("_", " "))
