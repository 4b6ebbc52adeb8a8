"""Wires between nodes of one process: calls to peers, with partitions, crashes and delays.

Owns what may go wrong between two addresses. What an instance answers is its ``PeerServer``'s
affair. Anyio alone: delays are virtual time under trio.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import permutations, product
from typing import Final, Protocol, TypeVar

import anyio
import anyio.lowlevel

from mm.core.calls import Call, Outcome, PeerRoute, Route
from mm.core.hop_headers import read_hop_request, read_outcome, write_hop_request
from mm.core.ids import InstanceId, ModelId
from mm.errors import MeshError
from mm.mesh.hop_errors import peer_error
from mm.mesh.ports import ModelStatus, PeerCallError, PeerIdentity

T = TypeVar("T")

#: Connections between instances are pinged each 2.5 s, and a ping is answered within 5 s.
DEAD_WIRE_S: Final = 7.5


class PeerServer(Protocol):
    """What listens at an address: the peer port of one instance.

    Methods raise ``MeshError``; one with a ``hop_result`` tells the sender to try elsewhere.
    """

    def identity(self) -> PeerIdentity:
        """Answer who this is."""
        ...

    async def ensure_loaded(self, call: Call, *, sync: bool) -> ModelStatus:
        """Load by a peer's order."""
        ...

    async def model_status(self, model_id: ModelId) -> ModelStatus:
        """Answer for the copy here, without asking others."""
        ...

    async def serve(self, call: Call) -> InstanceId:
        """Serve a proxied call; answers which instance did."""
        ...

    def tell_load(self, call: Call) -> int:
        """Answer how busy the copy here is besides this call: every reply tells it."""
        ...

    def take_loads(self, sender: InstanceId, loads: Mapping[ModelId, int]) -> None:
        """Hear how busy the sender's copies are."""
        ...

    def take_demand(self, sender: InstanceId, demands: Mapping[ModelId, tuple[int, int]]) -> None:
        """Hear of the calls at the sender's copies."""
        ...

    async def withdraw_copy(self, model_id: ModelId) -> bool:
        """Give up the copy here."""
        ...


class FakeNetwork:
    """Connects addresses.

    A cut wire swallows what is sent until it is healed; where nobody listens, a call is refused.
    """

    def __init__(self, *, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        #: Instead of ``latency_s``: what the next message from one address to another takes.
        self.delay_s: Callable[[str, str], float] | None = None
        #: Whether the connection breaks under the next message from one address to another.
        self.loses: Callable[[str, str], bool] | None = None
        #: Calls that arrived, by address.
        self.arrivals: Counter[str] = Counter()
        #: How often something went wrong between two addresses, by source and target.
        self.disturbances: Counter[tuple[str, str]] = Counter()
        self._servers: dict[str, PeerServer] = {}
        self._cut: set[tuple[str, str]] = set()
        self._open: defaultdict[str, set[anyio.CancelScope]] = defaultdict(set)
        #: Calls without a time limit of their own, by the two addresses.
        self._unlimited: defaultdict[frozenset[str], set[anyio.CancelScope]] = defaultdict(set)
        self._changed = anyio.Event()

    # --- what a test arranges -----------------------------------------------------------------

    def listen(self, address: str, server: PeerServer) -> None:
        """Serve at an address that is free."""
        assert address not in self._servers, address
        self._servers[address] = server

    def close(self, address: str) -> None:
        """Stop serving: calls in progress there break, later ones are refused."""
        self._servers.pop(address, None)
        for scope in list(self._open[address]):
            scope.cancel()

    def cut(self, source: str, target: str) -> None:
        """Swallow whatever goes from one address to another; the other way still works."""
        self._cut.add((source, target))
        self.disturbances[source, target] += 1
        self._limit_calls(frozenset((source, target)))

    def split(self, *groups: Iterable[str]) -> None:
        """Cut all wires between addresses of different groups, both ways."""
        for here, there in permutations([list(group) for group in groups], 2):
            for source, target in product(here, there):
                self.cut(source, target)

    def mend(self, source: str, target: str) -> None:
        """End ``cut``: what was sent meanwhile arrives now, unless its sender gave up."""
        self._cut.discard((source, target))
        self._limit_calls(frozenset((source, target)))
        self._wake()

    def heal(self) -> None:
        """Mend everything."""
        self._cut.clear()
        for wire in self._unlimited:
            self._limit_calls(wire)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def is_cut(self, source: str, target: str) -> bool:
        """Answer whether what goes from one address to another is swallowed."""
        return (source, target) in self._cut

    def peers(self, address: str) -> FakePeers:
        """Answer the port through which the instance at an address calls others."""
        return FakePeers(self, address)

    # --- a call -------------------------------------------------------------------------------

    async def call(
        self,
        source: str,
        target: str,
        timeout_s: float | None,
        work: Callable[[PeerServer], Awaitable[T]],
        *,
        is_counted: bool = True,
    ) -> T:
        """Have ``target`` do ``work``; raises ``PeerCallError`` if it cannot or will not.

        Without a time limit a call ends when pings would show that the wire is dead.
        """
        scope, wire = anyio.CancelScope(), frozenset((source, target))
        if timeout_s is None:
            self._unlimited[wire].add(scope)
            self._limit_calls(wire)
        else:
            scope.deadline = anyio.current_time() + timeout_s
        try:
            with scope:
                await self._travel(source, target)
                server = self._servers.get(target)
                if server is None:
                    raise PeerCallError(Outcome.UNREACHABLE, f"{target}: connection refused")
                if is_counted:
                    self.arrivals[target] += 1
                answer = await self._answer(target, server, work)
                await self._travel(target, source)
                return answer
        finally:
            self._unlimited[wire].discard(scope)
        within = "to pings" if timeout_s is None else f"in {timeout_s:g} s"
        raise PeerCallError(Outcome.UNREACHABLE, f"{target}: no answer {within}")

    def _limit_calls(self, wire: frozenset[str]) -> None:
        """Give calls on a wire that is cut the time that pings take to show it, others all time."""
        is_cut = any(cut <= wire for cut in map(frozenset, self._cut))
        for scope in self._unlimited[wire]:
            if not is_cut:
                scope.deadline = math.inf
            elif scope.deadline == math.inf:
                scope.deadline = anyio.current_time() + DEAD_WIRE_S

    async def _travel(self, source: str, target: str) -> None:
        await anyio.sleep(self.delay_s(source, target) if self.delay_s else self.latency_s)
        if self.loses is not None and self.loses(source, target):
            self.disturbances[source, target] += 1
            raise PeerCallError(Outcome.UNREACHABLE, f"{target}: connection broke")
        while (source, target) in self._cut:
            await self._changed.wait()

    async def _answer(
        self, target: str, server: PeerServer, work: Callable[[PeerServer], Awaitable[T]]
    ) -> T:
        with anyio.CancelScope() as scope:
            self._open[target].add(scope)
            try:
                return await work(server)
            except MeshError as exc:
                outcome = read_outcome(exc.hop_result)
                if outcome is None:
                    raise
                raise PeerCallError(
                    outcome, exc.message, exc.hop_state, exc.retry_after_ms
                ) from exc
            finally:
                self._open[target].discard(scope)
        raise PeerCallError(Outcome.UNREACHABLE, f"{target}: connection broke")


class FakePeers:
    """``mm.mesh.ports.Peers`` of one instance; routes become hop headers, as on the wire."""

    def __init__(self, network: FakeNetwork, address: str) -> None:
        self._network = network
        self._address = address

    async def identify(self, address: str, timeout_s: float) -> PeerIdentity | None:
        """Answer who is there, None if nobody answers in time."""
        try:
            return await self._network.call(self._address, address, timeout_s, _identity)
        except PeerCallError:
            return None

    async def ensure_loaded(
        self, route: Route, *, sync: bool, last_used_ms: int, timeout_s: float
    ) -> ModelStatus:
        """Forward an ensure-loaded by a ``PeerRoute``."""
        call = _call_of(route, "")
        call.last_used_ms = last_used_ms
        return await self._ask(route, timeout_s, lambda s: s.ensure_loaded(call, sync=sync))

    async def model_status(self, route: Route, timeout_s: float) -> ModelStatus:
        """Forward a get-status by a ``PeerRoute``."""
        return await self._ask(route, timeout_s, lambda s: s.model_status(route.model_id))

    async def forward(
        self, route: Route, method: str, on_load: Callable[[int], None] | None = None
    ) -> InstanceId:
        """Proxy a call by a ``PeerRoute``; answers which instance served it.

        ``on_load`` hears how busy the copy there is, also when it did not serve.
        """
        call = _call_of(route, method)
        load: int | None = None

        async def serve(server: PeerServer) -> InstanceId:
            nonlocal load
            try:
                return await server.serve(call)
            finally:
                load = server.tell_load(call)

        try:
            return await self._send(route, None, serve)
        finally:
            if load is not None and on_load is not None:
                on_load(load)

    async def push_loads(
        self, address: str, me: InstanceId, loads: Mapping[ModelId, int], timeout_s: float
    ) -> None:
        """Tell a peer how busy our copies are."""

        async def take(server: PeerServer) -> None:
            server.take_loads(me, loads)

        await self._network.call(self._address, address, timeout_s, take, is_counted=False)

    async def tell_demand(
        self,
        address: str,
        me: InstanceId,
        demands: Mapping[ModelId, tuple[int, int]],
        timeout_s: float,
    ) -> None:
        """Tell a peer of the calls at our copies."""

        async def take(server: PeerServer) -> None:
            server.take_demand(me, demands)

        await self._network.call(self._address, address, timeout_s, take, is_counted=False)

    async def withdraw_copy(self, address: str, model_id: ModelId, timeout_s: float) -> bool:
        """Ask a peer to give up its copy."""
        return await self._network.call(
            self._address, address, timeout_s, lambda server: server.withdraw_copy(model_id)
        )

    async def _ask(
        self, route: Route, timeout_s: float, work: Callable[[PeerServer], Awaitable[T]]
    ) -> T:
        """Send what is answered by a message; an error arrives as what the wire tells of it."""
        try:
            return await self._send(route, timeout_s, work)
        except MeshError as exc:
            raise peer_error(exc) from exc

    async def _send(
        self, route: Route, timeout_s: float | None, work: Callable[[PeerServer], Awaitable[T]]
    ) -> T:
        assert isinstance(route, PeerRoute), route
        return await self._network.call(self._address, route.address, timeout_s, work)


async def _identity(server: PeerServer) -> PeerIdentity:
    return server.identity()


def _call_of(route: Route, method: str) -> Call:
    assert isinstance(route, PeerRoute), route
    request = read_hop_request(write_hop_request(route, is_kept=True))
    return request.to_call(route.model_id, method, None)
