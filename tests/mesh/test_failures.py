"""Recorded failures of loads: they stay, whatever the events of their own writes look like."""

from __future__ import annotations

import pytest

from mm.errors import LoadFailedError, StatusCode
from mm.testing.cluster import running_cluster
from tests.mesh.calls import FAST, A

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
