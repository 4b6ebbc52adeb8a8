"""One thread's worth of wire; ``mm.wire.Wire`` is its one user."""

from collections.abc import Iterable
from typing import Any

from mm.wire import Measures, WireSettings
from mm.wire.addresses import Target

class TlsContext:
    """How one kind of connection speaks TLS. Raises ``ValueError`` for what OpenSSL refuses."""

    def __init__(
        self,
        chain: bytes,
        key: bytes,
        trust: bytes | None,
        *,
        is_server: bool,
        asks: bool,
        demands: bool,
        ciphers: bytes,
    ) -> None: ...

class TlsError(Exception):
    """OpenSSL gave a connection up; the text says why."""

    #: The other side speaks plain HTTP.
    is_http: bool

class TlsSession:
    """TLS of one connection for Python: bytes in, bytes out, and no socket.

    After each call that may have something to say, also one that raised, ``take`` answers it.
    """

    def __init__(self, context: TlsContext, is_server: bool) -> None: ...
    def feed(self, data: bytes) -> None:
        """Take what came from the socket."""

    def take(self) -> bytes:
        """Answer what has to be sent."""

    def shake(self) -> bool:
        """Go on with the handshake; answers whether it is complete. Raises ``TlsError``."""

    def speaks_h2(self) -> bool:
        """Answer whether the handshake has agreed on HTTP/2."""

    def certificate_names(self) -> tuple[str, ...]:
        """Answer the names in the other side's certificate, as "CN:…", "DNS:…" (in lower case) and
        "URI:…", in this order; nothing without one.
        """

    def read(self) -> bytes | None:
        """Answer what is there in plain; None if nothing is, and nothing follows. Raises
        ``TlsError``.
        """

    def write(self, data: bytes) -> None:
        """Seal bytes. Raises ``TlsError``."""

    def close(self) -> None:
        """Say that nothing follows."""

class Worker:
    """Methods may be called from any thread but the one that is in ``run``."""

    def __init__(
        self, notice_fd: int, measures: Measures | None, beside: Worker | None = None
    ) -> None:
        """``beside``: another worker, with which it counts connections together."""

    def run(self) -> None:
        """Serve until ``stop``; the GIL is not held."""

    def configure(self, told: WireSettings) -> None:
        """Go by these settings from now on."""

    def listen(self, fd: int, role: int) -> None:
        """Take over a listening socket, and accept connections on it."""

    def set_tier2(self, fd: int, role: int, own: bool) -> None:
        """Take over a connected socket that leads to tier 2."""

    def set_runtime(self, told: Target) -> None:
        """Say where the runtime is."""

    def set_peers(self, told: Iterable[Target]) -> None:
        """Say which instances can be called, and where: all of them."""

    def drain(self) -> None:
        """Accept no more, say GOAWAY, and let what runs finish."""

    def end_calls(self) -> None:
        """Answer the calls that are under way here that we stop."""

    def stop(self) -> None:
        """Let ``run`` return at the end of its turn."""

    def take_missing(self) -> list[tuple[int, bool]]:
        """Answer the tier 2 connections that are gone, as (role, own)."""

    def take_reports(self) -> list[tuple[bytes, bytes, int, int, int, int]]:
        """Answer (sender, model id, calls, answers, told or -1, service ns) of peers that called
        since the last time.
        """

    def take_failures(self) -> list[list[tuple[bytes, bytes]]]:
        """Answer what attempts came to whose calls cannot be sent again, since the last time: in
        the headers that replayed calls bring.
        """

    def take_tls_failure(self) -> tuple[int, str] | None:
        """Answer (role, text) of the handshake at a listener that failed last; once."""

    def take_flood(self) -> tuple[bytes, str] | None:
        """Answer (address as IPv6, what it sent too much of) of the client cut off last; once."""

    def take_crowded_address(self) -> bytes:
        """Answer the last address that had too many connections, as IPv6; once."""

    def counts(self) -> list[int]:
        """Answer the counters, in the order of ``WireStatistics``."""

    def calls(self) -> list[tuple[Any, ...]]:
        """Answer (path, status, model id, vmodel id), then each of the series as two lists: how
        many values fell into each bucket, and what they came to.
        """

    def peer_traffic(self, handles: list[int]) -> list[tuple[int, int]]:
        """Answer, for each handle, the calls under way there and the answers since the start."""
