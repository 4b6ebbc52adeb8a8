"""A model that more vmodels name than are told by name: its number is put right all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelRecord, VModelRecord
from mm.mesh.vmodel_references import TOLD_MAX
from mm.testing.cluster import INFO, running_cluster
from tests.mesh.calls import FAST
from tests.mesh.test_transitions import put

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

M = ModelId("m")
GONE_COUNT, NEW_COUNT, LEFT_COUNT = 30, 7, TOLD_MAX + 20


async def test_a_wrong_number_is_counted_anew_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mm.mesh.reference_counts.FIRST_LOOK_S", 1e9)
    named = VModelRecord(M, M).encode()
    count = LEFT_COUNT + GONE_COUNT
    async with running_cluster(plan=FAST) as cluster:
        record = ModelRecord(INFO, auto_delete=True, references=count)
        put(cluster, "registry", "m", record.encode())
        for number in range(count):
            put(cluster, "vmodels", f"v{number:03}", named)
        cluster.watch_delay_s = 30.0
        a = await cluster.start("a", is_known_by_all=False)
        assert a.node.parts.vmodels.references.count(M) == count
        # It hears of nothing of this, and the number is wrong besides.
        for number in range(LEFT_COUNT, count):
            put(cluster, "vmodels", f"v{number:03}", None)
        for number in range(NEW_COUNT):
            put(cluster, "vmodels", f"w{number}", named)
        put(cluster, "registry", "m", replace(record, references=1).encode())
        await a.node.vmodels.delete("v000")
        left = cluster.record("m")
        assert left is not None
        assert left.references == LEFT_COUNT + NEW_COUNT - 1
