"""Calls that name vmodels, at the instance with the copy and one hop from it (around 6.1, 10, 11;
core 2.13, 2.15).

Calls whose message names the vmodel are in ``test_conformance_injection``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import grpc
import pytest

from mm.pb import mmesh
from tests.system.conftest import Pair
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Metadata, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Code = grpc.StatusCode
VStatus = mmesh.VModelStatusInfoVModelStatus
PATH = "SIZE_1000000_10_0"
#: The vmodels of these tests, and the model that each stands for.
ALIASES = {"alias": "of-alias", "øther/älias": "of-øther"}


def set_vmodel(instance: Instance, vmodel_id: str, target: str, *, force: bool = False) -> None:
    request = mmesh.SetVModelRequest(
        v_model_id=vmodel_id,
        target_model_id=target,
        model_info=mmesh.ModelInfo(type="held", path=PATH),
        auto_delete_target_model=True,
        force=force,
    )
    reply = instance.call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)
    assert reply.active_model_id == target


def active_model(instance: Instance, vmodel_id: str) -> str:
    request = mmesh.GetVModelStatusRequest(v_model_id=vmodel_id)
    reply = instance.call("/mmesh.ModelMesh/getVModelStatus", request, mmesh.VModelStatusInfo)
    return str(reply.active_model_id)


def delete_vmodel(instance: Instance, vmodel_id: str) -> None:
    request = mmesh.DeleteVModelRequest(v_model_id=vmodel_id)
    instance.call("/mmesh.ModelMesh/deleteVModel", request, mmesh.DeleteVModelResponse)


@pytest.fixture(scope="module", autouse=True)
def aliases(pair: Pair) -> Iterator[None]:
    for vmodel_id, model_id in ALIASES.items():
        set_vmodel(pair.other, vmodel_id, model_id)
    yield
    for vmodel_id in ALIASES:
        delete_vmodel(pair.holder, vmodel_id)


@pytest.fixture(params=["holder", "other"])
def instance(request: pytest.FixtureRequest, pair: Pair) -> Instance:
    found: Instance = getattr(pair, request.param)
    return found


def ids(*names: str) -> Metadata:
    return [("mm-vmodel-id", name) for name in names]


def encoded(*names: str) -> Metadata:
    return [("mm-vmodel-id-bin", name.encode()) for name in names]


def predict(instance: Instance, metadata: Metadata) -> str:
    """Answer the model that answered; the runtime hears of nothing else."""
    reply = instance.predict("", metadata=metadata)
    return reply.results[0].category.removeprefix("classification for hello by model ")


def multi_predict(instance: Instance, metadata: Metadata) -> list[str]:
    reply = instance.call(
        "/mmesh.ExamplePredictor/multiPredict",
        mmesh.PredictRequest(text="hello"),
        mmesh.MultiPredictResponse,
        metadata,
    )
    return sorted(reply.per_model_results)


def test_one_vmodel(instance: Instance) -> None:
    assert predict(instance, ids("alias")) == "of-alias"
    assert predict(instance, encoded("alias")) == "of-alias"
    assert predict(instance, encoded("øther/älias")) == "of-øther"
    both = [*ids("alias"), ("mm-vmodel-id-bin", b"\xff is not even looked at")]
    assert predict(instance, both) == "of-alias"


def test_several_vmodels(instance: Instance) -> None:
    assert multi_predict(instance, encoded(*ALIASES)) == sorted(ALIASES.values())
    assert multi_predict(instance, ids("alias", "unknown")) == ["of-alias"]
    any_of_them = [*ids("alias", "unknown"), ("mm-required", "any")]
    assert multi_predict(instance, any_of_them) == ["of-alias"]
    all_of_them = [*ids("alias", "unknown"), ("mm-required", "aLL")]
    refused = refusal(partial(multi_predict, instance, all_of_them))
    assert refused == (Code.NOT_FOUND, "vmodel not found")
    refused = refusal(partial(multi_predict, instance, ids("unknown", "unknown-too")))
    assert refused == (Code.NOT_FOUND, "none of the requested models were found")


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ([*ids("alias"), ("mm-model-id", "echo")], "must include only one of model id and vmodel"),
        (
            [*encoded("alias"), ("mm-model-id-bin", b"echo")],
            "must include only one of model id and vmodel",
        ),
        ([*ids("alias"), *ids("")], "provided vmodel-id header must be non-empty"),
        (encoded(""), "provided vmodel-id header must be non-empty"),
        ([("mm-vmodel-id-bin", b"\xff")], "header mm-vmodel-id-bin cannot be decoded"),
        (encoded("ø" * 2049), "an id has at most 4096 bytes, this one 4098"),
    ],
)
def test_bad_ids(instance: Instance, metadata: Metadata, text: str) -> None:
    code, found = refusal(partial(predict, instance, metadata))
    assert code == Code.INVALID_ARGUMENT
    assert found.startswith(text)


def test_a_vmodel_without_its_model(pair: Pair, keys: Keys) -> None:
    """Nobody who goes by the API can make one; a store that was tampered with has it."""
    prefix = pair.mesh.prefix("vmodels")
    keys.put(prefix + "broken", json.dumps({"amid": "missing", "tmid": "missing"}))
    keys.put(prefix + "half", json.dumps({"amid": "missing", "tmid": "echo"}))
    expected = (Code.INTERNAL, "Target model missing of vmodel broken not found")
    for each in (pair.holder, pair.other):
        assert refusal(partial(predict, each, ids("broken"))) == expected
        assert refusal(partial(multi_predict, each, ids("alias", "broken"))) == expected
        assert predict(each, ids("half")) == "echo", "what it is to be is there already"
        assert multi_predict(each, ids("alias", "half")) == ["echo", "of-alias"]
    for name in ("broken", "half"):
        keys.delete(prefix + name)


# --- switches -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Caller:
    """Calls one vmodel at one instance all the time; remembers when, and who answered."""

    instance: Instance
    vmodel_id: str
    answers: list[tuple[float, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    #: From when on this instance knew of a model.
    known_s: list[tuple[float, int]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def has_answers(self, count: int) -> bool:
        """Whether there are more than these, or will be no more."""
        return len(self.answers) > count or bool(self.failures)

    def has_called_since(self, known_s: float) -> bool:
        """Whether a call that began later was answered, or none will be."""
        return any(began_s > known_s for began_s, _ in self.answers) or bool(self.failures)

    def knows(self, target: str) -> bool:
        """Whether its instance has heard of a switch."""
        return active_model(self.instance, self.vmodel_id) == target

    def run(self) -> None:
        while not self.stopping.is_set():
            began_s = time.monotonic()
            try:
                model_id = predict(self.instance, ids(self.vmodel_id))
            except grpc.RpcError as exc:
                self.failures.append(f"{exc.code()}: {exc.details()}")
            else:
                self.answers.append((began_s, int(model_id.rpartition("-")[2])))

    def check(self) -> None:
        """No call failed, and none that began when a switch was known went to the old model."""
        assert self.failures == []
        for known_s, number in self.known_s:
            late = [found for began_s, found in self.answers if began_s > known_s]
            assert late, "it went on calling"
            assert min(late) >= number


def test_no_call_fails_or_is_late_because_of_a_switch(pair: Pair) -> None:
    """The old model goes in the same transaction, and its copy with it, while calls are under way
    to it; the new one has to be loaded by them.
    """
    set_vmodel(pair.holder, "switching", "version-0")
    callers = [Caller(each, "switching") for each in (pair.holder, pair.other) for _ in range(2)]
    threads = [threading.Thread(target=caller.run) for caller in callers]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 7):
            counts = [len(caller.answers) for caller in callers]
            for caller, count in zip(callers, counts, strict=True):
                eventually(partial(caller.has_answers, count + 3))
            target = f"version-{number}"
            set_vmodel((pair.holder, pair.other)[number % 2], "switching", target, force=True)
            for caller in callers:
                eventually(partial(caller.knows, target))
                caller.known_s.append((time.monotonic(), number))
        for caller in callers:
            eventually(partial(caller.has_called_since, caller.known_s[-1][0]))
    finally:
        for caller in callers:
            caller.stopping.set()
        for thread in threads:
            thread.join()
    for caller in callers:
        caller.check()
    delete_vmodel(pair.other, "switching")
    for number in range(7):
        assert pair.other.status(f"version-{number}").status == 0, "nobody refers to it any more"
