"""One connection to a member of an etcd cluster: how it is made, and who we are on it.

``Connection`` is one channel to one address, with TLS and a token if the target says so; ``Dialer``
makes one to whichever member will have us. Names are resolved and members rotated here, because a
channel to many addresses hides which one is silent. Which connection is in use, and for how long,
is ``mm.edge.etcd_connector``'s.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from aetcd import rpc

from mm.edge.etcd_calls import (
    CallError,
    CallFault,
    enter_grpc,
    in_own_task,
)
from mm.edge.kv_config import Endpoint, EtcdTarget

logger = logging.getLogger(__name__)

#: A page of a large table, or many events at once, exceed gRPC's 4 MiB.
RECEIVE_BYTES_MAX: Final = 256 * 1024 * 1024
#: Time to connect to one member, if there are many.
_CONNECT_LIMIT_MIN_S: Final = 0.3

#: Read by the Java mesh too to see whether etcd answers; never written (spec core 1.2).
PROBE_KEY: Final = b"/__DUMMY_KEY_FOR_TESTING_CONNECTION"

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    ("grpc.max_send_message_length", -1),
    # Channels to one address would share a connection: then a new channel is no new connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    # A retry behind our back would hide that a write may have been applied twice.
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 8_000),
)

Metadata = tuple[tuple[str, str], ...]
#: A member without a leader is to refuse at once instead of letting us wait.
_REQUIRE_LEADER: Final[Metadata] = (("hasleader", "true"),)


async def _invoke(method: Any, request: object, limit_s: float, metadata: Metadata) -> Any:
    return await method(request, timeout=limit_s, metadata=metadata)


class Connection:
    """One channel to one address. Once ``retired`` it is not used any longer."""

    def __init__(self, target: EtcdTarget, endpoint: Endpoint, address: str) -> None:
        enter_grpc()
        self.target = target
        self.endpoint = endpoint
        # With TLS it is the name that the member must prove to have.
        authority = target.authority or str(endpoint)
        options = (*_OPTIONS, ("grpc.default_authority", authority))
        if target.tls is None:
            self._channel = rpc.insecure_channel(address, options=options)
        else:
            tls = target.tls
            credentials = grpc.ssl_channel_credentials(
                tls.roots or None, tls.client_key or None, tls.client_chain or None
            )
            self._channel = rpc.secure_channel(address, credentials, options=options)
        self.kv = rpc.KVStub(self._channel)
        self.lease = rpc.LeaseStub(self._channel)
        self.watch = rpc.WatchStub(self._channel)
        self._auth = rpc.AuthStub(self._channel)
        self.metadata: Metadata = _REQUIRE_LEADER
        self.heard_s = time.monotonic()
        self.retired = False
        self.renewal: asyncio.Task[str] | None = None

    def heard(self) -> None:
        """Note that the other end spoke."""
        self.heard_s = time.monotonic()

    async def unary(self, method: Any, request: object, limit_s: float) -> Any:
        """Make one call; raises ``CallError``."""
        # gRPC keeps the time too; ours is a little longer, so that its better text wins.
        call = _invoke(method, request, limit_s, self.metadata)
        response = await in_own_task(call, limit_s + 0.1)
        self.heard()
        return response

    async def authenticate(self, user: str, password: str, limit_s: float) -> None:
        """Get a (new) token; raises ``CallError``."""
        request = rpc.AuthenticateRequest(name=user, password=password)
        # Without the old token, which would be refused before the password is looked at.
        call = _invoke(self._auth.Authenticate, request, limit_s, _REQUIRE_LEADER)
        try:
            response = await in_own_task(call, limit_s + 0.1)
        except CallError as exc:
            if "authentication is not enabled" in exc.reason:
                self.heard()
                return
            if "authentication failed" in exc.reason:
                reason = f"user {user!r} is refused: unknown, or the password is wrong"
                raise CallError(CallFault.FINAL, reason, maybe_done=False) from None
            raise
        self.heard()
        self.metadata = (*_REQUIRE_LEADER, ("token", response.token))

    async def close(self, grace_s: float | None = None) -> None:
        """Close the channel; calls that are still under way when ``grace_s`` is over fail."""
        await self._channel.close(grace_s)


@dataclass(frozen=True, slots=True)
class NotConnected:
    """Why no member will have us; nothing was said that holds a secret."""

    reason: str
    #: Whether it may be over in a moment.
    may_pass: bool
    #: Whether every address refuses us: nobody listens there, or not to us.
    is_refused: bool


class Dialer:
    """Makes connections to one cluster with one set of credentials.

    ``discard`` is given the connections that were no good.
    """

    def __init__(
        self, target: EtcdTarget, timeout_s: float, discard: Callable[[Connection], None]
    ) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._discard = discard
        self._probe_key = target.root_prefix.encode("utf-8", "surrogateescape") + PROBE_KEY
        # Instances that start together should not all sit on the member named first.
        self._rotation = random.randrange(len(target.endpoints))

    def turn(self) -> None:
        """Begin with another member the next time."""
        self._rotation += 1

    async def dial(self) -> Connection | NotConnected:
        """Try each address once, starting after the one that failed last."""
        reasons: list[str] = []
        may_pass = False
        refusals_count = 0
        addresses = await self._resolve(reasons)
        limit_s = max(self._timeout_s / max(len(addresses), 1) * 0.9, _CONNECT_LIMIT_MIN_S)
        for _ in range(len(addresses)):
            endpoint, address = addresses[self._rotation % len(addresses)]
            connection = Connection(self.target, endpoint, address)
            try:
                await self._greet(connection, limit_s)
            except CallError as exc:
                self._rotation += 1
                reasons.append(exc.reason if len(addresses) == 1 else f"{endpoint}: {exc.reason}")
                may_pass = may_pass or exc.fault is CallFault.WAIT
                refusals_count += exc.is_refusal
                self._discard(connection)
                continue
            except BaseException:
                self._discard(connection)
                raise
            logger.info("connected to etcd at %s", endpoint)
            return connection
        return NotConnected(
            reason="; ".join(dict.fromkeys(reasons)),
            may_pass=may_pass,
            is_refused=refusals_count == len(reasons),
        )

    async def _greet(self, connection: Connection, limit_s: float) -> None:
        """See that the member serves; raises ``CallError``."""
        target = self.target
        if target.user:
            await connection.authenticate(target.user, target.password, limit_s)
        request = rpc.RangeRequest(key=self._probe_key, count_only=True)
        try:
            await connection.unary(connection.kv.Range, request, limit_s)
        except CallError as exc:
            # A user of few rights may not read this key: that is an answer, too.
            if "not permitted" not in exc.reason:
                raise

    async def _resolve(self, reasons: list[str]) -> Sequence[tuple[Endpoint, str]]:
        """Answer an address in gRPC's notation for each way to each member."""
        found: list[tuple[Endpoint, str]] = []
        for endpoint in self.target.endpoints:
            try:
                hosts = await self._hosts(endpoint)
            except OSError as exc:
                reasons.append(f"{endpoint.host}: {exc.strerror or exc}")
                continue
            except CallError:
                reasons.append(f"{endpoint.host}: the name was not resolved in time")
                continue
            for host in hosts:
                address = f"ipv6:[{host}]" if ":" in host else f"ipv4:{host}"
                found.append((endpoint, f"{address}:{endpoint.port}"))
        return found

    async def _hosts(self, endpoint: Endpoint) -> Sequence[str]:
        try:
            return [str(ipaddress.ip_address(endpoint.host))]
        except ValueError:
            pass  # a name
        lookup = asyncio.get_running_loop().getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM
        )
        answers = await in_own_task(lookup, self._timeout_s / len(self.target.endpoints))
        return list(dict.fromkeys(str(answer[4][0]) for answer in answers))
