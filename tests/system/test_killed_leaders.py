"""The leader is killed at each step of a transition that etcd sees: the next one ends it, and no
call fails (spec core 6.5). Each step of the leader itself: ``tests/mesh/test_killed_leader.py``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress

import grpc
import pytest

from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, mesh_of, record_of
from tests.system.processes import eventually
from tests.system.test_transitions import calling, has_answered, set_target

pytestmark = pytest.mark.system

NAME = "blue-green"
#: A set, two copies that are registered and become ready, and the switch are fewer.
STEPS_MAX = 20


class Killer:
    """Kills the leader when the records of one transition have changed so many times."""

    def __init__(self, mesh: Mesh, keys: Keys, leader: Instance, target: str, step: int) -> None:
        self._keys, self._leader, self._step = keys, leader, step
        self._record = mesh.prefix("instances") + leader.instance_id
        self._names = {f"vmodels/{NAME}", f"registry/{target}"}
        self._root = mesh.prefix("vmodels").removesuffix("vmodels/")
        self._following = keys.follow(self._root)
        self.has_killed = False
        #: Each state of the vmodel, from the one before.
        self.actives: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        passed = 0
        with suppress(grpc.RpcError):  # cancelled
            for name, value, is_change in self._following:
                if name == f"vmodels/{NAME}" and value is not None:
                    self.actives.append(json.loads(value)["amid"])
                passed += is_change and name in self._names
                if passed == self._step and not self.has_killed:
                    self.has_killed = True
                    self._leader.kill()
                    # As if it had run out: nobody is to wait for that.
                    self._keys.revoke(self._keys.lease_of(self._record))

    def end(self) -> None:
        """Look on no longer."""
        self._following.cancel()
        self._thread.join()


def test_the_leader_is_killed_at_each_step(
    dataplane: str, kv_store: str, keys: Keys, new_service_name: Callable[[], str]
) -> None:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        # Whoever stands longest leads; clients call the others.
        alive = [mesh.add("i0"), mesh.add("i1"), mesh.add("i2")]
        set_target(alive[1], "model-0")
        for each in alive[1:]:
            each.load_here("model-0")
        for step in range(1, STEPS_MAX):
            target = f"model-{step}"
            if not _switches_though(mesh, keys, alive, target, step):
                break
            alive = [*alive[1:], mesh.add(f"i{step + 2}")]
        assert 4 < step < STEPS_MAX - 1, "a set, a copy that is loading, then ready, and a switch"


def _switches_though(mesh: Mesh, keys: Keys, alive: list[Instance], target: str, step: int) -> bool:
    """Switch, the first instance being killed meanwhile; answers whether it was."""
    before = f"model-{step - 1}"
    killer = Killer(mesh, keys, alive[0], target, step)
    try:
        with calling(*alive[1:]) as callers:
            request = mmesh.SetVModelRequest(
                v_model_id=NAME,
                target_model_id=target,
                model_info=mmesh.ModelInfo(type="example", path="SIZE_1000000_100_10"),
                auto_delete_target_model=True,
                load_now=True,
            )
            alive[1].call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)
            for each in callers:
                eventually(lambda of=each: bool(of.failures) or has_answered(of, target))
    finally:
        killer.end()
    for each in callers:
        assert not each.failures, (step, each.failures[:3])
    changes = [
        after
        for past, after in zip(killer.actives, killer.actives[1:], strict=False)
        if past != after
    ]
    assert changes in ([target], []), (step, killer.actives)
    records = keys.wait(mesh.prefix("registry"), lambda found: before not in found)
    assert record_of(records, target)["refs"] == 1, (step, records[target])
    return killer.has_killed
