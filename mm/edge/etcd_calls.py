"""How every call into grpc.aio is made, and what its failures mean.

Owns two things: the rule that no such call is awaited directly (design section 6), and the reading
of etcd's error texts. What to do about a failure is decided in ``mm.edge.etcd_connector``.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
from collections.abc import Awaitable, Sequence
from functools import cache
from typing import Any, Final, TypeVar

import grpc.aio
from aetcd import rpc

_T = TypeVar("_T")

#: Most of what grpc does at the end of a call it does at once.
_SETTLE_S: Final = 0.005

#: Cancelled calls on their way out; the event loop itself holds tasks only weakly.
_abandoned: set[asyncio.Future[Any]] = set()


#: What grpc.aio says, each in its place, of using a call or a channel that has ended meanwhile.
_ENDED: Final = (asyncio.InvalidStateError, grpc.aio.UsageError, grpc.aio.InternalError)


class CallFault(enum.Enum):
    """What to do about a failed call."""

    #: The connection, or the member behind it, is no good; another may be.
    MOVE = "move"
    #: The member says that it cannot now (no leader, busy); it may in a moment.
    WAIT = "wait"
    #: The token is no longer good; a new one will be.
    TOKEN = "token"
    #: The lease does not exist.
    LEASE_LOST = "lease-lost"
    #: The revision asked for is compacted away.
    COMPACTED = "compacted"
    #: etcd takes no more writes until somebody makes room (its NOSPACE alarm).
    NO_SPACE = "no-space"
    #: No retry will help.
    FINAL = "final"


class CallError(Exception):
    """A call into etcd failed. ``maybe_done``: it may have had, or may yet have, its effect.

    ``is_refusal``: the other end will have nothing to do with us, a second later neither.
    """

    def __init__(
        self, fault: CallFault, reason: str, *, maybe_done: bool, is_refusal: bool = False
    ) -> None:
        super().__init__(reason)
        self.fault = fault
        self.reason = reason
        self.maybe_done = maybe_done
        self.is_refusal = is_refusal or fault is CallFault.FINAL


async def in_own_task(call: Awaitable[_T], limit_s: float | None) -> _T:
    """Await ``call`` in a task of its own; raises ``CallError`` if it fails or takes too long.

    grpc.aio lets bare CancelledErrors out when a channel closes or a read is interrupted; seen
    from inside a cancel scope they are taken for the scope's own and end it silently. Here they
    stay in the other task, and a CancelledError that comes out is always the caller's.
    """
    task = asyncio.ensure_future(_result(call))
    try:
        await asyncio.wait({task}, timeout=limit_s)
    except BaseException:
        _abandon(task)
        raise
    if not task.done():
        _abandon(task)
        raise CallError(CallFault.MOVE, f"no answer within {limit_s:.2g} s", maybe_done=True)
    return _outcome(task)


def _outcome(task: asyncio.Future[_T]) -> _T:
    if task.cancelled():
        raise CallError(CallFault.MOVE, "the connection was closed", maybe_done=True)
    error = task.exception()
    if isinstance(error, rpc.AioRpcError):
        raise _call_error(error) from None
    if isinstance(error, _ENDED):
        raise CallError(CallFault.MOVE, "the connection was closed", maybe_done=True) from None
    return task.result()


class Stream:
    """One stream to etcd, read with patience: a read that takes long goes on in the next one.

    Cancelling a read would end the stream in grpc.aio.
    """

    def __init__(self, method: Any, metadata: Sequence[tuple[str, str]]) -> None:
        """Open it; raises ``CallError``."""
        try:
            self._call = method(metadata=metadata)
        except _ENDED:
            raise CallError(CallFault.MOVE, "the connection was closed", maybe_done=False) from None
        self._reading: asyncio.Future[Any] | None = None

    async def write(self, request: object, limit_s: float) -> None:
        """Send one message; raises ``CallError``."""
        await in_own_task(self._call.write(request), limit_s)

    async def read(self, limit_s: float) -> Any:
        """Answer the next message, None if there is none in ``limit_s``; raises ``CallError``."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(_result(self._call.read()))
        await asyncio.wait({self._reading}, timeout=limit_s)
        if not self._reading.done():
            return None
        reading, self._reading = self._reading, None
        message = _outcome(reading)
        if message is grpc.aio.EOF:
            raise CallError(CallFault.MOVE, "etcd ended the stream", maybe_done=False)
        return message

    def interrupt(self) -> None:
        """Have the present read, or the next one, fail."""
        self._call.cancel()

    def close(self) -> None:
        """End the stream; it is not used again."""
        self._call.cancel()
        if self._reading is not None:
            _abandon(self._reading)
            self._reading = None


async def _result(call: Awaitable[_T]) -> _T:
    return await call


def _abandon(task: asyncio.Future[_T]) -> None:
    task.cancel()
    _abandoned.add(task)
    task.add_done_callback(_forget)


def _forget(task: asyncio.Future[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not complain: nobody wants it any more


@cache
def enter_grpc() -> None:
    """Start grpc's machinery for the rest of the process.

    Else it ends with the last channel, and its end waits for a thread in the event loop: each time
    a lone connection is replaced.
    """
    grpc.aio.init_grpc_aio()


async def drain() -> None:
    """Return when what grpc has still to say of ended calls has been said.

    It tells of a cancelled call's end later, from a thread of its own, by way of the event loop
    that made the call; with that loop closed, the next one in the process gets an error instead.
    Notices come in order, so one that is provoked last comes last.
    """
    await asyncio.sleep(_SETTLE_S)
    channel = rpc.insecure_channel("ipv4:127.0.0.1:0")
    try:
        state = channel.get_state(try_to_connect=True)
        with contextlib.suppress(CallError):
            await in_own_task(channel.wait_for_state_change(state), 0.5)
    finally:
        await channel.close()


#: The reason when the machine answers and nobody listens.
CONNECTION_REFUSED: Final = "connection refused"

_NEVER_SENT: Final = re.compile(r"failed to connect|connection refused|not ready|dns resol", re.I)
#: What grpc says of a handshake that failed -> what to say, with the way out.
_TLS_WORDS: Final = (
    (
        re.compile(r"(?:CERTIFICATE_VERIFY_FAILED|BAD_SIGNATURE): ([a-z0-9 ,-]+)"),
        'its certificate is not trusted ({}); attribute "certificate" or "certificate_file" is to'
        " hold the one that signed it",
    ),
    (
        re.compile(r"Hostname Verification Check failed"),
        "its certificate bears another name than its endpoint; attribute"
        ' "override_authority" is to hold that name',
    ),
    (
        re.compile(r"ALERT_(BAD_CERTIFICATE|CERTIFICATE_REQUIRED|UNKNOWN_CA|CERTIFICATE_EXPIRED)"),
        "it refuses our client certificate, or wants one; attributes"
        ' "client_certificate" and "client_key", or the same with "_file", are to hold both',
    ),
    (
        re.compile(r"WRONG_VERSION_NUMBER|Handshake read failed"),
        "it does not speak TLS; with http:// before the endpoints neither do we",
    ),
    (
        re.compile(r"failed to connect.*(?:Socket closed|Connection reset by peer)"),
        "it closed the connection at once; if it wants TLS, write https:// before the endpoints",
    ),
)
#: etcd's words -> what to do, what to say (empty: repeat etcd's words), whether it may be done.
_WORDS: Final[tuple[tuple[str, CallFault, str, bool], ...]] = (
    ("invalid auth token", CallFault.TOKEN, "", False),
    ("revision of auth store is old", CallFault.TOKEN, "", False),
    ("requested lease not found", CallFault.LEASE_LOST, "the lease is lost", False),
    ("required revision has been compacted", CallFault.COMPACTED, "", False),
    ("database space exceeded", CallFault.NO_SPACE, "etcd is out of space", False),
    ("request is too large", CallFault.FINAL, "the record is too large for etcd", False),
    ("too many requests", CallFault.WAIT, "", False),
    ("no leader", CallFault.WAIT, "", True),
    ("leader changed", CallFault.WAIT, "", True),
    ("request timed out", CallFault.WAIT, "", True),
    ("user name is empty", CallFault.FINAL, "it requires a user and a password", False),
    ("permission denied", CallFault.FINAL, "the user is not permitted to do this", False),
)
_MOVE_CODES: Final = frozenset(
    {
        rpc.StatusCode.UNAVAILABLE,
        rpc.StatusCode.DEADLINE_EXCEEDED,
        rpc.StatusCode.CANCELLED,
        rpc.StatusCode.INTERNAL,
        rpc.StatusCode.UNKNOWN,
        rpc.StatusCode.UNIMPLEMENTED,
    }
)


def _call_error(error: rpc.AioRpcError) -> CallError:
    details = error.details() or ""
    for words, fault, reason, maybe_done in _WORDS:
        if words in details:
            return CallError(fault, reason or details, maybe_done=maybe_done)
    code = error.code()
    if code in _MOVE_CODES:
        never_sent = code is rpc.StatusCode.UNAVAILABLE and _NEVER_SENT.search(details)
        refusal = _refusal(details)
        return CallError(
            CallFault.MOVE,
            refusal or _brief(code, details),
            maybe_done=not never_sent,
            is_refusal=bool(refusal),
        )
    return CallError(CallFault.FINAL, _brief(code, details), maybe_done=False)


def _refusal(details: str) -> str:
    """Answer what to say if nobody listens, or not to us."""
    if "Connection refused" in details:
        return CONNECTION_REFUSED
    for words, telling in _TLS_WORDS:
        if found := words.search(details):
            return telling.format(*found.groups())
    return ""


def fault_of_text(details: str) -> CallFault:
    """Answer what to do about an error that etcd tells in a message (a cancelled watch)."""
    for words, fault, _, _ in _WORDS:
        if words in details:
            return fault
    return CallFault.MOVE


def _brief(code: rpc.StatusCode, details: str) -> str:
    """Take the one telling part out of grpc's nested texts."""
    if code is rpc.StatusCode.DEADLINE_EXCEEDED or "context deadline exceeded" in details:
        return "no answer in time"
    return f"{code.name}: {details}" if details else code.name
