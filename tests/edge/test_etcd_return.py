"""A hundred sessions that lost etcd together come back one after the other, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from aetcd import rpc

from mm.edge.etcd_connector import Connector
from mm.edge.etcd_session import RETRY_S, EtcdSession
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.errors import StoreUnavailableError

TTL_S = 20
SESSIONS_COUNT = 100
OUTAGE_S = 10.0
#: All come within 1.5 pauses; of a hundred, a third would in a tenth of a second. More than two
#: thirds come once in ten million times.
WINDOW_S = 0.1
TOGETHER_MAX = 66

_lease_ids = itertools.count(1)


class JumpingSelector(selectors.DefaultSelector):
    """Waits by having the time pass."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing will ever happen"
        self.now_s += max(timeout, 0.0)
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps over every wait."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


class AbsentEtcd(Connector):
    """Refuses everything until it is back; then every lease is lost, and notes who asks for one."""

    def __init__(self, is_there: Callable[[], bool], granted_s: list[float]) -> None:
        super().__init__(EtcdTarget((Endpoint("127.0.0.1"),)), timeout_s=3.5, silence_s=10.0)
        self._is_there = is_there
        self._granted_s = granted_s

    async def call(self, *_: Any, **__: Any) -> tuple[Any, bool]:
        if not self._is_there():
            raise StoreUnavailableError("refused")
        self._granted_s.append(asyncio.get_running_loop().time())
        return rpc.LeaseGrantResponse(ID=next(_lease_ids), TTL=TTL_S), False


class HeldSession(EtcdSession):
    """A session whose refreshes go to the connector's one method, too."""

    absent: Callable[[], bool]
    lost_id = 0

    async def _refresh(self) -> bool:
        if self.absent():
            self.lost_id = self.lease_id
            raise StoreUnavailableError("refused")
        return self.lease_id != self.lost_id


async def let_pass(seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()


def in_virtual_time(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(main())


def test_sessions_come_back_one_after_the_other() -> None:
    granted_s: list[float] = []

    async def main() -> None:
        is_there = True
        sessions = []
        for _ in range(SESSIONS_COUNT):
            session = HeldSession(TTL_S, AbsentEtcd(lambda: is_there, granted_s))
            session.absent = lambda: not is_there
            await session.start()
            sessions.append(session)
        granted_s.clear()
        await let_pass(TTL_S)
        assert not granted_s, "leases that live are kept"
        is_there = False
        await let_pass(OUTAGE_S)
        is_there = True
        back_s = asyncio.get_running_loop().time()
        await asyncio.gather(*(each.wait_change(each.lease_id) for each in sessions))
        assert len(granted_s) == SESSIONS_COUNT, "each asks for one lease"
        assert max(granted_s) - back_s <= 1.5 * RETRY_S + 0.01
        for session in sessions:
            assert session._keeping is not None
            session._keeping.cancel()

    in_virtual_time(main)
    assert max(sum(t <= each < t + WINDOW_S for each in granted_s) for t in granted_s) <= (
        TOGETHER_MAX
    )
