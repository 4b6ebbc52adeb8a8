"""Table, accounting and phases stay in step, whatever happens to copies and in whatever order."""

from __future__ import annotations

import logging
import random
from contextlib import suppress
from dataclasses import replace

import anyio
import pytest

from mm.core.calls import LocalRoute, Outcome, Route
from mm.core.ids import NEVER_MS, ModelId
from mm.errors import MeshError, NoRoomError, StatusCode
from mm.mesh.local_copy import Phase
from mm.testing.cluster import Cluster, Instance, running_cluster, small_parameters
from mm.testing.fake_runtime import MIB
from tests.mesh.calls import FAST, M, call_for

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

MODELS = [f"m{number}" for number in range(12)]


class Chaos:
    """Does things to one instance at random, looking at all invariants after each."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.instance: Instance = cluster["a"]
        self.rng = random.Random(seed)
        self.pins: list[tuple[Route, object]] = []

    def check(self) -> None:
        copies = self.instance.node.parts.copies
        copies.check_invariants()
        copies.table.check_invariants()
        assert len(copies.space._queue) <= self.cluster.parameters.loading_concurrency_max

    async def call(self, model_id: str, patience_s: float) -> None:
        with anyio.move_on_after(patience_s):
            try:
                await self.instance.invoke(model_id)
            except MeshError:
                return

    async def hold(self, model_id: str) -> None:
        """A call that stays in flight for a while."""
        call, router = call_for(model_id), self.instance.node.router
        with anyio.move_on_after(20):
            try:
                route = await router.route(call)
            except MeshError:
                return
            try:
                await anyio.sleep(self.rng.choice([0, 1, 5]))
            finally:
                assert isinstance(route, LocalRoute)
                router.finished(call, route, self.rng.choice([Outcome.ANSWERED, Outcome.LOST]))

    def disturb(self, model_id: str) -> None:
        copies, runtime = self.instance.node.parts.copies, self.instance.runtime
        copy = copies.get(ModelId(model_id))
        match self.rng.randrange(6):
            case 0 if copy is not None:
                copies.remove(copy, self.rng.choice([None, NoRoomError("test")]))
            case 1 if model_id in runtime.loaded:
                runtime.lose(model_id)
            case 2:
                runtime.fail_loads(
                    model_id,
                    self.rng.choice([StatusCode.INTERNAL, StatusCode.INVALID_ARGUMENT]),
                    times=1,
                )
            case 3:
                runtime.fail_unloads(model_id, StatusCode.INTERNAL, times=self.rng.choice([1, 4]))
            case 4:
                size_bytes = self.rng.choice([MIB // 2, MIB, 2 * MIB, 5 * MIB])
                predicted_bytes = self.rng.choice([0, MIB, size_bytes])
                runtime.plan(
                    model_id,
                    size_bytes=size_bytes,
                    predicted_bytes=predicted_bytes,
                    is_size_told=self.rng.random() < 0.5,
                    model_size_s=self.rng.choice([0, 1]),
                    load_s=self.rng.choice([0, 0.5, 3, 70]),
                    unload_s=self.rng.choice([0, 0.5, 3]),
                )
            case 5 if copy is not None and copy.serves:
                lost = copies.lost(copy.model_id, copy.load_id, anyio.current_time())
                assert lost is (copy.phase is Phase.GONE)
        self.check()

    async def run(self, steps: int) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(steps):
                model_id = self.rng.choice(MODELS)
                action = self.rng.random()
                if action < 0.5:
                    group.start_soon(self.call, model_id, self.rng.choice([0, 0.1, 1, 1000]))
                elif action < 0.6:
                    group.start_soon(self.hold, model_id)
                elif action < 0.7:
                    self.preload(ModelId(model_id))
                else:
                    self.disturb(model_id)
                await anyio.sleep(self.rng.choice([0, 0, 0.01, 0.3, 2]))
                self.check()

    def preload(self, model_id: ModelId) -> None:
        record = self.instance.node.parts.registry.get(model_id)
        assert record is not None
        used_ms = self.instance.clock.now_ms() - 5000
        with suppress(NoRoomError):
            self.instance.node.parts.loader.ensure(
                model_id, record, last_used_ms=used_ms, awaited=False
            )
        self.check()


@pytest.mark.parametrize("seed", range(12))
async def test_everything_stays_in_step(seed: int) -> None:
    parameters = replace(small_parameters(12), load_timeout_ms=60_000)
    async with running_cluster(
        "a", plan=FAST, parameters=parameters, unload_retries_max=3, seed=seed
    ) as cluster:
        for name in MODELS:
            await cluster["a"].register(name)
        chaos = Chaos(cluster, seed)
        await chaos.run(steps=250)
        for name in MODELS:
            cluster["a"].runtime.fail_unloads(name, StatusCode.OK, times=0)
            cluster["a"].runtime.fail_loads(name, StatusCode.OK, times=0)
            cluster["a"].runtime.plan(name, load_s=0.1, unload_s=0.1, size_bytes=MIB)
        await cluster.settle()
        await anyio.sleep(8 * 60)
        for name in MODELS:
            assert await cluster["a"].invoke(name) == "a"
        await cluster.settle()
        cluster.check()
        accounting = cluster["a"].node.parts.accounting
        assert (accounting.lost_units, accounting.deficit_units) == (0, 0)
        assert accounting.unloading_units == 0
        assert len(cluster["a"].node.parts.copies.table) == len(cluster["a"].node.parts.copies)
        copies = cluster["a"].node.parts.copies
        assert not copies.admission._admitted
        assert len(copies.admission._line) == len(copies.space._queue) == 0


async def test_the_least_recently_used_copies_go_first() -> None:
    async with running_cluster("a", plan=FAST, parameters=small_parameters(12)) as cluster:
        a = cluster["a"]
        for number in range(12):
            await a.register(f"m{number}")
        for number in range(10):
            await a.invoke(f"m{number}")
            await anyio.sleep(1)
        oldest_ms = a.node.parts.copies.oldest_use_ms()
        await a.invoke("m0")
        assert a.node.parts.copies.oldest_use_ms() > oldest_ms
        await anyio.sleep(1)
        await a.invoke("m10")
        await a.invoke("m11")
        await cluster.settle()
        assert {"m1", "m2"} - a.runtime.loaded
        assert "m0" in a.runtime.loaded


async def test_an_empty_cache_has_no_oldest_copy() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        assert cluster["a"].node.parts.copies.oldest_use_ms() == NEVER_MS


async def test_what_is_older_than_all_that_is_loaded_is_too_old() -> None:
    async with running_cluster("a", plan=FAST, parameters=small_parameters(10)) as cluster:
        a = cluster["a"]
        await anyio.sleep(60)
        for number in range(9):
            await a.register(f"m{number}")
            await a.invoke(f"m{number}")
        await a.register("old")
        record = a.node.parts.registry.get(ModelId("old"))
        assert record is not None
        used_ms = a.clock.now_ms() - 50_000
        copy = a.node.parts.loader.ensure(
            ModelId("old"), replace(record, last_used_ms=1), last_used_ms=used_ms, awaited=False
        )
        await copy.settled.wait()
        assert copy.failure is not None
        assert copy.failure.message == "Entry too old for cache for model old"
        assert a.runtime.loads_begun.total() == 9
        assert a.runtime.loaded == {f"m{number}" for number in range(9)}
        await cluster.settle()
        cluster.check()


async def test_losses_are_believed_twice_a_minute() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await a.register("m")

        def lose() -> bool:
            copy = a.node.parts.copies.get(M)
            assert copy is not None
            return a.node.parts.copies.lost(M, copy.load_id, anyio.current_time())

        await a.invoke("m")
        assert a.node.parts.copies.lost(M, 0, 0), (
            "an earlier copy: what is here deserves its own try"
        )
        assert lose()
        await a.load("m")
        assert not lose(), "nothing was answered since"
        await a.invoke("m")
        assert lose()
        await a.invoke("m")
        assert not lose()
        await anyio.sleep(60)
        assert lose()
        await cluster.settle()
        cluster.check()


async def test_a_closed_cache_raises_its_reason_anew_each_time() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        await a.register("m")
        reason = NoRoomError("closed")
        reason.hop_result = "draining"
        a.node.parts.copies.close(reason)
        for _ in range(3):
            with pytest.raises(NoRoomError, match="closed") as caught:
                await a.invoke("m")
            assert caught.value is not reason
            assert caught.value.hop_result is None, "this is for a client"
        assert reason.__traceback__ is None


@pytest.mark.virtual_time
async def test_a_runtime_that_lost_everything_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        a = cluster["a"]
        for number in range(40):
            await a.register(f"m{number}")
            await a.invoke(f"m{number}")
        caplog.clear()
        a.runtime.stop()
        a.runtime.start()
        for number in range(40):
            assert await a.invoke(f"m{number}") == "a"
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert "the runtime lost model m0" in warnings[0].getMessage()
        await anyio.sleep(61)
        a.runtime.lose("m7")
        await a.invoke("m7")
        assert "the runtime lost model m7" in caplog.text
