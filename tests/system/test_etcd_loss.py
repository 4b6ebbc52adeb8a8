"""etcd goes away while two instances serve, in four ways, and comes back after their leases' time.

Stopped: connections are refused. Frozen: they stay open and nothing answers. Wiped: as stopped, and
it comes back without its data directory. Restored: it comes back with what `etcdctl snapshot save`
kept of it before some models were registered, unregistered, and registered anew. All outages run at
once, each with an etcd and a mesh of its own; what was seen is then judged test by test.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from mm.edge.etcd_process import EtcdProcess, find_binary
from mm.pb import mmesh
from tests.system.etcd import Keys, Records, run_tool
from tests.system.grpcio_runtime import GrpcioRuntime, grpcio_runtime
from tests.system.meshes import CALL_TIMEOUT_S, Instance, Mesh, mesh_of, record_of
from tests.system.processes import eventually
from tests.system.quick_serve import FOUR_TIMES

pytestmark = pytest.mark.system

#: A minute, three times as long as a lease lasts; with everything four times as fast, unless
#: somebody has the patience for a real one and sets this.
IS_REAL_MINUTE = bool(os.environ.get("MM_TEST_REAL_MINUTE"))
OUTAGE_S = 60.0 if IS_REAL_MINUTE else 15.0
#: A write may try for this long before it is clear that the store is away (`store_timeout_s`).
STORE_TIMEOUT_S = 3.5
#: From then on each waits this long for it to come back (`DOWN_WAIT_S`).
DOWN_WAIT_S = 0.5
#: Less than it would take to find out by leases and by limits of calls; far more than it takes.
RECOVERY_S = 10.0
#: Five a second of each instance: many more than there are waits that could hide between two.
CALLS_MIN = 40
#: What the machine may take for itself, since it has other work: less than half of a try.
BUSY_S = 1.5
LOADED = [f"loaded-{number}" for number in range(4)]
#: Nobody calls these, so that only what the outage does is written of them.
QUIET = [f"quiet-{number}" for number in range(30)]
#: In the backup: gone since, with another path since, not there yet.
GONE, ANEW, SINCE = "gone", "anew", "since"
NAMES = ("first", "second")
OUTAGES = ("stopped", "frozen", "wiped", "restored")

Code = grpc.StatusCode


@dataclass(slots=True)
class Seen:
    """What happened in one outage."""

    #: Outcomes of calls to loaded models, made all the time, from before to after.
    calls: Counter[Code] = field(default_factory=Counter)
    call_times_s: list[float] = field(default_factory=list)
    #: What was tried during the outage -> its code, and how long it took.
    during: dict[str, tuple[Code, str, float]] = field(default_factory=dict)
    writes: list[tuple[Code, float]] = field(default_factory=list)
    #: From the return of etcd to the first registration, and to both instance records.
    recovery_s: float = 0.0
    instances: Records = field(default_factory=dict)
    registry: Records = field(default_factory=dict)
    #: How many times etcd had written each record: before the loss, in the backup, in the end.
    versions: dict[str, int] = field(default_factory=dict)
    backup_versions: dict[str, int] = field(default_factory=dict)
    versions_after: dict[str, int] = field(default_factory=dict)
    #: Loads in order, of each runtime.
    loads: list[list[str]] = field(default_factory=list)
    #: Right after it: instance, model, code and text.
    after: list[tuple[str, str, Code, str]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)


def _is_ok(call: Callable[[], Any]) -> bool:
    return bool(call().code() == Code.OK)


class Outage:
    """One etcd, one mesh, and callers that never stop."""

    def __init__(self, kind: str, dataplane: str, seen: Seen) -> None:
        self.kind = kind
        self.seen = seen
        self.stack = ExitStack()
        directory = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="mm-outage-"))
        self.etcd = EtcdProcess(find_binary(), Path(directory))
        self.stack.callback(self.etcd.stop)
        self.etcd.start()
        store = f"etcd:http://{self.etcd.endpoint}"
        self.mesh: Mesh = self.stack.enter_context(
            mesh_of(store, {"MM_DATAPLANE": dataplane}, f"outage-{kind}")
        )
        self.mesh.limits = {} if IS_REAL_MINUTE else dict(FOUR_TIMES)
        self._directory = Path(directory)
        self.runtimes: list[GrpcioRuntime] = []
        for name in NAMES:
            path = self.mesh.socket_path(name)
            self.runtimes.append(self.stack.enter_context(grpcio_runtime(f"unix:{path}")))
            self.mesh.add_beside(name, None, {"INTERNAL_GRPC_SOCKET_PATH": path})
        for model_id in LOADED:
            self.mesh[0].register(model_id, load_now=True, sync=True)
        for model_id in ("cold", *QUIET, GONE, ANEW):
            self.mesh[0].register(model_id, "old")
        self.keys = Keys(str(self.etcd.endpoint))
        self.stack.callback(self.keys.close)
        self._back_up()
        for model_id in LOADED:
            # Whatever a watch has still to tell when etcd ends, is not known to the other one.
            eventually(partial(self._is_loaded, self.mesh[1], model_id), what="both know it")
        self.stopping = threading.Event()

    def _back_up(self) -> None:
        """Keep what etcd has now, then have some of it change."""
        file, endpoint = str(self._directory / "snapshot.db"), str(self.etcd.endpoint)
        run_tool("etcdctl", "--endpoints", endpoint, "snapshot", "save", file)
        prefix = self.mesh.prefix("registry")
        self.seen.backup_versions = self.keys.versions(prefix)
        for model_id in (GONE, ANEW):
            self.mesh[0].unregister(model_id)
        for model_id in (ANEW, SINCE):
            self.mesh[1].register(model_id, "new")
        self.seen.versions = self.keys.versions(prefix)

    def _restore(self) -> None:
        self.etcd.wipe()
        peer = "http://127.0.0.1:0"
        run_tool(
            *("etcdutl", "snapshot", "restore", str(self._directory / "snapshot.db")),
            *("--data-dir", str(self._directory / "data"), "--name", "mm"),
            *("--initial-cluster", f"mm={peer}", "--initial-advertise-peer-urls", peer),
        )

    @staticmethod
    def _is_loaded(instance: Instance, model_id: str) -> bool:
        return instance.status(model_id).status == mmesh.ModelStatusInfoModelStatus.LOADED

    def run(self) -> None:
        """Have the outage, and note what was seen."""
        with ThreadPoolExecutor() as pool:
            callers = [pool.submit(self.keep_calling, instance) for instance in self.mesh.instances]
            try:
                self.suffer()
                self.recover()
            finally:
                self.stopping.set()
            for caller in callers:
                caller.result()
        self.seen.logs = [instance.serve.output() for instance in self.mesh.instances]

    def keep_calling(self, instance: Instance) -> None:
        stub: Any = instance.channel.unary_unary("/test.Runtime/echo")
        number = 0
        while not self.stopping.wait(0.05):
            number += 1
            metadata = (("mm-model-id", LOADED[number % len(LOADED)]),)
            started_s = time.monotonic()
            code = stub.future(b"x", metadata=metadata, timeout=CALL_TIMEOUT_S).code()
            self.seen.calls[code] += 1
            self.seen.call_times_s.append(time.monotonic() - started_s)

    def suffer(self) -> None:
        before = Counter(self.seen.calls)
        if self.kind != "frozen":
            self.etcd.kill()
        else:
            self.etcd.pause()
            # Its threads stop one after the other: the last may still answer.
            eventually(partial(self.is_frozen, self.mesh[0]), what="etcd stands still")
        end_s = time.monotonic() + OUTAGE_S
        first, second = self.mesh.instances
        self.note("register", partial(register, first, "during"))
        self.note("unregister", partial(unregister, second, LOADED[0]))
        self.note("load a registered model", partial(echo, second, "cold"))
        self.note("ask for an unknown model", partial(echo, first, "unknown"))
        self.note("status of a loaded model", partial(status, second, LOADED[1]))
        while time.monotonic() < end_s:
            code, _, took_s = timed(partial(register, second, "during"))
            self.seen.writes.append((code, took_s))
            self.stopping.wait(0.5)
        assert sum(self.seen.calls.values()) > sum(before.values())

    def is_frozen(self, instance: Instance) -> bool:
        return not _is_ok(partial(register, instance, "just-before"))

    def note(self, name: str, call: Callable[[], Any]) -> None:
        self.seen.during[name] = timed(call)

    def recover(self) -> None:
        if self.kind == "wiped":
            self.etcd.wipe()
        if self.kind == "restored":
            self._restore()
        if self.kind != "frozen":
            self.etcd.start()
        else:
            self.etcd.resume()
        started_s = time.monotonic()
        for number, instance in enumerate(self.mesh.instances):
            registers = partial(register, instance, f"after-{number}")
            eventually(partial(_is_ok, registers), timeout_s=120)
        keys = Keys(str(self.etcd.endpoint))
        self.stack.callback(keys.close)
        self.seen.instances = keys.wait(
            self.mesh.prefix("instances"), lambda records: set(records) == set(NAMES), timeout_s=120
        )
        self.seen.recovery_s = time.monotonic() - started_s
        calls = [(instance, model) for instance in self.mesh.instances for model in LOADED]
        calls += [(instance, "cold") for instance in self.mesh.instances]
        calls += [(self.mesh[0], "after-1"), (self.mesh[1], "after-0")]
        for instance, model in calls:
            code, text, _ = timed(partial(echo, instance, model))
            self.seen.after.append((instance.instance_id, model, code, text))
        self.seen.registry = keys.wait(
            self.mesh.prefix("registry"),
            lambda records: (
                GONE not in records
                and {*QUIET, ANEW, SINCE} <= set(records)
                and all("instanceIds" in records.get(model, "") for model in LOADED)
            ),
        )
        self.seen.versions_after = keys.versions(self.mesh.prefix("registry"))
        self.seen.loads = [list(runtime.loads) for runtime in self.runtimes]


def timed(call: Callable[[], Any]) -> tuple[Code, str, float]:
    started_s = time.monotonic()
    future = call()
    return future.code(), future.details(), time.monotonic() - started_s


def register(instance: Instance, model_id: str) -> Any:
    info = mmesh.ModelInfo(type="example")
    request = mmesh.RegisterModelRequest(model_id=model_id, model_info=info)
    return manage(instance, "registerModel", request)


def unregister(instance: Instance, model_id: str) -> Any:
    return manage(instance, "unregisterModel", mmesh.UnregisterModelRequest(model_id=model_id))


def status(instance: Instance, model_id: str) -> Any:
    return manage(instance, "getModelStatus", mmesh.GetStatusRequest(model_id=model_id))


def manage(instance: Instance, method: str, request: Any) -> Any:
    stub: Any = instance.channel.unary_unary(f"/mmesh.ModelMesh/{method}", request_serializer=bytes)
    return stub.future(request, timeout=CALL_TIMEOUT_S)


def echo(instance: Instance, model_id: str) -> Any:
    stub: Any = instance.channel.unary_unary("/test.Runtime/echo")
    return stub.future(b"x", metadata=(("mm-model-id", model_id),), timeout=CALL_TIMEOUT_S)


@pytest.fixture(scope="module")
def outages(dataplane: str) -> dict[str, Seen]:
    seen = {kind: Seen() for kind in OUTAGES}

    def have(kind: str) -> None:
        # From start to end in one thread: the etcd dies with the one that started it.
        outage = Outage(kind, dataplane, seen[kind])
        with outage.stack:
            outage.run()

    with ThreadPoolExecutor() as pool:
        list(pool.map(have, OUTAGES))
    return seen


@pytest.fixture(params=OUTAGES)
def seen(request: pytest.FixtureRequest, outages: dict[str, Seen]) -> Seen:
    return outages[request.param]


def test_loaded_models_keep_answering(seen: Seen) -> None:
    """Every single call, before, during and after, at both instances; and none waits for etcd."""
    assert set(seen.calls) == {Code.OK}
    assert seen.calls.total() > CALLS_MIN
    times_s = sorted(seen.call_times_s)
    assert times_s[len(times_s) // 2] < DOWN_WAIT_S
    assert times_s[-1] < STORE_TIMEOUT_S


@pytest.mark.parametrize(
    "what", ["register", "unregister", "load a registered model", "ask for an unknown model"]
)
def test_what_needs_the_store_fails(seen: Seen, what: str) -> None:
    code, text, took_s = seen.during[what]
    assert code == Code.UNAVAILABLE
    assert text.startswith("etcd at 127.0.0.1:")
    assert took_s < STORE_TIMEOUT_S + BUSY_S


def test_status_is_answered_from_what_is_known(seen: Seen) -> None:
    code, _, took_s = seen.during["status of a loaded model"]
    assert code == Code.OK
    assert took_s < BUSY_S


def test_writes_fail_fast_once_it_is_clear(seen: Seen) -> None:
    assert {code for code, _ in seen.writes} == {Code.UNAVAILABLE}
    slowest_s = sorted(took_s for _, took_s in seen.writes)
    # The median: a new try to connect may make one or the other wait.
    assert slowest_s[len(slowest_s) // 2] < 2 * DOWN_WAIT_S
    assert slowest_s[-1] < STORE_TIMEOUT_S + BUSY_S


def test_recovery_by_itself(seen: Seen) -> None:
    assert seen.recovery_s < RECOVERY_S
    assert set(seen.instances) == set(NAMES)
    failed = [told for told in seen.after if told[2] != Code.OK]
    assert not failed, [failed, *seen.logs]


def test_nothing_is_lost_and_nothing_comes_back(seen: Seen) -> None:
    """Also if the backup is older than that."""
    expected = {"cold", "after-0", "after-1", SINCE, ANEW, *QUIET, *LOADED}
    assert set(seen.registry) - {"during", "just-before"} == expected
    assert record_of(seen.registry, ANEW)["mPath"] == "new"
    assert record_of(seen.registry, SINCE)["mPath"] == "new"


@pytest.mark.parametrize("kind", OUTAGES)
def test_each_record_is_written_once(outages: dict[str, Seen], kind: str) -> None:
    """Those that a new store has not, or has an older text of; and no other."""
    seen = outages[kind]
    before = {"wiped": {}, "restored": seen.backup_versions}.get(kind, seen.versions)
    for model_id in (*QUIET, ANEW, SINCE):
        is_due = before.get(model_id) is None or (kind == "restored" and model_id == ANEW)
        assert seen.versions_after[model_id] == before.get(model_id, 0) + is_due, model_id


def test_no_instance_forgot_a_copy(seen: Seen) -> None:
    """What was loaded stayed loaded, and the registry says so still.

    With the leases run out, the instances take each other for gone until they have published
    themselves again: a call in that moment may have loaded one more copy, elsewhere.
    """
    for loads in seen.loads:
        assert max(Counter(loads).values(), default=0) <= 1, loads
    for model_id in LOADED:
        assert "instanceIds" in seen.registry[model_id]


def test_the_log_tells_of_it_without_a_traceback(seen: Seen) -> None:
    for log in seen.logs:
        assert "Traceback" not in log
        assert "etcd" in log.partition("ready: instance")[2]
