"""Connections to an etcd cluster: which member, how long it may be silent, who we are to it.

``Connection`` is one channel to one address with its token; ``Connector`` keeps the one in use,
makes new ones and runs calls over them within a time limit, moving to another member as needed.
Names are resolved and members rotated here, because a channel to many addresses hides which one is
silent. What is asked of etcd is no concern of this file.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from aetcd import rpc

from mm.edge.etcd_calls import (
    CONNECTION_REFUSED,
    CallError,
    CallFault,
    drain,
    enter_grpc,
    in_own_task,
)
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Write

logger = logging.getLogger(__name__)

#: A page of a large table, or many events at once, exceed gRPC's 4 MiB.
RECEIVE_BYTES_MAX: Final = 256 * 1024 * 1024
#: While the store is known to be away, a call waits only this long for it to come back.
DOWN_WAIT_S: Final = 0.5
#: Time to connect to one member, if there are many.
_CONNECT_LIMIT_MIN_S: Final = 0.3
#: Between attempts while the members are busy with themselves.
_PAUSE_S: Final = 0.05

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

Rpc = Callable[["Connection"], Any]


async def _invoke(method: Any, request: object, limit_s: float, metadata: Metadata) -> Any:
    return await method(request, timeout=limit_s, metadata=metadata)


class Connection:
    """One channel to one address. Once ``retired`` it is not used any longer."""

    def __init__(self, endpoint: Endpoint, address: str) -> None:
        enter_grpc()
        self.endpoint = endpoint
        options = (*_OPTIONS, ("grpc.default_authority", str(endpoint)))
        self._channel = rpc.insecure_channel(address, options=options)
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

    async def close(self) -> None:
        """Close the channel; calls under way fail."""
        await self._channel.close()


class Connector:
    """Keeps one good connection to the cluster and makes calls over it.

    All failures come out as ``StoreUnavailableError`` naming the endpoints, but for those faults
    that the caller asked to see.
    """

    def __init__(self, target: EtcdTarget, timeout_s: float, silence_s: float) -> None:
        self.timeout_s = timeout_s
        self.silence_s = silence_s
        self._target = target
        self._probe_key = target.root_prefix.encode("utf-8", "surrogateescape") + PROBE_KEY
        self._current: Connection | None = None
        self._round: asyncio.Task[tuple[str, bool]] | None = None
        self._down_reason = ""
        self._down_since_s = 0.0
        self._nobody_listens = False
        #: Whether etcd refused a write for want of space, and has taken none since.
        self.out_of_space = False
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        # Instances that start together should not all sit on the member named first.
        self._rotation = random.randrange(len(target.endpoints))

    # --- state ---

    @property
    def connected(self) -> bool:
        """Whether the last contact succeeded and is recent."""
        if self._current is None or self._down_reason:
            return False
        return time.monotonic() - self._current.heard_s <= self.silence_s

    def error(self, reason: str) -> StoreUnavailableError:
        """Answer the error to raise: says which store, and why."""
        return StoreUnavailableError(
            f"{self._target}: {reason}", nobody_listens=self._nobody_listens
        )

    def wrote(self, writes: Sequence[Write]) -> None:
        """Note that etcd took these: there is room, unless all they do is make some."""
        if self.out_of_space and any(write.value is not None for write in writes):
            self.out_of_space = False
            logger.info("etcd has room again")

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task that ends at the latest when the connector closes."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def retire(self, connection: Connection, reason: str) -> None:
        """Give a connection up for good; whoever uses it notices, the next call makes a new one."""
        if connection.retired:
            return
        logger.info("leaving etcd at %s: %s", connection.endpoint, reason)
        self._discard(connection)
        if self._current is connection:
            self._current = None
            self._rotation += 1

    async def close(self) -> None:
        """Close everything; bounded."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._current is not None:
            self._discard(self._current)
            self._current = None
        if self._tasks or self._closing:
            await asyncio.wait(self._tasks | self._closing, timeout=self.timeout_s)
        await drain()

    def _discard(self, connection: Connection) -> None:
        connection.retired = True
        task = asyncio.get_running_loop().create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- calls ---

    async def call(
        self, method: Rpc, request: object, *, pass_on: frozenset[CallFault] = frozenset()
    ) -> tuple[Any, bool]:
        """Make one call, on another member if need be; answers also whether it was sent before.

        Raises ``CallError`` for the faults in ``pass_on``.
        """
        deadline_s = time.monotonic() + self.timeout_s
        moves_left = len(self._target.endpoints)
        sent_before = False
        token_renewed = False
        while True:
            connection = await self.connection(deadline_s)
            started_s = time.monotonic()
            metadata = connection.metadata
            limit_s = self._attempt_limit_s(deadline_s - started_s)
            try:
                response = await connection.unary(method(connection), request, limit_s)
            except CallError as exc:
                if exc.fault in pass_on:
                    raise
                error = self.error(exc.reason)
                if exc.fault is CallFault.NO_SPACE and not self.out_of_space:
                    self.out_of_space = True
                    logger.error("%s: no write is taken until somebody makes room", exc.reason)
                sent_before = sent_before or exc.maybe_done
                if exc.fault is CallFault.TOKEN and not token_renewed:
                    token_renewed = True
                    await self.renew_token(connection, metadata, deadline_s)
                elif exc.fault is CallFault.WAIT:
                    if len(self._target.endpoints) > 1:
                        self.retire(connection, exc.reason)
                    await asyncio.sleep(_PAUSE_S)
                elif exc.fault is CallFault.MOVE and moves_left:
                    moves_left -= 1
                    if connection.heard_s <= started_s:
                        self.retire(connection, exc.reason)
                else:
                    raise error from None
                if time.monotonic() >= deadline_s - _PAUSE_S:
                    raise error from None
            else:
                self._down_reason = ""
                return response, sent_before

    def _attempt_limit_s(self, left_s: float) -> float:
        """Leave time for another member if there is one."""
        members = len(self._target.endpoints)
        return max(left_s if members == 1 else left_s / min(members, 3), 0.01)

    async def renew_token(
        self, connection: Connection, refused: Metadata, deadline_s: float
    ) -> None:
        """Log in again unless somebody did since ``refused``; raises ``StoreUnavailableError``.

        A login is made slow by design, so all who were refused share one.
        """
        if connection.metadata is not refused:
            return
        if connection.renewal is None or connection.renewal.done():
            connection.renewal = self.spawn(self._login(connection))
        renewal = connection.renewal
        await asyncio.wait({renewal}, timeout=max(deadline_s - time.monotonic(), 0.01))
        if not renewal.done() or renewal.cancelled():
            raise self.error("no answer to the login in time")
        if renewal.result():
            raise self.error(renewal.result())

    async def _login(self, connection: Connection) -> str:
        """Answer why it failed, or nothing."""
        try:
            await connection.authenticate(self._target.user, self._target.password, self.timeout_s)
        except CallError as exc:
            return exc.reason
        return ""

    # --- connecting ---

    async def connection(self, deadline_s: float) -> Connection:
        """Answer the connection in use, or make one; raises ``StoreUnavailableError``."""
        while True:
            if self._closed:
                raise self.error("the store is closed")
            if self._current is not None:
                return self._current
            reason, may_pass = await self._wait_round(deadline_s)
            if not reason:
                continue
            # Members without a leader are electing one, which takes a second or two. If it takes
            # longer they are too few, and calls fail at once.
            patience_s = min(deadline_s, self._down_since_s + self.timeout_s)
            if not may_pass or time.monotonic() >= patience_s - _PAUSE_S:
                raise self.error(reason)
            await asyncio.sleep(_PAUSE_S)

    async def _wait_round(self, deadline_s: float) -> tuple[str, bool]:
        """Wait for the attempt to connect; answer why it failed, and if that may soon pass."""
        if self._round is None or self._round.done():
            self._round = self.spawn(self._connect())
        attempt = self._round
        left_s = deadline_s - time.monotonic()
        limit_s = min(left_s, DOWN_WAIT_S) if self._down_reason else left_s
        await asyncio.wait({attempt}, timeout=max(limit_s, 0.01))
        if not attempt.done() or attempt.cancelled():
            return self._down_reason or f"no answer within {self.timeout_s:g} s", False
        return attempt.result()

    async def _connect(self) -> tuple[str, bool]:
        """Try each address once, starting after the one that failed last.

        Answers why none will have us, nothing if one does; and whether that may soon pass.
        """
        reasons: list[str] = []
        may_pass = False
        addresses = await self._resolve(reasons)
        limit_s = max(self.timeout_s / max(len(addresses), 1) * 0.9, _CONNECT_LIMIT_MIN_S)
        for _ in range(len(addresses)):
            endpoint, address = addresses[self._rotation % len(addresses)]
            connection = Connection(endpoint, address)
            try:
                await self._greet(connection, limit_s)
            except CallError as exc:
                self._rotation += 1
                reasons.append(exc.reason if len(addresses) == 1 else f"{endpoint}: {exc.reason}")
                may_pass = may_pass or exc.fault is CallFault.WAIT
                self._discard(connection)
                continue
            except BaseException:
                self._discard(connection)
                raise
            logger.info("connected to etcd at %s", endpoint)
            self._current = connection
            self._down_reason = ""
            self._nobody_listens = False
            return "", False
        if not self._down_reason:
            self._down_since_s = time.monotonic()
        self._down_reason = "; ".join(dict.fromkeys(reasons))
        self._nobody_listens = all(reason.endswith(CONNECTION_REFUSED) for reason in reasons)
        return self._down_reason, may_pass

    async def _greet(self, connection: Connection, limit_s: float) -> None:
        """See that the member serves; raises ``CallError``."""
        if self._target.user:
            await connection.authenticate(self._target.user, self._target.password, limit_s)
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
        for endpoint in self._target.endpoints:
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
        answers = await in_own_task(lookup, self.timeout_s / len(self._target.endpoints))
        return list(dict.fromkeys(str(answer[4][0]) for answer in answers))
