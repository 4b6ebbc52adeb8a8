"""Models that a runtime loses again and again: what is mended, and what a client hears."""

from __future__ import annotations

import anyio
import pytest

from mm.errors import StatusCode
from mm.testing.cluster import RuntimeAnswerError, running_cluster
from mm.testing.losses import LossesHeard
from tests.mesh.calls import FAST, M, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_two_losses_in_a_minute_are_mended_and_the_third_is_told() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        for _ in range(2):
            cluster["a"].runtime.lose("m")
            await anyio.sleep(20.0)
            assert await cluster["b"].invoke("m") == "a"
        cluster["a"].runtime.lose("m")
        with pytest.raises(RuntimeAnswerError) as caught:
            await cluster["b"].invoke("m")
        assert caught.value.code is StatusCode.NOT_FOUND
        assert caught.value.is_own_word, "this is what the simulator excuses"
        await anyio.sleep(60.0)
        assert await cluster["b"].invoke("m") in ("a", "b"), "after a minute it counts anew"


async def test_a_second_loss_is_told_if_the_copy_has_not_answered_since() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].runtime.lose("m")
        with anyio.move_on_after(0.001):
            await cluster["a"].invoke("m")
        await cluster.settle()
        assert cluster["a"].node.parts.copies.get(M) is not None, (
            "the load went on without the client"
        )
        cluster["a"].runtime.lose("m")
        with pytest.raises(RuntimeAnswerError) as caught:
            await cluster["a"].invoke("m")
        assert caught.value.is_own_word


async def test_a_first_loss_that_is_told_is_not_excused() -> None:
    async with running_cluster("a", "b", plan=FAST, losses_believed_max=0) as cluster:
        await loaded_at(cluster, "a")
        cluster["a"].runtime.lose("m")
        for caller in ("a", "b"):
            with pytest.raises(RuntimeAnswerError) as caught:
                await cluster[caller].invoke("m")
            assert not caught.value.is_own_word, "the same loss, however often it is heard of"


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ("l1", False),
        ("l1 l1 l1", False),
        ("l1 l2", True),
        ("l1 a1 l2", True),
        ("l1 a2 l2", False),
        ("l1 a2 l2 a3 l3", True),
        ("l1 a2 l2 a3 l3 l3", True),
        ("l1 60 l2", False),
        ("l1 59 l2", True),
        ("l1 30 a2 l2 30 a3 l3", False),
        ("l1 30 a2 l2 30 l3", True),
    ],
)
async def test_what_is_excused(events: str, expected: bool) -> None:
    losses, now_s, excused = LossesHeard(), 100.0, False
    for event in events.split():
        if event.startswith("l"):
            excused = losses.lost(M, int(event[1:]), now_s)
        elif event.startswith("a"):
            losses.answered(M, int(event[1:]))
        else:
            now_s += float(event)
    assert excused is expected
