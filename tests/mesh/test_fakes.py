"""The fakes that the mesh is tested with do what their docstrings promise, on both event loops.

What depends on durations runs in virtual time on trio; on asyncio they are milliseconds.
"""

from __future__ import annotations

import anyio
import pytest

from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.errors import RuntimeUnavailableError, StartupError, StatusCode
from mm.mesh.ports import Clock, Loaded, Runtime, RuntimeCallError
from mm.testing.fake_clock import START_MS, FakeClock
from mm.testing.fake_runtime import DEFAULT_PARAMETERS, MIB, FakeRuntime, Held, ModelPlan

pytestmark = pytest.mark.anyio

M, N, O = (ModelId(name) for name in "mno")  # noqa: E741
INFO = ModelInfo("type")
FAST = ModelPlan(load_s=0.001, unload_s=0.001)


def fast_runtime() -> FakeRuntime:
    return FakeRuntime(default_plan=FAST)


async def refused(runtime: FakeRuntime, model_id: ModelId) -> int:
    """Load and answer the status code of the refusal."""
    with pytest.raises(RuntimeCallError) as caught:
        await runtime.load(model_id, INFO)
    return caught.value.code


# --- clock --------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_clocks_jump_together_and_one_may_be_wrong() -> None:
    clock: Clock = FakeClock()
    assert clock.now_ms() == START_MS
    with anyio.move_on_after(3600):
        await anyio.Event().wait()
    assert clock.now_ms() == START_MS + 3_600_000
    assert FakeClock(skew_ms=-500).now_ms() == clock.now_ms() - 500


# --- runtime ------------------------------------------------------------------------------------


async def test_a_model_loads_serves_and_unloads() -> None:
    fake = fast_runtime()
    runtime: Runtime = fake
    fake.plan("m", size_bytes=3 * MIB, predicted_bytes=2 * MIB, concurrency_max=4)
    assert await runtime.wait_ready() is DEFAULT_PARAMETERS
    assert await runtime.predict_size(M, INFO) == 2 * MIB
    assert await runtime.load(M, INFO) == Loaded(3 * MIB, 4)
    assert fake.loaded == {M}
    assert await runtime.model_size(M) == 3 * MIB
    await fake.predict(M)
    assert fake.memory_bytes == 3 * MIB
    await runtime.unload(M)
    assert fake.held("m") is None
    assert (fake.memory_bytes, fake.memory_bytes_max) == (0, 3 * MIB)
    assert (fake.loads_done[M], fake.predictions[M], fake.unloads_done[M]) == (1, 1, 1)
    assert fake.violations == []


@pytest.mark.virtual_time
async def test_everything_takes_the_planned_time() -> None:
    runtime = FakeRuntime(start_s=5)
    runtime.plan("m", load_s=100, unload_s=20, predict_size_s=0.5, model_size_s=30)
    began_s = anyio.current_time()
    passed_s = []
    for step in (
        runtime.wait_ready(),
        runtime.predict_size(M, INFO),
        runtime.load(M, INFO),
        runtime.model_size(M),
        runtime.predict(M, 7),
        runtime.unload(M),
    ):
        await step
        passed_s.append(anyio.current_time() - began_s)
    assert passed_s == pytest.approx([5, 5.5, 105.5, 135.5, 142.5, 162.5])


async def test_size_may_have_to_be_asked_for() -> None:
    runtime = fast_runtime()
    runtime.plan("m", is_size_told=False, size_bytes=5)
    assert await runtime.load(M, INFO) == Loaded(0, 0)
    assert await runtime.model_size(M) == 5
    with pytest.raises(RuntimeCallError):
        await runtime.model_size(N)


@pytest.mark.parametrize(
    "code",
    [
        # Two that promise by the contract that no memory was taken: no adapter keeps to it.
        StatusCode.INVALID_ARGUMENT,
        StatusCode.FAILED_PRECONDITION,
        StatusCode.UNKNOWN,
        StatusCode.NOT_FOUND,
    ],
)
async def test_a_failed_load_keeps_memory_until_it_is_unloaded(code: StatusCode) -> None:
    runtime = fast_runtime()
    runtime.fail_loads("m", code, "bad file", times=1)
    assert await refused(runtime, M) == code
    assert runtime.held("m") is Held.REMAINS
    assert runtime.memory_bytes == MIB
    await runtime.unload(M)
    assert runtime.memory_bytes == 0
    await runtime.load(M, INFO)
    assert runtime.loads_begun[M] == 2
    assert runtime.loads_done[M] == 1


async def test_failures_last_until_told_otherwise() -> None:
    runtime = fast_runtime()
    runtime.fail_loads("m", StatusCode.INVALID_ARGUMENT, "bad")
    for _ in range(3):
        assert await refused(runtime, M) == StatusCode.INVALID_ARGUMENT
        await runtime.unload(M)
    runtime.fail_loads("m", 0, times=0)
    await runtime.load(M, INFO)


@pytest.mark.virtual_time
async def test_a_cancelled_load_keeps_its_memory_until_unloaded() -> None:
    runtime = FakeRuntime()
    runtime.plan("m", load_s=100)
    with anyio.move_on_after(10):
        await runtime.load(M, INFO)
    assert runtime.held("m") is Held.REMAINS
    assert await refused(runtime, M) == StatusCode.ALREADY_EXISTS
    assert runtime.violations == ["load of m while remains"]
    await runtime.unload(M)
    assert runtime.memory_bytes == 0


@pytest.mark.virtual_time
async def test_an_unload_stops_a_running_load() -> None:
    runtime = FakeRuntime()
    runtime.plan("m", load_s=1000)
    codes = []

    async def load() -> None:
        codes.append(await refused(runtime, M))

    async with anyio.create_task_group() as group:
        group.start_soon(load)
        await runtime.wait_for(lambda: runtime.held("m") is Held.LOADING)
        await runtime.unload(M)
    assert codes == [StatusCode.ABORTED]
    assert runtime.memory_bytes == 0
    assert anyio.current_time() < 1


@pytest.mark.virtual_time
async def test_unloading_keeps_the_memory_until_it_is_done_and_may_fail() -> None:
    runtime = FakeRuntime()
    await runtime.load(M, INFO)
    runtime.fail_unloads("m", StatusCode.INTERNAL, "stuck", times=1)
    with pytest.raises(RuntimeCallError, match="stuck"):
        await runtime.unload(M)
    assert runtime.held("m") is Held.LOADED
    async with anyio.create_task_group() as group:
        group.start_soon(runtime.unload, M)
        await runtime.wait_for(lambda: runtime.held("m") is Held.UNLOADING)
        assert runtime.memory_bytes == MIB
        with pytest.raises(RuntimeCallError) as caught:
            await runtime.predict(M)
        assert caught.value.code == StatusCode.NOT_FOUND
    assert runtime.memory_bytes == 0


async def test_too_many_loads_at_once_and_too_much_memory_are_noticed() -> None:
    runtime = fast_runtime()
    runtime.plan("m", size_bytes=60 * MIB)
    runtime.plan("n", size_bytes=14 * MIB)
    async with anyio.create_task_group() as group:
        for model_id in (M, N, O):
            group.start_soon(runtime.load, model_id, INFO)
    assert runtime.loads_at_once_max == 3
    assert runtime.violations == ["3 loads at once"]
    assert runtime.overcommitted_bytes_max == 11 * MIB
    assert runtime.memory_bytes_max == 75 * MIB


async def test_a_lost_model_is_not_found() -> None:
    runtime = fast_runtime()
    await runtime.load(M, INFO)
    runtime.lose("m")
    with pytest.raises(RuntimeCallError) as caught:
        await runtime.predict(M)
    assert caught.value.code == StatusCode.NOT_FOUND


async def test_a_crash_breaks_what_runs_and_forgets_everything() -> None:
    runtime = FakeRuntime()
    runtime.plan("m", load_s=0.001)
    runtime.plan("n", load_s=1000)
    await runtime.load(M, INFO)
    broken = []

    async def breaks(model_id: ModelId, *, is_load: bool) -> None:
        with pytest.raises(RuntimeUnavailableError):
            await (runtime.load(model_id, INFO) if is_load else runtime.predict(model_id, 1000))
        broken.append(model_id)

    async with anyio.create_task_group() as group:
        group.start_soon(lambda: breaks(N, is_load=True))
        group.start_soon(lambda: breaks(M, is_load=False))
        await runtime.wait_for(lambda: runtime.loads_begun[N] == 1)
        runtime.stop()
    assert sorted(broken) == [M, N]
    with pytest.raises(RuntimeUnavailableError):
        await runtime.predict_size(M, INFO)
    runtime.start()
    await runtime.wait_ready()
    assert runtime.memory_bytes == 0


@pytest.mark.virtual_time
async def test_readiness_is_a_reset_and_has_a_time_limit() -> None:
    runtime = FakeRuntime()
    await runtime.load(M, INFO)
    await runtime.wait_ready()
    assert runtime.loaded == set()
    runtime.stop()
    with pytest.raises(StartupError, match="not ready after 180 s"):
        await runtime.wait_ready()


@pytest.mark.virtual_time
async def test_waiting_for_what_never_comes_ends() -> None:
    with pytest.raises(TimeoutError):
        await FakeRuntime().wait_for(lambda: False)
