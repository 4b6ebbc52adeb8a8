"""The TLS of one instance: what its listeners and its calls to others go by, and its exchange.

Owns the contexts, and watching the files that they are made of: new ones hold for connections that
are made from then on, and those that are there go on. What the files say is
``mm.edge.tls_files``'s, a connection ``mm.edge.h2.tls``'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.to_thread

from mm.config import Config
from mm.edge.h2.tls import HandshakeCounts, TlsEnd
from mm.edge.tls_files import Signature, TlsFiles, read_files, signature, warnings_of
from mm.edge.watched_file import FRESH_S, POLL_S, SECOND_LOOK_S
from mm.errors import ConfigError, StartupError
from mm.tls_settings import CERTIFICATE, TlsSettings
from mm.wire._wire import TlsContext

logger = logging.getLogger(__name__)

#: For TLS 1.2: what RFC 9113 (9.2.2) leaves. Those of TLS 1.3 are all good.
CIPHERS: Final = b"@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True, slots=True)
class Contexts:
    """Made of one state of the files; None: plain text. Both data planes go by the same ones."""

    clients: TlsContext
    peers: TlsContext | None
    to_peers: TlsContext | None


@dataclass(frozen=True, slots=True)
class TlsStatistics:
    """Since the start, but for the last two."""

    handshakes: int
    handshakes_failed: int
    handshakes_late: int
    exchanges: int
    #: 1 if the files cannot be used as they are now, and older ones hold.
    files_refused: int
    #: When the certificate ends, in seconds since the epoch.
    certificate_expiry_s: float


class Tls:
    """The TLS of one instance, as its files say now."""

    def __init__(self, settings: TlsSettings, files: TlsFiles, handshake_s: float) -> None:
        """Raises ``ConfigError``."""
        contexts = make_contexts(settings, files)
        self.settings = settings
        self.files = files
        self.counts = HandshakeCounts()
        self.clients = TlsEnd(contexts.clients, self.counts, handshake_s)
        self.peers = self.to_peers = None
        if contexts.peers is not None and contexts.to_peers is not None:
            self.peers = TlsEnd(contexts.peers, self.counts, handshake_s)
            self.to_peers = TlsEnd(contexts.to_peers, self.counts, handshake_s)
        self.contexts = contexts
        #: Told of new contexts, when ``files`` says what they are made of.
        self.on_exchange: list[Callable[[Contexts], None]] = []
        #: What is counted elsewhere.
        self.other_counts: Callable[[], HandshakeCounts] = HandshakeCounts
        self._exchanges = 0
        self._is_refused = False
        self._seen = signature(settings)

    @property
    def statistics(self) -> TlsStatistics:
        """What was counted, here and in the threads of the wire."""
        others = self.other_counts()
        return TlsStatistics(
            self.counts.handshakes + others.handshakes,
            self.counts.handshakes_failed + others.handshakes_failed,
            self.counts.handshakes_late + others.handshakes_late,
            self._exchanges,
            int(self._is_refused),
            self.files.expiry_s,
        )

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Exchange what new files say, as long as the context is open."""
        self._warn()
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow)
            yield
            group.cancel_scope.cancel()

    async def _follow(self) -> None:
        while True:
            await anyio.sleep(POLL_S)
            seen = await anyio.to_thread.run_sync(signature, self.settings)
            if seen == self._seen and not _is_fresh(seen):
                continue
            self._seen = seen
            if await self._complaint() is not None:
                # Key and certificate are two files: one of them may still be the old one.
                await anyio.sleep(SECOND_LOOK_S)
                complaint = await self._complaint()
                if complaint is not None and not self._is_refused:
                    logger.warning("TLS: %s; what the files said before still holds", complaint)
                self._is_refused = complaint is not None

    async def _complaint(self) -> ConfigError | None:
        """Go by the files as they are now; answers what is wrong if that is not possible."""
        try:
            found = await anyio.to_thread.run_sync(self._read)
        except ConfigError as error:
            return error
        if self._is_refused:
            logger.info("TLS: the files can be used again")
        self._is_refused = False
        if found is not None:
            self._exchange(*found)
        return None

    def _read(self) -> tuple[TlsFiles, Contexts] | None:
        """Answer what the files say now, None if that is no news. Raises ``ConfigError``."""
        files = read_files(self.settings)
        return None if files == self.files else (files, make_contexts(self.settings, files))

    def _exchange(self, files: TlsFiles, contexts: Contexts) -> None:
        self.contexts = contexts
        self.files = files
        self.clients.context = contexts.clients
        if contexts.peers is not None and contexts.to_peers is not None:
            assert self.peers is not None
            assert self.to_peers is not None
            self.peers.context = contexts.peers
            self.to_peers.context = contexts.to_peers
        self._exchanges += 1
        for tell in self.on_exchange:
            tell(contexts)
        logger.info("TLS: new files are in use, for connections from now on")
        self._warn()

    def _warn(self) -> None:
        for warning in warnings_of(self.files, time.time()):
            logger.warning("%s", warning)


def _is_fresh(seen: Signature) -> bool:
    """A file changed this short ago may have changed twice, with the same time and size."""
    now_s = time.time()
    return any(len(look) > 1 and abs(now_s - look[-1] / 1e9) < FRESH_S for _, look in seen)


async def open_tls(config: Config) -> Tls:
    """Answer what was asked for; raises ``StartupError``."""
    try:
        return await anyio.to_thread.run_sync(
            lambda: Tls(config.tls, read_files(config.tls), config.tls_handshake_s)
        )
    except ConfigError as error:
        raise StartupError(str(error)) from error


def make_contexts(settings: TlsSettings, files: TlsFiles) -> Contexts:
    """Raises ``ConfigError`` for what OpenSSL does not take, such as a key that is too short."""
    auth = settings.client_auth
    try:
        clients = _context(files, files.trust, asks=auth != "none", demands=auth == "require")
        if not settings.peers:
            return Contexts(clients, None, None)
        # Instances are called by their addresses, which no certificate names: that it is one of
        # ours is what counts.
        trust, shown = files.peers_trust, settings.peers_auth
        peers = _context(files, trust, asks=shown, demands=shown)
        to_peers = _context(files, trust, asks=True, demands=True, is_server=False)
        return Contexts(clients, peers, to_peers)
    except ValueError as error:
        raise ConfigError(f"{CERTIFICATE}: OpenSSL does not take it: {error}") from error


def _context(
    files: TlsFiles, trust: bytes | None, *, asks: bool, demands: bool, is_server: bool = True
) -> TlsContext:
    return TlsContext(
        files.chain,
        files.key,
        trust,
        is_server=is_server,
        asks=asks,
        demands=demands,
        ciphers=CIPHERS,
    )
