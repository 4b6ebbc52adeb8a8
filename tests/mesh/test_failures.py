"""What loads leave behind: failures for their time, and uses in the order as they were given."""

from __future__ import annotations

import anyio
import pytest

from mm.errors import LoadFailedError, StatusCode
from mm.mesh.models import EnsureRequest
from mm.mesh.ports import Item
from mm.testing.cluster import running_cluster
from tests.mesh.calls import FAST, A, M

pytestmark = pytest.mark.anyio


@pytest.mark.virtual_time
async def test_a_failure_is_not_taken_for_somebody_elses_removal() -> None:
    """The watch tells of the failure before the write's own reply comes."""
    async with running_cluster(plan=FAST) as cluster:
        cluster.store_delay_s = 0.2
        await cluster.start("a")
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", StatusCode.INTERNAL, "boom")
        with pytest.raises(LoadFailedError):
            await cluster["a"].invoke("m")
        await cluster.settle()
        record = cluster.record("m")
        assert record is not None
        assert (record.copies, record.failure_text(A)) == ({}, "INTERNAL: boom")
        cluster.check()


@pytest.mark.virtual_time
async def test_the_last_change_of_a_load_that_fails_tells_so() -> None:
    """Who watches looks at each change of the record; there is none when the copy goes."""
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", StatusCode.INTERNAL, "boom")
        parts = cluster["a"].node.parts
        told: list[str] = []

        def look(_key_id: str, _item: Item | None) -> None:
            record = parts.registry.peek(M)
            assert record is not None
            told.append(parts.models.statuses.known(M, record).status)

        parts.registry.mirror.listen(look)
        with pytest.raises(LoadFailedError):
            await cluster["a"].invoke("m")
        await cluster.settle()
        assert (told[0], told[-1]) == ("LOADING", "LOADING_FAILED")


@pytest.mark.virtual_time
async def test_a_failure_is_forgotten_when_it_is_over() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        cluster["a"].runtime.fail_loads("m", StatusCode.INTERNAL, "boom")
        with pytest.raises(LoadFailedError):
            await cluster["a"].invoke("m")
        models = cluster["a"].node.models
        assert (await models.status(M)).status == "LOADING_FAILED"
        expiry_s = cluster["a"].node._config.load_failure_expiry_ms / 1000
        await anyio.sleep(expiry_s + 1)
        assert (await models.status(M)).status == "NOT_LOADED"
        await anyio.sleep(expiry_s)
        record = cluster.record("m")
        assert record is not None
        assert not record.failures
        cluster.check()


async def test_a_use_in_the_future_counts_as_now() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await cluster["a"].register("m")
        models = cluster["a"].node.models
        for last_used_ms in (2**62, 2**63, 2**64 - 1):
            request = EnsureRequest(M, sync=True, last_used_ms=last_used_ms)
            assert (await models.ensure_loaded(request)).status == "LOADED"
            record = cluster.record("m")
            assert record is not None
            assert record.last_used_ms <= cluster["a"].clock.now_ms()
            await models.unregister(M)
            await cluster.settle()
            await cluster["a"].register("m")
        cluster.check()


@pytest.mark.virtual_time
async def test_a_load_that_nobody_waits_for_is_no_use() -> None:
    """It takes its place in the order by the time given (spec core 3.2)."""
    async with running_cluster("a", plan=FAST) as cluster:
        await anyio.sleep(3660)
        for name in ("m", "n"):
            await cluster["a"].register(name)
        assert await cluster["a"].invoke("n") == "a"
        hour_ago_ms = cluster["a"].clock.now_ms() - 3_600_000
        request = EnsureRequest(M, sync=True, last_used_ms=hour_ago_ms)
        assert (await cluster["a"].node.models.ensure_loaded(request)).status == "LOADED"
        assert [entry[0] for entry in cluster["a"].node.parts.copies.table.cached()] == ["m", "n"]
        assert cluster["a"].node.parts.copies.table.last_used("m") == hour_ago_ms
        cluster.check()
