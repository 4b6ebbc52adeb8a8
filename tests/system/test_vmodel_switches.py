"""A switch while calls of every kind are under way: streams, and calls that name several vmodels
(spec core 2.13, 2.15, 6.5).

A stream that is open ends on the model that it began with and loses nothing; what begins a second
later goes to the new model, at each instance; none fails because of the switch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from mm.pb.mm.testing import EchoRequest, EchoResponse
from tests.system.conftest import Pair
from tests.system.etcd import Keys
from tests.system.meshes import CALL_TIMEOUT_S, Instance, channel_to, refusal
from tests.system.processes import eventually
from tests.system.yardstick import yardstick_of

pytestmark = pytest.mark.system

VStatus = mmesh.VModelStatusInfoVModelStatus
PATH = "SIZE_1000000_10_0"
#: Nobody calls the model of before for longer than this, beside what the machine takes for itself.
OLD_S_MAX = 1.0
#: Between two calls of one client.
PAUSE_S = 0.02
#: Far more than the windows on the way hold: the answers are not all sent before somebody reads.
ANSWERS, ANSWER_BYTES = 150, 2**17


def set_vmodel(instance: Instance, name: str, target: str, kind: str, **wishes: bool) -> None:
    """Return when the target is active."""
    request = mmesh.SetVModelRequest(
        v_model_id=name,
        target_model_id=target,
        model_info=mmesh.ModelInfo(type=kind, path=PATH),
        auto_delete_target_model=True,
        load_now=True,
        sync=True,
        **wishes,
    )
    reply = instance.call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)
    assert (reply.status, reply.active_model_id) == (VStatus.DEFINED, target), reply


class Streams:
    """One stream of each kind through an instance, each half done, and all that came of it."""

    def __init__(self, instance: Instance, name: str) -> None:
        self._metadata = (("mm-vmodel-id", name),)
        self._channel = channel_to(instance.port)
        self._questions: SimpleQueue[EchoRequest | None] = SimpleQueue()
        self._parts: SimpleQueue[EchoRequest | None] = SimpleQueue()
        self._both: Any = self._open("stream_stream", "bidiStream", iter(self._questions.get, None))
        stub = self._stub("stream_unary", "clientStream")
        parts = iter(self._parts.get, None)
        self._upload: Any = stub.future(parts, metadata=self._metadata, timeout=CALL_TIMEOUT_S)
        many = EchoRequest(reply_count=ANSWERS, reply_bytes=ANSWER_BYTES)
        self._download: Any = self._open("unary_stream", "serverStream", many)
        self._models = {next(self._download).model_id}
        self._answers_count = 1
        self._asked_count = 0

    def _stub(self, kind: str, method: str) -> Any:
        make = getattr(self._channel, kind)
        return make(
            f"/mm.testing.Echo/{method}",
            request_serializer=bytes,
            response_deserializer=EchoResponse.parse,
        )

    def _open(self, kind: str, method: str, request: object) -> Any:
        stub = self._stub(kind, method)
        return stub(request, metadata=self._metadata, timeout=CALL_TIMEOUT_S)

    def go_on(self) -> None:
        """Send a further message where there are many, and read the answer to it."""
        self._asked_count += 1
        text = b"%d." % self._asked_count
        self._parts.put(EchoRequest(payload=text))
        self._questions.put(EchoRequest(payload=text))
        answer = next(self._both)
        assert (answer.payload, answer.request_count) == (text, self._asked_count)
        self._models.add(answer.model_id)

    def end(self) -> set[str]:
        """End all, see that nothing is missing, and answer the models that they were served by."""
        for queue in (self._questions, self._parts):
            queue.put(None)
        assert list(self._both) == []
        answer = self._upload.result()
        sent = b"".join(b"%d." % number for number in range(1, self._asked_count + 1))
        assert (answer.payload, answer.request_count) == (sent, self._asked_count)
        rest = list(self._download)
        assert [len(each.payload) for each in rest] == [ANSWER_BYTES] * (ANSWERS - 1)
        assert {each.code() for each in (self._both, self._upload, self._download)} == {
            grpc.StatusCode.OK
        }
        return self._models | {answer.model_id} | {each.model_id for each in rest}

    def close(self) -> None:
        """Give up what is open still."""
        self._channel.close()


@dataclass(slots=True)
class Caller:
    """Calls two vmodels at one instance, in one call, all the time."""

    instance: Instance
    names: tuple[str, str]
    stopping: threading.Event = field(default_factory=threading.Event)
    #: When it began, and which models answered.
    answers: list[tuple[float, set[str]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        ids = [*(("mm-vmodel-id", name) for name in self.names), ("mm-required", "all")]
        request = mmesh.PredictRequest(text="t")
        while not self.stopping.wait(PAUSE_S):
            began_s = time.monotonic()
            try:
                reply = self.instance.call(
                    "/mmesh.ExamplePredictor/multiPredict", request, mmesh.MultiPredictResponse, ids
                )
            except grpc.RpcError as exc:
                self.failures.append(str(exc))
            else:
                self.answers.append((began_s, set(reply.per_model_results)))

    def has_called_since(self, began_s: float) -> bool:
        """Whether a call that began later was answered, or something went wrong."""
        return bool(self.failures) or any(each > began_s for each, _ in self.answers)

    def was_answered_by(self, model_id: str) -> bool:
        """Whether the last call was, or something went wrong."""
        return bool(self.failures) or model_id in self.answers[-1][1]


@contextmanager
def calling(*callers: Caller) -> Iterator[None]:
    threads = [threading.Thread(target=each.run) for each in callers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for caller in callers:
            caller.stopping.set()
        for thread in threads:
            thread.join()


def has_loaded(pair: Pair, instance: Instance, model_id: str) -> bool:
    """Whether the runtime beside an instance has it: asked there, without the mesh."""
    target = f"unix:{pair.mesh.socket_path(instance.instance_id)}"
    with grpc.insecure_channel(target) as channel:
        stub: Any = channel.unary_unary(
            "/mm.testing.Echo/unary",
            request_serializer=bytes,
            response_deserializer=EchoResponse.parse,
        )
        ask = partial(stub, EchoRequest(), metadata=(("mm-model-id", model_id),))
        try:
            ask(timeout=CALL_TIMEOUT_S)
        except grpc.RpcError:
            assert refusal(ask)[0] == grpc.StatusCode.NOT_FOUND
            return False
        return True


def ready_count(pair: Pair, keys: Keys, model_id: str, revision: int = 0) -> int:
    """Answer how many copies serve, now or at a revision of the store."""
    record = keys.get(pair.mesh.prefix("registry") + model_id, revision)
    return 0 if record is None else record.count('"state":"ready"')


@pytest.mark.parametrize("is_forced", [False, True])
def test_a_switch_under_streams_and_calls_of_several(
    pair: Pair, keys: Keys, *, is_forced: bool
) -> None:
    """From a model with two copies to one that has none: it gets as many before it takes over.
    Forced, to a model that only one instance may load, and that is one hop away for the other.
    """
    instances = (pair.holder, pair.other)
    name, old, new = (f"under-streams-{is_forced:d}{each}" for each in ("", "-old", "-new"))
    kind = "held" if is_forced else "example"
    set_vmodel(pair.other, name, old, kind)
    set_vmodel(pair.other, f"{name}-steady", f"{name}-other", kind)
    holders = instances[: 1 if is_forced else 2]
    for each in holders:
        each.load_here(old)
    eventually(lambda: ready_count(pair, keys, old) == len(holders))

    with ExitStack() as stack:
        yardstick = stack.enter_context(yardstick_of(keys))
        streams = [Streams(each, name) for each in instances]
        for each in streams:
            stack.callback(each.close)
        callers = [Caller(each, (name, f"{name}-steady")) for each in instances]
        stack.enter_context(calling(*callers))
        for each in streams:
            each.go_on()
        for caller in callers:
            eventually(partial(caller.has_called_since, 0.0))

        set_vmodel(pair.holder, name, new, kind, force=is_forced)
        ended_s = time.monotonic()
        if not is_forced:
            switched = keys.revision_of(pair.mesh.prefix("vmodels") + name)
            assert ready_count(pair, keys, new, switched) == 2
        for each in streams:
            each.go_on()
        for caller in callers:
            eventually(partial(caller.has_called_since, ended_s + OLD_S_MAX))
            eventually(partial(caller.was_answered_by, new))
            caller.stopping.set()
        for each in streams:
            each.go_on()
        assert keys.get(pair.mesh.prefix("registry") + old) is None, "it went with the switch"
        assert all(has_loaded(pair, each, old) for each in holders), "streams keep it loaded"
        assert [each.end() for each in streams] == [{old}, {old}]
        for each in holders:
            eventually(lambda at=each: not has_loaded(pair, at, old))

    for caller in callers:
        assert not caller.failures, caller.failures[:3]
        for began_s, models in caller.answers:
            (model_id,) = models - {f"{name}-other"}
            assert len(models) == 2, "both vmodels are answered for"
            if model_id != new:
                assert model_id == old
                yardstick.check(ended_s, began_s, OLD_S_MAX, f"{old} answers")
    for each in (name, f"{name}-steady"):
        request = mmesh.DeleteVModelRequest(v_model_id=each)
        pair.other.call("/mmesh.ModelMesh/deleteVModel", request, mmesh.DeleteVModelResponse)


def _models_called(instance: Instance, name: str, others: tuple[str, ...]) -> set[str]:
    """Call a vmodel alone, or several of them at once; answers the models that were meant."""
    metadata = [("mm-vmodel-id", each) for each in (name, *others)]
    if not others:
        request = EchoRequest()
        reply = instance.call("/mm.testing.Echo/unary", request, EchoResponse, metadata)
        return {reply.model_id}
    several = instance.call(
        "/mmesh.ExamplePredictor/multiPredict",
        mmesh.PredictRequest(text="t"),
        mmesh.MultiPredictResponse,
        [*metadata, ("mm-required", "all")],
    )
    return set(several.per_model_results)


def test_calls_that_wait_for_the_old_model_follow_the_switch(pair: Pair) -> None:
    """The old model takes long to load, at one instance, and stays registered: whoever waited for
    it, there or a hop away, is answered by the new one.
    """
    name, old, new = "waited-for", "waited-for-old", "waited-for-new"
    instances = (pair.holder, pair.other)
    steady = f"{name}-steady"
    set_vmodel(pair.other, steady, steady, "held")
    slow = mmesh.ModelInfo(type="held", path="SIZE_1000000_20000_0")
    pair.holder.call(
        "/mmesh.ModelMesh/setVModel",
        mmesh.SetVModelRequest(v_model_id=name, target_model_id=old, model_info=slow),
        mmesh.VModelStatusInfo,
    )
    with ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(_models_called, each, name, others)
            for each in instances
            for others in ((), (steady,))
        ]
        eventually(lambda: pair.holder.statistics().waiting_calls >= len(calls))
        set_vmodel(pair.holder, name, new, "held", force=True)
        answers = [each.result() for each in calls]
    assert answers == [{new}, {new, steady}] * 2
    for each in (name, steady):
        request = mmesh.DeleteVModelRequest(v_model_id=each)
        pair.other.call("/mmesh.ModelMesh/deleteVModel", request, mmesh.DeleteVModelResponse)
    unregister = mmesh.UnregisterModelRequest(model_id=old)
    pair.other.call("/mmesh.ModelMesh/unregisterModel", unregister, mmesh.UnregisterModelResponse)
