"""Conformance with the Java mesh: what a full cache lets go, and how fast (around 22.3).

EvictionsModelMeshTest and ModelMeshEvictionsTest; the second copy (testSecondCopyTrigger)
waits for copies by load. Java asserts windows of time; here only their upper ends count, and on a
machine with other work a scenario gets several chances to be as fast as they demand, and more time
where all is slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest

from mm.pb import mmesh
from tests.system.meshes import Instance, Mesh, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
MIB = 2**20
#: 1024 MiB, of which 75 are kept for unloads: 949 MiB, 18 models of 50 MiB and 49 MiB to spare.
ROOM = 18
UNLOAD_S = 1.0
SLOW = f"SIZE_{50 * MIB}_20_{UNLOAD_S * 1000:.0f}"
TRIES_MAX = 5
#: What Java allows of a load is meant for a machine that has nothing else to do. Where the loads
#: before it took longer, it may take so many times what the slowest of them did.
SLOWEST_FACTOR = 4
QUICK = f"SIZE_{50 * MIB}_20_80"

#: Three instances, each with room for ten models of 20 MiB and a reserve of a tenth.
PODS = ("pod-a", "pod-b", "pod-c")
POD_ROOM = 10
POD_MODEL = f"SIZE_{20 * MIB}_5_80"
POD_ARGS = ["--capacity", str(28_445 * 8192), "--default-size", str(20 * MIB)]


@pytest.fixture(scope="module")
def meshes(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[tuple[Mesh, Mesh]]:
    """One instance alone, and three; started at the same time."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        # Java's tests are of the order of last use.
        settings = {"MM_DATAPLANE": dataplane, "MM_EVICTION": "lru"}
        alone, cluster = (
            stack.enter_context(mesh_of(kv_store, settings, new_service_name())) for _ in range(2)
        )
        starts = (
            pool.submit(alone.add_all, "alone"),
            pool.submit(cluster.add_all, *PODS, runtime_args=POD_ARGS),
        )
        for start in starts:
            start.result()
        yield alone, cluster


class Models:
    """The models of one test, registered in order, and what became of them."""

    def __init__(self, mesh: Mesh, prefix: str, path: str) -> None:
        self.mesh = mesh
        self.instance: Instance = mesh[0]
        self.prefix = prefix
        self.path = path
        self.ids: list[str] = []

    def add(self, path: str | None = None, last_used_ms: int = 0) -> mmesh.ModelStatusInfo:
        """Register one more, and wait for its load."""
        return self.instance.register(
            self.name_next(),
            path or self.path,
            load_now=True,
            sync=True,
            last_used_ms=last_used_ms,
        )

    def add_many(self, count: int) -> float:
        """Register so many, one after the other: each used later than the one before.

        Answers how long the slowest took.
        """
        slowest_s = 0.0
        for _ in range(count):
            started_s = time.monotonic()
            assert self.add().status == Status.LOADED
            slowest_s = max(slowest_s, time.monotonic() - started_s)
        return slowest_s

    def name_next(self) -> str:
        self.ids.append(f"{self.prefix}-{len(self.ids)}")
        return self.ids[-1]

    def status(self, number: int) -> Status:
        return Status(self.instance.status(self.ids[number]).status)

    def loaded(self) -> list[int]:
        """Answer the numbers of those that are loaded somewhere."""
        return [n for n in range(len(self.ids)) if self.status(n) == Status.LOADED]

    def clear(self) -> None:
        """Unregister all, and wait until their memory is free again."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.instance.unregister, self.ids))
        self.ids.clear()
        for instance in self.mesh.instances:
            eventually(partial(is_empty, instance), what="unloads")


def is_empty(instance: Instance) -> bool:
    told = instance.statistics()
    return told.models_loaded == told.models_loading == told.unloading_units == 0


@pytest.fixture
def slow(meshes: tuple[Mesh, Mesh], request: pytest.FixtureRequest) -> Iterator[Models]:
    """Models whose unload takes a second, on the instance that is alone."""
    models = Models(meshes[0], request.node.name, SLOW)
    yield models
    models.clear()


@pytest.fixture
def quick(meshes: tuple[Mesh, Mesh], request: pytest.FixtureRequest) -> Iterator[Models]:
    """Models that come and go quickly, on the instance that is alone."""
    models = Models(meshes[0], request.node.name, QUICK)
    yield models
    models.clear()


@pytest.fixture
def spread(meshes: tuple[Mesh, Mesh], request: pytest.FixtureRequest) -> Iterator[Models]:
    """Models on three instances, all registered at the first."""
    models = Models(meshes[1], request.node.name, POD_MODEL)
    yield models
    models.clear()


#: What a scenario took, and what it may take.
Timed = tuple[float, float]


def in_time(models: Models, scenario: Callable[[], Sequence[Timed]]) -> None:
    """Run a scenario until each of its times was within its bound once; fails after some tries.

    What it asserts itself has to hold each time.
    """
    tries: list[Sequence[Timed]] = []
    for _ in range(TRIES_MAX):
        tries.append(scenario())
        each = zip(*tries, strict=True)
        if all(any(took_s <= bound_s for took_s, bound_s in one) for one in each):
            return
        models.clear()
    raise AssertionError(f"(took, bound) in s: {tries}")


# --- EvictionsModelMeshTest ---------------------------------------------------------------------


def test_basic_eviction(slow: Models) -> None:
    """Java demands 50 ms of a load into the reserve, and of the one that has to wait for an unload
    that it ends at most 400 ms after it.
    """
    in_time(slow, partial(basic_eviction, slow))


def basic_eviction(models: Models) -> Sequence[Timed]:
    slack_s = SLOWEST_FACTOR * models.add_many(ROOM)
    assert models.loaded() == list(range(ROOM))

    # The 19th: one is evicted, and what is kept for unloads lends the memory meanwhile.
    started_s = time.monotonic()
    assert models.add().status == Status.LOADED
    lent_s = time.monotonic() - started_s
    assert models.loaded() == list(range(1, 19))

    # The 20th still fits, the 21st has to wait until the first of them is really gone.
    assert models.add().status == Status.LOADED
    assert models.add().status == Status.LOADED
    waited_s = time.monotonic() - started_s
    assert waited_s >= UNLOAD_S
    assert models.loaded() == list(range(3, 21))

    # An eviction is no end: the model comes back, and the next oldest goes.
    assert models.instance.ensure_loaded(models.ids[0]).status == Status.LOADING
    eventually(lambda: models.status(0) == Status.LOADED)
    assert models.loaded() == [0, *range(4, 21)]

    # Once loaded and measured, a model larger than was thought takes the place of three.
    assert models.add(f"SIZE_{160 * MIB}_20_1000").status == Status.LOADED
    started_s = time.monotonic()
    eventually(lambda: models.status(6) == Status.NOT_LOADED)
    measured_s = time.monotonic() - started_s
    assert models.loaded() == [0, *range(7, 22)]
    return (
        (lent_s, max(0.050, slack_s)),
        (waited_s, UNLOAD_S + max(0.4, slack_s)),
        (measured_s, max(0.150, slack_s)),
    )


def test_concurrent_eviction(slow: Models) -> None:
    """Ten come at once: ten go, the oldest ones, and no more."""
    slow.add_many(ROOM)
    ten = [slow.name_next() for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        register = partial(slow.instance.register, path=SLOW, load_now=True, sync=True)
        for status in pool.map(register, ten):
            assert status.status == Status.LOADED
    assert slow.loaded() == list(range(10, 28))


def test_concurrent_eviction_and_unload(slow: Models) -> None:
    """The same, with five of those that have to go unregistered in the same moment."""
    slow.add_many(ROOM)
    leaving = slow.ids[:10:2]
    ten = [slow.name_next() for _ in range(10)]
    with ThreadPoolExecutor(15) as pool:
        register = partial(slow.instance.register, path=SLOW, load_now=True, sync=True)
        loads = [pool.submit(register, model_id) for model_id in ten]
        ends = [pool.submit(slow.instance.unregister, model_id) for model_id in leaving]
        for end in ends:
            end.result()
        for load in loads:
            assert load.result().status == Status.LOADED
    assert slow.loaded() == list(range(10, 28))
    for number in range(10):
        gone = Status.NOT_LOADED if number % 2 else Status.NOT_FOUND
        assert slow.status(number) == gone


# --- ModelMeshEvictionsTest: one instance --------------------------------------------------------


def test_multi_load_standalone(quick: Models) -> None:
    quick.add_many(5)
    assert quick.loaded() == list(range(5))
    for model_id in quick.ids:
        quick.instance.unregister(model_id)
    assert {quick.status(number) for number in range(5)} == {Status.NOT_FOUND}


def test_multi_load_with_eviction_standalone(quick: Models) -> None:
    quick.add_many(ROOM + 3)
    assert quick.loaded() == list(range(3, ROOM + 3))


def test_multi_load_with_big_eviction_standalone(quick: Models) -> None:
    """One of four times the size, which nobody knew before: it and the newest ones stay."""
    quick.add_many(ROOM)
    assert quick.add(f"SIZE_{200 * MIB}_20_80").status == Status.LOADED
    eventually(lambda: quick.loaded() == list(range(4, ROOM + 1)))


def test_multi_load_with_eviction_standalone_reuse(quick: Models) -> None:
    """Who was used lately stays, however long it has been here."""
    quick.add_many(ROOM)
    for model_id in quick.ids[:3]:
        assert quick.instance.ensure_loaded(model_id, sync=True).status == Status.LOADED
    quick.add_many(3)
    assert quick.loaded() == [0, 1, 2, *range(6, ROOM + 3)]


# --- ModelMeshEvictionsTest: three instances -----------------------------------------------------


def test_multi_load_cluster(spread: Models) -> None:
    spread.add_many(9)
    assert spread.loaded() == list(range(9))


#: Last uses so far apart that no two oldest models are about as old: a tenth of their age is, and
#: less than 45 s. And so long ago that none is loaded ahead of calls.
AGE_FACTOR = 1.3
AGE_MS_MIN = 7 * 3600 * 1000
CLUSTER_ROOM = POD_ROOM * len(PODS)


class Aged:
    """Three full instances that know each other's oldest models, which are not about as old.

    Java adds models as fast as it can, and grants that two an instance go that need not: a place
    is chosen by lot among instances whose oldest are about as old, as far as records tell that may
    be seconds old. With neither of that it is the oldest of all that goes, as in one large cache.
    """

    def __init__(self, models: Models, count: int) -> None:
        self.models = models
        now_ms = int(time.time() * 1000)
        self.last_used_ms = [
            now_ms - int(AGE_MS_MIN * AGE_FACTOR**younger) for younger in reversed(range(count))
        ]
        for number in range(CLUSTER_ROOM):
            holder = models.mesh[number % len(PODS)]
            model_id = models.name_next()
            holder.register(model_id, models.path, last_used_ms=self.last_used_ms[number])
            holder.load_here(model_id, last_used_ms=self.last_used_ms[number])
        assert models.loaded() == list(range(CLUSTER_ROOM))

    def add_where_oldest_go(self, numbers: Sequence[int]) -> None:
        """Add one for each number, which is the oldest then and has to go."""
        for number in numbers:
            for instance in self.models.mesh.instances:
                eventually(partial(self._knows, instance, number), what="records of instances")
            last_used_ms = self.last_used_ms[len(self.models.ids)]
            assert self.models.add(last_used_ms=last_used_ms).status == Status.LOADED
            eventually(partial(self._is_gone, number), what="the oldest of all is let go")

    def _is_gone(self, number: int) -> bool:
        return self.models.status(number) == Status.NOT_LOADED

    def _knows(self, instance: Instance, oldest: int) -> bool:
        """Answer whether it sees all of them full, and which is the oldest."""
        (told,) = instance.statistics().partitions
        return (told.copies, told.lru_time_ms) == (CLUSTER_ROOM, self.last_used_ms[oldest])


def test_multi_load_with_eviction_cluster(spread: Models) -> None:
    aged = Aged(spread, CLUSTER_ROOM + 3)
    aged.add_where_oldest_go(range(3))
    assert spread.loaded() == list(range(3, CLUSTER_ROOM + 3))


def test_multi_load_with_eviction_cluster_reuse(spread: Models) -> None:
    aged = Aged(spread, CLUSTER_ROOM + 5)
    for model_id in spread.ids[:5]:
        assert spread.instance.ensure_loaded(model_id).status == Status.LOADED
    aged.add_where_oldest_go(range(5, 10))
    assert spread.loaded() == [*range(5), *range(10, CLUSTER_ROOM + 5)]
