"""A vmodel whose model is exchanged again and again under calls (spec core 6.5, 2.15).

No call may fail because of a switch, and a second after one has ended no call is answered by the
model of before, at no instance; the leader dies in the middle of one. (The second is that of an
instance that is told: one whose watch has gone silent notices that after ten,
``tests/edge/test_etcd_watch.py``.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import grpc
import pytest

from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.meshes import Instance, mesh_of
from tests.system.processes import eventually
from tests.system.yardstick import yardstick_of

pytestmark = pytest.mark.system

SWITCHES = 20
#: Of these many the first is the leader, until it is killed.
KILLED_AT = 8
#: The lease runs out, and another one leads; much longer on a slow machine.
LEASE_S = 8
SWITCH_TIMEOUT_S = 60.0
#: Between two calls of one client: they are to meet every switch, not to keep the machine busy.
PAUSE_S = 0.01
#: Nobody calls the model of before for longer than this, beside what the machine takes for itself.
OLD_S_MAX = 1.0
HEADER = [("mm-vmodel-id", "blue-green")]
ANSWER = "classification for hello by model "


@dataclass(slots=True)
class Caller:
    """One client that calls the vmodel at one instance all the time."""

    instance: Instance
    stopping: threading.Event = field(default_factory=threading.Event)
    #: When it began, and which model answered.
    answers: list[tuple[float, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        while not self.stopping.wait(PAUSE_S):
            began_s = time.monotonic()
            try:
                reply = self.instance.predict("", metadata=HEADER, timeout_s=30.0)
            except grpc.RpcError as exc:
                self.failures.append(str(exc))
                continue
            category = reply.results[0].category
            assert category.startswith(ANSWER), category
            self.answers.append((began_s, category.removeprefix(ANSWER)))


@contextmanager
def calling(*instances: Instance) -> Iterator[list[Caller]]:
    callers = [Caller(each) for each in instances]
    threads = [threading.Thread(target=each.run) for each in callers]
    for thread in threads:
        thread.start()
    try:
        yield callers
    finally:
        for caller in callers:
            caller.stopping.set()
        for thread in threads:
            thread.join()


def set_target(instance: Instance, target: str) -> None:
    """Return when the target is active."""
    reply = instance.call(
        "/mmesh.ModelMesh/setVModel",
        mmesh.SetVModelRequest(
            v_model_id="blue-green",
            target_model_id=target,
            model_info=mmesh.ModelInfo(type="example", path="SIZE_1000000_100_10"),
            auto_delete_target_model=True,
            load_now=True,
            sync=True,
        ),
        mmesh.VModelStatusInfo,
        timeout_s=SWITCH_TIMEOUT_S,
    )
    assert isinstance(reply, mmesh.VModelStatusInfo)
    assert (reply.active_model_id, reply.target_model_id) == (target, target), reply


def test_twenty_switches_under_calls(
    dataplane: str, kv_store: str, keys: Keys, new_service_name: Callable[[], str]
) -> None:
    with (
        mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh,
        yardstick_of(keys) as yardstick,
    ):
        mesh.limits = {"lease_ttl_s": LEASE_S}
        # Whoever stands first leads, and is not called by clients: its end would be theirs.
        leader = mesh.add("first")
        others = [mesh.add("second"), mesh.add("third")]
        leader.serve.wait_line("is the leader")
        set_target(others[0], "model-0")
        ended: list[tuple[float, str]] = []
        with calling(*others) as callers:
            for number in range(1, SWITCHES + 1):
                target = f"model-{number}"
                if number == KILLED_AT:
                    kill = threading.Timer(0.05, leader.kill)
                    kill.start()
                set_target(others[number % 2], target)
                ended.append((time.monotonic(), target))
            for each in callers:
                eventually(partial(has_answered, each, target))
        for caller in callers:
            assert not caller.failures, caller.failures[:3]
            for began_s, model in caller.answers:
                for ended_s, target in ended:
                    if began_s > ended_s and number_of(model) < number_of(target):
                        yardstick.check(ended_s, began_s, OLD_S_MAX, f"{model} after {target}")
            assert len({model for _, model in caller.answers}) > SWITCHES // 2


def has_answered(caller: Caller, model: str) -> bool:
    return bool(caller.answers) and caller.answers[-1][1] == model


def number_of(model: str) -> int:
    return int(model.removeprefix("model-"))
