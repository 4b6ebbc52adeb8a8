"""A stand-in for the modelmesh-serving controller: what it asks of a mesh, and when (interop 1, 2).

It reconciles predictors as that one does: one at a time, by setVModel and deleteVModel over a
grpcio channel that goes round the instances; again whenever a key of ``registry/`` or ``vmodels/``
of its predictors changes in etcd, and all the time while one loads, or no instance may load it.
Each answer is held to what the controller can digest (``Observed.observe``). Kubernetes is a
dictionary here.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.processes import eventually

Status = mmesh.ModelStatusInfoModelStatus
VStatus = mmesh.VModelStatusInfoVModelStatus

#: The controller's own time limit for a call, and how often it looks at a model that loads.
CALL_TIMEOUT_S: Final = 10.0
LOADING_POLL_S: Final = 1.0
#: The controller's is 3 s: what it asks ten times as often must cost etcd nothing all the more.
WAITING_POLL_S: Final = 0.3
ERROR_PAUSE_S: Final = 0.2
#: An instance that is gone, and time that ran out; how long calls take is the test's to judge.
RETRIED: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

#: How the controller knows that it has to wait for another runtime; then the failure is no copy's.
WAITING_TEXT: Final = (
    "There are no running instances that meet the label requirements of type {type}: [{type}]"
)

TRANSITIONS: Final = {
    VStatus.DEFINED: "UpToDate",
    VStatus.TRANSITIONING: "InProgress",
    VStatus.TRANSITION_FAILED: "BlockedByFailedLoad",
}
STATES: Final = {
    Status.NOT_LOADED: "Standby",
    Status.LOADING: "Loading",
    Status.LOADED: "Loaded",
    Status.LOADING_FAILED: "FailedToLoad",
}
Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Predictor:
    """A predictor, or an InferenceService: ``source`` is ``ksp`` or ``isvc``."""

    name: str
    source: str
    path: str
    model_type: str = "mt:example:1"

    @property
    def model_id(self) -> str:
        """Its name, and a hash of what it says."""
        said = json.dumps({"model": {"path": self.path, "type": self.model_type}})
        return f"{self.name}__{self.source}-{hashlib.sha1(said.encode()).digest()[:5].hex()}"

    @property
    def key(self) -> str:
        """The model's key as the controller writes it."""
        said = {
            "storage_key": "localMinIO",
            "storage_params": {"bucket": "models"},
            "model_type": {"name": "example", "version": "1"},
        }
        return json.dumps(said, separators=(",", ":"))


@dataclass(slots=True)
class Observed:
    """What the controller knows of a predictor, and all that it saw."""

    transition: str = ""
    active_id: str = ""
    active: str = "Pending"
    target: str = ""
    failure: str = ""
    #: The model that was asked for last, and whether it was UpToDate since.
    asked_id: str = ""
    is_done: bool = False
    #: There is no instance that may load it.
    is_waiting: bool = False
    #: Active models that all instances said were Loaded; they stay so unless an instance goes.
    loaded_ids: set[str] = field(default_factory=set)
    may_lose: bool = False
    seen: list[tuple[str, ...]] = field(default_factory=list)

    def observe(self, predictor: Predictor, answer: mmesh.VModelStatusInfo) -> None:
        """Take an answer over; fails if the controller could not make sense of it, or if it can not
        follow what was said before.
        """
        asked_id, model_type = predictor.model_id, predictor.model_type
        if asked_id != self.asked_id:
            self.asked_id, self.is_done = asked_id, False
        self.transition = TRANSITIONS[answer.status]
        self.active_id = answer.active_model_id
        assert answer.active_model_status is not None, answer
        self.active = STATES[answer.active_model_status.status]
        self.target = ""
        in_transition = answer.active_model_id != answer.target_model_id
        assert in_transition == (self.transition != "UpToDate"), answer
        assert answer.target_model_id == asked_id, answer
        failed = answer.active_model_status
        if in_transition:
            assert answer.target_model_status is not None, answer
            failed = answer.target_model_status
            self.target = STATES[failed.status]
            assert self.target in ("Loading", "FailedToLoad"), answer
        self.failure = failed.errors[0] if failed.errors else ""
        self.is_waiting = self.failure == WAITING_TEXT.format(type=model_type)
        assert not (self.is_waiting and failed.model_copy_infos), answer
        self._check_failures(failed)
        self.seen.append((self.transition, self.active_id, self.active, self.target))
        self._check_sequence()

    def _check_failures(self, info: mmesh.ModelStatusInfo) -> None:
        for copy in info.model_copy_infos:
            if copy.copy_status == Status.LOADING_FAILED:
                assert copy.location, info
                assert abs(copy.time / 1000 - time.time()) < 3600, "milliseconds are asked for"

    def _check_sequence(self) -> None:
        assert not (self.is_done and self.transition != "UpToDate"), f"it was done: {self.seen}"
        self.is_done = self.transition == "UpToDate"
        was_loaded = self.active_id in self.loaded_ids
        assert self.active == "Loaded" or self.may_lose or not was_loaded, self.seen

    @property
    def load_now(self) -> bool:
        """Whether the controller wants it loaded at once."""
        return self.active in ("Pending", "FailedToLoad") or bool(self.target)


class Controller:
    """Reconciles predictors until it is closed."""

    def __init__(
        self,
        keys: Keys,
        prefix: Callable[[str], str],
        ports: Sequence[int],
        predictors: Sequence[Predictor] = (),
    ) -> None:
        self._prefixes = {table: prefix(table) for table in ("vmodels", "registry")}
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}'),
        ]
        places = ",".join(f"127.0.0.1:{port}" for port in ports)
        self._channel = grpc.insecure_channel(f"ipv4:{places}", options=options)
        self._keys = keys
        # Before any event: what is not there is deleted.
        self._predictors = {(each.name, each.source): each for each in predictors}
        self._wanted: dict[Name, float] = {}
        self._changed = threading.Condition()
        self._closing = threading.Event()
        #: Keys of ours that changed in etcd, as they come.
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.observed = {name: Observed() for name in self._predictors}
        #: Predictors that somebody else's vmodel stands in the way of.
        self.refused: set[Name] = set()
        #: When each call began and ended, and which it was.
        self.calls: list[tuple[float, float, str]] = []
        self.failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._guarded, args=(self._work,), daemon=True)]
        self._watches = [keys.follow(each) for each in self._prefixes.values()]
        for table, watch in zip(self._prefixes, self._watches, strict=True):
            work = self._watcher(table, watch)
            self._threads.append(threading.Thread(target=self._guarded, args=(work,), daemon=True))
        for thread in self._threads:
            thread.start()
        for name in list(self._predictors):
            self._want(name)

    # --- what users do ---

    def apply(self, predictor: Predictor) -> None:
        """Create a predictor, or change it."""
        name = (predictor.name, predictor.source)
        with self._changed:
            self._predictors[name] = predictor
            self.observed.setdefault(name, Observed())
        self._want(name)

    def remove(self, predictor: Predictor) -> None:
        """Delete a predictor."""
        name = (predictor.name, predictor.source)
        with self._changed:
            self._predictors.pop(name, None)
            self.observed.pop(name, None)
            self.refused.discard(name)
        self._want(name)

    def wait(self, predictor: Predictor, transition: str, active: str, target: str = "") -> None:
        """Return when the predictor is said to be so."""
        name = (predictor.name, predictor.source)

        def is_so() -> bool:
            self.check()
            seen = self.observed[name]
            asked = seen.asked_id == predictor.model_id
            return asked and (seen.transition, seen.active, seen.target) == (
                (transition, active, target)
            )

        try:
            eventually(is_so, what="that")
        except AssertionError as exc:
            text = f"{name} is not {transition}, {active}, {target}: {self.observed[name]}"
            raise AssertionError(text) from exc

    def wait_refused(self, predictor: Predictor) -> None:
        """Return when the predictor is told that its name is somebody else's."""
        name = (predictor.name, predictor.source)

        def is_refused() -> bool:
            self.check()
            return name in self.refused

        eventually(is_refused, what=f"{name} is refused")

    def check(self) -> None:
        """Fail if anything went wrong in one of its threads."""
        if self.failure is not None:
            raise self.failure

    def wait_quiet(self, quiet_s: float) -> None:
        """Return after the next so many seconds without any change in etcd: no call of ours, and
        nothing that the mesh does by itself, may cause one for ever.
        """
        for _ in range(1000):
            try:
                self.events.get(timeout=quiet_s)
            except queue.Empty:
                self.check()
                return
        raise AssertionError(f"a thousand changes, each within {quiet_s} s of the last one")

    def check_quiet(self, quiet_s: float) -> None:
        """Fail if anything changes in etcd within so many seconds."""
        try:
            changed = self.events.get(timeout=quiet_s)
        except queue.Empty:
            self.check()
            return
        raise AssertionError(f"{changed} has changed, and all had been quiet")

    def settled(self) -> None:
        """Say that all instances agree: what is Loaded now stays so. Before, one of them may have
        heard of it a moment later than the others.
        """
        with self._changed:
            for each in self.observed.values():
                if each.active == "Loaded":
                    each.loaded_ids.add(each.active_id)

    def disturbed(self) -> None:
        """Say that an instance went, and copies with it."""
        with self._changed:
            for each in self.observed.values():
                each.may_lose = True

    def close(self) -> None:
        """End it, as a restart does: the next one begins with what is in etcd."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        for watch in self._watches:
            watch.cancel()
        self._channel.close()
        for thread in self._threads:
            thread.join(CALL_TIMEOUT_S + 10)

    # --- its threads ---

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:
            if not self._closing.is_set():
                self.failure = exc

    def _want(self, name: Name, after_s: float = 0.0) -> None:
        due_s = time.monotonic() + after_s
        with self._changed:
            self._wanted[name] = min(due_s, self._wanted.get(name, due_s))
            self._changed.notify_all()

    def _next(self) -> Name | None:
        with self._changed:
            while not self._closing.is_set():
                if self._wanted:
                    name = min(self._wanted, key=lambda each: self._wanted[each])
                    left_s = self._wanted[name] - time.monotonic()
                    if left_s <= 0:
                        del self._wanted[name]
                        return name
                    self._changed.wait(left_s)
                else:
                    self._changed.wait()
        return None

    def _work(self) -> None:
        """One predictor at a time: one slow call would hold up all."""
        while (name := self._next()) is not None:
            try:
                self._reconcile(name)
            except grpc.RpcError as exc:
                error: Any = exc
                if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                    self.refused.add(name)
                elif error.code() in RETRIED:
                    self._want(name, ERROR_PAUSE_S)
                else:
                    raise

    def _reconcile(self, name: Name) -> None:
        with self._changed:
            predictor = self._predictors.get(name)
            observed = self.observed.get(name)
        if predictor is None or observed is None:
            request = mmesh.DeleteVModelRequest(v_model_id=name[0], owner=name[1])
            self._call("deleteVModel", request, mmesh.DeleteVModelResponse)
            return
        asked = mmesh.SetVModelRequest(
            v_model_id=predictor.name,
            owner=predictor.source,
            target_model_id=predictor.model_id,
            auto_delete_target_model=True,
            load_now=observed.load_now,
            model_info=mmesh.ModelInfo(
                type=predictor.model_type, path=predictor.path, key=predictor.key
            ),
        )
        answer = self._call("setVModel", asked, mmesh.VModelStatusInfo)
        with self._changed:
            self.refused.discard(name)
            if self._predictors.get(name) == predictor:
                observed.observe(predictor, answer)
        if observed.active == "Loading":
            self._want(name, LOADING_POLL_S)
        elif observed.is_waiting:
            self._want(name, WAITING_POLL_S)

    def _call(self, method: str, request: Any, reply_type: Any) -> Any:
        stub: Any = self._channel.unary_unary(
            f"/mmesh.ModelMesh/{method}",
            request_serializer=bytes,
            response_deserializer=reply_type.parse,
        )
        began_s = time.monotonic()
        try:
            return stub(request, timeout=CALL_TIMEOUT_S)
        finally:
            self.calls.append((began_s, time.monotonic(), method))

    def _watcher(self, table: str, watch: Any) -> Callable[[], None]:
        def follow() -> None:
            cached: dict[str, str] = {}
            for key_id, value, is_new in watch:
                name = _vmodel_name(key_id, value, cached)
                if table == "registry":
                    name = None if value is None else predictor_of(key_id)
                if is_new:
                    self.events.put(f"{table}/{key_id}")
                if name is not None:
                    self._want(name)

        return follow


def predictor_of(model_id: str) -> Name | None:
    """Answer whose model it is: ``name__source-0123456789``; None for one of somebody else."""
    name, mark, rest = model_id.rpartition("__")
    if not mark or not name or len(rest) < 12 or rest[-11] != "-":
        return None
    return name, rest[:-11]


def _vmodel_name(key_id: str, value: str | None, cached: dict[str, str]) -> Name | None:
    """Answer whose vmodel it is; a deletion is told by what it was before."""
    said = cached.pop(key_id, None) if value is None else value
    if said is None:
        return None
    if value is not None:
        cached[key_id] = value
    try:
        record = json.loads(said)
    except ValueError:
        return None
    owners = [text for name, text in record.items() if name.lower() == "o"]
    return key_id, (owners[0] if owners else "") or "ksp"
