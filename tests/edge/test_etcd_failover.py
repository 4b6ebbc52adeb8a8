"""Members of an etcd cluster come and go: the store moves on within its time limit."""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import anyio
import grpc
import grpc.aio
import pytest
from anyio.abc import TaskStatus

from mm.edge.etcd_process import EtcdProcess
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import Endpoint, EtcdTarget
from mm.errors import StoreUnavailableError
from mm.mesh.ports import Item, Put, Resync, Write
from mm.testing.losing_proxy import LosingProxy, losing_proxy

pytestmark = [pytest.mark.anyio, pytest.mark.etcd]

TIMEOUT_S = 2.0


def _closed_port(stack: ExitStack) -> Endpoint:
    """A port on which nothing listens, and nothing will while the stack is open."""
    holder = stack.enter_context(socket.socket())
    holder.bind(("127.0.0.1", 0))
    return Endpoint("127.0.0.1", holder.getsockname()[1])


def _store(*endpoints: Endpoint, silence_s: float = 10.0) -> EtcdStore:
    target = EtcdTarget(endpoints, root_prefix=uuid.uuid4().hex)
    return EtcdStore(target, timeout_s=TIMEOUT_S, silence_s=silence_s)


@asynccontextmanager
async def _two_ways(etcd: EtcdProcess) -> AsyncIterator[tuple[LosingProxy, LosingProxy]]:
    endpoint = etcd.endpoint
    async with (
        losing_proxy(endpoint.host, endpoint.port) as one,
        losing_proxy(endpoint.host, endpoint.port) as two,
    ):
        yield one, two


def _endpoint(proxy: LosingProxy) -> Endpoint:
    return Endpoint(proxy.host, proxy.port)


def _in_use(one: LosingProxy, two: LosingProxy) -> tuple[LosingProxy, LosingProxy]:
    """Answer the way that the store took, and the other one."""
    assert one.accepted_count + two.accepted_count == 1
    return (one, two) if one.accepted_count else (two, one)


async def _create(store: EtcdStore, key: str, value: bytes = b"1") -> Item:
    result = await store.write(Write(key, value, 0))
    assert result.succeeded
    assert result.item is not None
    return result.item


async def test_a_dead_member_is_passed_over(shared_etcd: EtcdProcess) -> None:
    with ExitStack() as stack:
        dead = [_closed_port(stack) for _ in range(2)]
        for _ in range(6):  # the member to begin with is picked at random
            async with _store(dead[0], shared_etcd.endpoint, dead[1]) as store:
                await _create(store, "/a")


async def test_a_silent_member_is_passed_over_in_time(shared_etcd: EtcdProcess) -> None:
    async with _two_ways(shared_etcd) as (one, two):
        for proxy in (one, two):
            proxy.lose()
            async with _store(_endpoint(one), _endpoint(two)) as store:
                with anyio.fail_after(TIMEOUT_S):
                    await _create(store, "/a")
            await proxy.restore()


async def test_all_dead_is_told_soon_and_names_all(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack, caplog.at_level(logging.DEBUG):
        one, two = _closed_port(stack), _closed_port(stack)
        async with _store(one, two) as store:
            with anyio.fail_after(TIMEOUT_S), pytest.raises(StoreUnavailableError) as caught:
                await store.check()
            assert not store.connected
    text = str(caught.value)
    assert text.startswith(f"etcd at {one}, {two}: ")
    assert text.count("connection refused") == 2


async def test_a_silent_store_at_start_is_told_within_the_limit(shared_etcd: EtcdProcess) -> None:
    async with losing_proxy(shared_etcd.endpoint.host, shared_etcd.endpoint.port) as proxy:
        proxy.lose()
        async with _store(_endpoint(proxy)) as store:
            start_s = anyio.current_time()
            with pytest.raises(
                StoreUnavailableError, match=f"etcd at {_endpoint(proxy)}: no answer"
            ):
                await store.check()
            assert anyio.current_time() - start_s < 2 * TIMEOUT_S + 1


async def test_a_name_that_does_not_resolve_is_told() -> None:
    async with _store(Endpoint("no-such-host.invalid", 1)) as store:
        with pytest.raises(StoreUnavailableError, match=r"no-such-host\.invalid: "):
            await store.check()


async def test_names_are_resolved_to_all_their_addresses(shared_etcd: EtcdProcess) -> None:
    # etcd listens on 127.0.0.1 only; localhost may be ::1 as well, which then refuses.
    async with _store(Endpoint("localhost", shared_etcd.endpoint.port)) as store:
        await store.check()


async def test_something_that_is_not_etcd_is_told() -> None:
    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with anyio.create_task_group() as tg, _store(Endpoint("127.0.0.1", port)) as store:
            tg.start_soon(listener.serve, answer)
            with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{port}"):
                await store.check()
            tg.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["cut", "lose"])
async def test_everything_moves_when_the_member_in_use_goes(
    shared_etcd: EtcdProcess, how: str
) -> None:
    async with _two_ways(shared_etcd) as (one, two):
        store = _store(_endpoint(one), _endpoint(two), silence_s=1.2)
        async with store, store.session(60) as session, store.watch("/t/") as batches:
            assert isinstance((await anext(batches))[0], Resync)
            # A table with nothing in it would be read again, not followed from where it was.
            first = await _create(store, "/t/first")
            assert await anext(batches) == [Put(first)]
            lease_id = session.lease_id
            used, spare = _in_use(one, two)
            await (used.cut() if how == "cut" else _lose(used))

            with anyio.fail_after(TIMEOUT_S):
                item = await _create(store, "/t/a")
            with anyio.fail_after(60):
                assert await anext(batches) == [Put(item)]
            assert spare.accepted_count == 1
            assert session.lease_id == lease_id
            await store.write(Write("/t/i", b"", None, lease_id))
            assert store.connected


async def _lose(proxy: LosingProxy) -> None:
    proxy.lose()


async def test_a_write_whose_answer_was_lost_is_known_by_its_content(
    shared_etcd: EtcdProcess,
) -> None:
    async with _two_ways(shared_etcd) as (one, two):
        async with _store(_endpoint(one), _endpoint(two)) as store:
            await store.check()
            used, _ = _in_use(one, two)
            used.lose_replies()

            created = await store.write(Write("/a", b"mine", 0))

            assert created.succeeded
            assert created.item == await store.get("/a")
            assert created.item is not None
            assert created.item.mod_revision == created.item.create_revision


async def test_the_same_for_a_transaction(shared_etcd: EtcdProcess) -> None:
    async with _two_ways(shared_etcd) as (one, two):
        async with _store(_endpoint(one), _endpoint(two)) as store:
            old = await _create(store, "/old")
            used, _ = _in_use(one, two)
            used.lose_replies()

            succeeded, items = await store.transact(
                [Write("/new", b"mine", 0), Write("/old", None, old.mod_revision)]
            )

            assert succeeded
            assert items == [await store.get("/new"), None]


async def test_a_write_whose_fate_nobody_can_tell_is_an_error(shared_etcd: EtcdProcess) -> None:
    endpoint = shared_etcd.endpoint
    root_prefix = uuid.uuid4().hex
    async with _two_ways(shared_etcd) as (one, two):
        target = EtcdTarget((_endpoint(one), _endpoint(two)), root_prefix=root_prefix)
        async with (
            EtcdStore(target, timeout_s=TIMEOUT_S) as store,
            EtcdStore(EtcdTarget((endpoint,), root_prefix=root_prefix)) as other,
            anyio.create_task_group() as tg,
        ):
            await store.check()
            used, _ = _in_use(one, two)
            used.lose_replies()

            async def overwrite(*, task_status: TaskStatus[None]) -> None:
                async with other.watch("/a") as batches:
                    await anext(batches)
                    task_status.started()
                    await anext(batches)
                    await other.write(Write("/a", b"theirs", None))

            await tg.start(overwrite)
            with pytest.raises(StoreUnavailableError, match="not known"):
                await store.write(Write("/a", b"mine", 0))


class _Member:
    """A member that refuses as told, then serves reads of an empty store."""

    def __init__(self, *refusals: tuple[grpc.StatusCode, str]) -> None:
        self.refusals = list(refusals)
        self.asked_count = 0

    async def range(self, _: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.asked_count += 1
        if self.refusals:
            await context.abort(*self.refusals.pop(0))
        return b""

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Endpoint]:
        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(self.range)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("etcdserverpb.KV", {"Range": handler})]
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield Endpoint("127.0.0.1", port)
        finally:
            await server.stop(None)


_NO_LEADER = (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")


@pytest.mark.parametrize("members", [1, 2])
async def test_an_election_is_waited_for(members: int) -> None:
    member = _Member(*[_NO_LEADER] * 5)
    async with member.served() as endpoint:
        async with _store(*[endpoint] * members) as store:
            assert await store.get("/a") is None
        assert member.asked_count > 5


async def test_an_election_without_end_is_waited_for_once() -> None:
    member = _Member(*[_NO_LEADER] * 10_000)
    async with member.served() as endpoint, _store(endpoint) as store:
        start_s = anyio.current_time()
        with pytest.raises(StoreUnavailableError, match="no leader"):
            await store.get("/a")
        assert 0.5 * TIMEOUT_S < anyio.current_time() - start_s < 2 * TIMEOUT_S + 1

        asked_count = member.asked_count
        with pytest.raises(StoreUnavailableError, match="no leader"):
            await store.get("/a")
        assert member.asked_count <= asked_count + 2, "the store is down: calls fail at once"


async def test_an_error_that_stays_is_not_asked_for_again_and_again() -> None:
    broken = (grpc.StatusCode.INTERNAL, "it is broken")
    member = _Member()
    async with member.served() as endpoint, _store(endpoint) as store:
        await store.check()
        member.refusals = [broken] * 10_000
        with pytest.raises(StoreUnavailableError, match="it is broken"):
            await store.get("/a")
        assert member.asked_count < 10
