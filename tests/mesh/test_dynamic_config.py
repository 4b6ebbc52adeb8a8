"""Settings in the store: they override the environment at once, and only good ones count."""

from __future__ import annotations

import logging

import anyio
import pytest

from mm.errors import StartupError
from mm.mesh.ports import Write
from mm.scaling_settings import ScalingSettings
from mm.testing.cluster import PREFIX, Cluster, running_cluster, until
from mm.testing.fake_runtime import ModelPlan
from tests.mesh.calls import FAST, loaded_at

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

RPM = "scaleup_rpm_threshold"


def put(cluster: Cluster, name: str, value: str | None) -> None:
    encoded = None if value is None else value.encode()
    cluster.server.transact([Write(f"{PREFIX}/config/{name}", encoded, if_revision=None)])


def thresholds(cluster: Cluster) -> set[int]:
    """What all that decides and tells goes by, at all instances."""
    scalers = [each.node.services.scaler for each in cluster.serving]
    return {each._rules.rpm_threshold for each in scalers} | {
        each.demands.rules.rpm_threshold for each in scalers
    }


async def test_a_threshold_overrides_the_environment_until_it_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = ScalingSettings(rpm_threshold=500)
    async with running_cluster("a", "b", plan=FAST, scaling=settings) as cluster:
        assert thresholds(cluster) == {500}
        for wrong in ("9", "many", "", "99999999999999999999999999"):
            put(cluster, RPM, "70")
            await until(lambda: thresholds(cluster) == {70}, 1)
            put(cluster, RPM, wrong)
            await until(lambda: thresholds(cluster) == {500}, 1, "a wrong one is none")
            assert f"scaleup_rpm_threshold is {wrong!r}; allowed" in caplog.text
        await cluster.start("c")
        assert thresholds(cluster) == {500}, "whoever starts now agrees with the others"
        put(cluster, RPM, "80")
        await until(lambda: thresholds(cluster) == {80}, 1)
        await cluster.start("d")
        assert thresholds(cluster) == {80}
        put(cluster, RPM, None)
        await until(lambda: thresholds(cluster) == {500}, 1)


async def test_copies_follow_a_threshold_that_changes() -> None:
    plan = ModelPlan(load_s=0.5)
    async with running_cluster("a", "b", "c", plan=plan) as cluster:
        await loaded_at(cluster, "a")

        async def call(seconds: int) -> None:
            for _ in range(2 * seconds):
                await cluster["a"].invoke("m")
                await anyio.sleep(0.5)

        await call(20)
        assert len(cluster.records()["m"].copies) == 1
        put(cluster, RPM, "60")
        await call(60)
        assert len(cluster.records()["m"].copies) > 1


async def test_each_call_is_logged_while_the_store_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mm.mesh.router")
    async with running_cluster("a", plan=FAST) as cluster:
        await loaded_at(cluster, "a")
        counts = []
        for value in (None, "true", "nonsense", "true", "false", "true", None):
            put(cluster, "log_each_invocation", value)
            await anyio.sleep(0.5)
            caplog.clear()
            await cluster["a"].invoke("m")
            counts.append(sum("invoking" in each.message for each in caplog.records))
        assert counts == [0, 1, 0, 1, 0, 1, 0]


async def test_an_instance_does_not_start_while_the_store_forbids_it() -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        put(cluster, "disable", "true")
        with pytest.raises(StartupError, match=f"delete the key {PREFIX}/config/disable"):
            await cluster.start("b")
        await loaded_at(cluster, "a")
        put(cluster, "disable", "false")
        await cluster.start("c")


async def test_keys_that_mean_nothing_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async with running_cluster("a", plan=FAST) as cluster:
        for number in range(300):
            put(cluster, "send_destination_id", str(number))
            put(cluster, f"other-{number % 150}", "1")
        await anyio.sleep(1)
        told = [each.message for each in caplog.records if "means nothing" in each.message]
        assert len(told) == 99, "and no more are remembered"
        assert not any("send_destination_id" in each for each in told)
        assert thresholds(cluster) == {2000}


async def test_settings_come_back_with_a_store_that_lost_everything() -> None:
    async with running_cluster("a", "b", plan=FAST) as cluster:
        put(cluster, RPM, "70")
        await until(lambda: thresholds(cluster) == {70}, 1)
        cluster.server.wipe()
        key = f"{PREFIX}/config/{RPM}"
        await until(lambda: cluster.server.get(key) is not None, 60, "it is written back")
        assert thresholds(cluster) == {70}
