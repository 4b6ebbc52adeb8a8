"""A rolling upgrade of real processes, called by grpcio: first to a version that loads nothing."""

from __future__ import annotations

import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import grpc
import pytest

from mm.pb.grpc.health.v1 import HealthCheckRequest, HealthCheckResponse
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, mesh_of, record_of
from tests.system.processes import eventually

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

MODELS = [f"m{number}" for number in range(12)]
#: Their first load in a process fails, so they load at the second try only.
BROKEN = ["broken0", "broken1", "broken2"]
OLD = {"SERVICE_VERSION": "mm-20260101-1"}
NEW = {"SERVICE_VERSION": "mm-20260201-1"}
CLIENTS_COUNT = 3
#: Between two calls of one client: they are to be there all the time, not to keep the machine busy.
PAUSE_S = 0.05
SOON_S = 60.0


def is_ready(instance: Instance) -> bool:
    answer = instance.call(
        "/grpc.health.v1.Health/Check", HealthCheckRequest(), HealthCheckResponse
    )
    return bool(answer.status.name == "SERVING")


class Clients:
    """Threads that call whatever is an endpoint, as clients of a Kubernetes service do."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self._endpoints: list[Instance] = []
        self._calling: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def add(self, instance: Instance) -> None:
        with self._lock:
            self._endpoints.append(instance)

    def remove(self, instance: Instance) -> None:
        """Return when nobody calls it any more: Kubernetes waits before the signal, too."""
        with self._lock:
            self._endpoints.remove(instance)
        eventually(lambda: not self._calling[instance.instance_id], what="its calls end")

    @contextmanager
    def calling(self) -> Iterator[None]:
        with ThreadPoolExecutor() as pool:
            threads = [pool.submit(self._call, random.Random(n)) for n in range(CLIENTS_COUNT)]
            try:
                yield
            finally:
                self._over.set()
        for thread in threads:
            thread.result()

    def _call(self, rng: random.Random) -> None:
        while not self._over.wait(PAUSE_S):
            with self._lock:
                instance = rng.choice(self._endpoints)
                self._calling[instance.instance_id] += 1
            try:
                instance.predict(rng.choice(MODELS))
                answer = "OK"
            except grpc.RpcError as exc:
                answer = f"{exc}"
            with self._lock:
                self._calling[instance.instance_id] -= 1
                self.answers[answer] += 1


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    settings = {"MM_DATAPLANE": dataplane}
    with mesh_of(kv_store, settings, new_service_name()) as made:
        yield made


def test_a_rolling_upgrade_fails_no_call_and_a_bad_version_stays_out(
    mesh: Mesh, keys: Keys
) -> None:
    with ThreadPoolExecutor() as pool:
        old = list(pool.map(partial(mesh.add, settings=OLD), ["old0", "old1", "old2"]))
    for model_id in MODELS:
        old[0].register(model_id, "SIZE_1000000_50_10", load_now=True, sync=True)
    for model_id in BROKEN:
        old[0].register(model_id, f"FAIL_{model_id}")
        with suppress(grpc.RpcError):
            old[0].load_here(model_id)
        eventually(partial(has_loaded, old[0], model_id), what="the second try succeeds")
    eventually(lambda: not old[0].statistics().registry_writes_owed, what="all is told")
    clients = Clients()
    for instance in old:
        assert is_ready(instance)
        clients.add(instance)
    with clients.calling():
        bad = mesh.add("bad", settings={**NEW, "SERVICE_VERSION": "mm-20260301-1"})
        for model_id in BROKEN:
            assert is_ready(bad), model_id
            with suppress(grpc.RpcError, AssertionError):
                bad.load_here(model_id)
        eventually(lambda: not is_ready(bad), what="it is not ready")
        statistics = bad.statistics()
        assert statistics.unready_because.startswith("its first loads failed")
        assert (statistics.version, statistics.first_loads_failed) == (0, 3)
        keys.wait(
            mesh.prefix("instances"), lambda records: "loadsFail" in record_of(records, "bad")
        )
        bad.serve.process.send_signal(signal.SIGTERM)
        assert bad.serve.wait_end(SOON_S) == 0
        with ThreadPoolExecutor() as pool:
            new = list(pool.map(partial(mesh.add, settings=NEW), ["new0", "new1", "new2"]))
        for leaving, coming in zip(old, new, strict=True):
            eventually(partial(is_ready, coming), what=f"{coming.instance_id} is ready")
            clients.add(coming)
            clients.remove(leaving)
            leaving.serve.process.send_signal(signal.SIGTERM)
            assert leaving.serve.wait_end(SOON_S) == 0
    assert set(clients.answers) == {"OK"}, clients.answers
    holders = {
        holder
        for model_id in MODELS
        for holder in record_of(keys.table(mesh.prefix("registry")), model_id)["instanceIds"]
    }
    assert holders <= {each.instance_id for each in new}, "what was loaded has moved"


def has_loaded(instance: Instance, model_id: str) -> bool:
    with suppress(grpc.RpcError, AssertionError):
        instance.load_here(model_id)
        return True
    return False
