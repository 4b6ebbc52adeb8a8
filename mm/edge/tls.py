"""The TLS of one instance: what its listeners and its calls to others go by, and its exchange.

Owns the contexts, and watching the files that they are made of: new ones hold for connections that
are made from then on, and those that are there go on. What the files say is
``mm.edge.tls_files``'s, a connection ``mm.edge.h2.tls``'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.to_thread

from mm.config import Config
from mm.edge.h2.tls import ALPN, HandshakeCounts, TlsEnd
from mm.edge.tls_files import Signature, TlsFiles, read_files, signature, warnings_of
from mm.edge.watched_file import FRESH_S, POLL_S, SECOND_LOOK_S
from mm.errors import ConfigError, StartupError
from mm.tls_settings import CERTIFICATE, TlsSettings

logger = logging.getLogger(__name__)

#: For TLS 1.2: what RFC 9113 (9.2.2) leaves. Those of TLS 1.3 are all good.
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True, slots=True)
class Contexts:
    """Made of one state of the files; None: plain text."""

    clients: ssl.SSLContext
    peers: ssl.SSLContext | None
    to_peers: ssl.SSLContext | None


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
        #: Told of new files once they hold here.
        self.on_exchange: Callable[[TlsFiles], None] | None = None
        self._exchanges = 0
        self._is_refused = False
        self._seen = signature(settings)

    @property
    def statistics(self) -> TlsStatistics:
        """What was counted here; a wire counts its own handshakes."""
        return TlsStatistics(
            self.counts.handshakes,
            self.counts.handshakes_failed,
            self.counts.handshakes_late,
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
            try:
                found = await anyio.to_thread.run_sync(self._read)
            except ConfigError:
                # Key and certificate are two files: one of them may still be the old one.
                await anyio.sleep(SECOND_LOOK_S)
                seen = await anyio.to_thread.run_sync(signature, self.settings)
                try:
                    found = await anyio.to_thread.run_sync(self._read)
                except ConfigError as error:
                    self._refuse(error)
                    found = None
            self._seen = seen
            if found is not None:
                self._exchange(*found)

    def _read(self) -> tuple[TlsFiles, Contexts]:
        files = read_files(self.settings)
        if files == self.files:
            return files, Contexts(self.clients.context, None, None)
        return files, make_contexts(self.settings, files)

    def _refuse(self, error: ConfigError) -> None:
        if not self._is_refused:
            logger.warning("TLS: %s; what the files said before still holds", error)
        self._is_refused = True

    def _exchange(self, files: TlsFiles, contexts: Contexts) -> None:
        if self._is_refused:
            logger.info("TLS: the files can be used again")
        self._is_refused = False
        if files == self.files:
            return
        self.files = files
        self.clients.context = contexts.clients
        if contexts.peers is not None and contexts.to_peers is not None:
            assert self.peers is not None
            assert self.to_peers is not None
            self.peers.context = contexts.peers
            self.to_peers.context = contexts.to_peers
        self._exchanges += 1
        if self.on_exchange is not None:
            self.on_exchange(files)
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
    demand = {
        "none": ssl.CERT_NONE,
        "optional": ssl.CERT_OPTIONAL,
        "require": ssl.CERT_REQUIRED,
    }[settings.client_auth]
    try:
        clients = _context(ssl.PROTOCOL_TLS_SERVER, files, files.trust, demand)
        if not settings.peers:
            return Contexts(clients, None, None)
        demand = ssl.CERT_REQUIRED if settings.peers_auth else ssl.CERT_NONE
        return Contexts(
            clients,
            _context(ssl.PROTOCOL_TLS_SERVER, files, files.peers_trust, demand),
            _context(ssl.PROTOCOL_TLS_CLIENT, files, files.peers_trust, ssl.CERT_REQUIRED),
        )
    except ssl.SSLError as error:
        raise ConfigError(f"{CERTIFICATE}: OpenSSL does not take it: {error}") from error


def _context(
    protocol: int, files: TlsFiles, trust: bytes | None, demand: ssl.VerifyMode
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols([ALPN])
    # Instances are called by their addresses, which no certificate names: that it is one of ours
    # is what counts.
    context.check_hostname = False
    context.verify_mode = demand
    with _in_memory(files.chain + files.key) as path:
        context.load_cert_chain(path)
    if demand != ssl.CERT_NONE:
        # A certificate in the list is trusted itself, whoever signed it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if trust is None:
            context.set_default_verify_paths()
        else:
            with _in_memory(trust) as path:
                context.load_verify_locations(path)
    return context


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The ssl module reads from files alone, and the key may be one that is encrypted on disk."""
    file = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(file, content)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)
