"""Conformance with the Java mesh: second copies of what is in recurring use (around 22.3), and in
what order copies are told (around 5).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from mm.pb import mmesh
from tests.system.meshes import Instance, Mesh, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
AGE_MIN_S = 3
AGE_MAX_S = 6
#: Instances look at calls each 0.4 s.
LOOK_S = 1.0
#: Calls a minute make no copies here.
SETTINGS = {
    "MM_SCALEUP_RPM_THRESHOLD": "1000000",
    "MM_MIN_SECOND_COPY_AGE_SECS": str(AGE_MIN_S),
    "MM_MAX_SECOND_COPY_AGE_SECS": str(AGE_MAX_S),
}


@pytest.fixture(scope="module")
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane, **SETTINGS}, new_service_name()) as mesh:
        mesh.add_all("one", "two", "three")
        yield mesh


def locations(mesh: Mesh, model_id: str) -> set[str]:
    infos = mesh[0].status(model_id).model_copy_infos
    return {info.location for info in infos if info.copy_status == Status.LOADED}


def use_at_one_time(mesh: Mesh) -> str:
    """Answer a model that was called three times within a moment; not if the machine stood still
    meanwhile.
    """
    for number in range(20):
        model_id = f"recurring-{number}"
        begun_s = time.monotonic()
        mesh[0].register(model_id, "SIZE_1000000_20_0", load_now=True, sync=True)
        for _ in range(3):
            mesh[1].predict(model_id)
        if time.monotonic() - begun_s < AGE_MIN_S - LOOK_S:
            return model_id
    raise AssertionError("three calls always take seconds")


def wait_until(time_s: float) -> None:
    eventually(lambda: time.monotonic() > time_s, what=f"it is {time_s:.1f}")


def test_second_copy_trigger(mesh: Mesh) -> None:
    """Uses at one time leave it at one copy, and so does one more when they are long forgotten;
    then another one, as far from that as the settings say, makes it two.
    """
    model_id = use_at_one_time(mesh)
    assert len(locations(mesh, model_id)) == 1
    wait_until(time.monotonic() + AGE_MAX_S + LOOK_S)
    used_s = time.monotonic()
    mesh[1].predict(model_id)
    wait_until(time.monotonic() + LOOK_S)
    assert len(locations(mesh, model_id)) == 1

    def is_twice_when_used_again() -> bool:
        mesh[1].predict(model_id)
        return len(locations(mesh, model_id)) == 2

    eventually(is_twice_when_used_again, what="there is a second copy")
    assert time.monotonic() - used_s >= AGE_MIN_S
    holders = [each for each in mesh.instances if each.instance_id in locations(mesh, model_id)]
    assert len(holders) == 2
    for holder in holders:
        before = holder.statistics().calls
        assert holder.predict(model_id).results[0].confidence == 1.0
        assert holder.statistics().calls > before


def test_copies_are_told_newest_first(mesh: Mesh) -> None:
    """By every instance, whichever holds them, in the order in which their loads began."""
    mesh[0].register("ordered", "SIZE_1000000_10_0")
    one, two, three = mesh.instances
    loaded = [two, three, one]
    begun_ms = []
    for instance in loaded:
        begun_ms.append(time.time() * 1000)
        instance.load_here("ordered")
    newest_first = [each.instance_id for each in reversed(loaded)]

    def told(instance: Instance) -> list[str]:
        infos = instance.status("ordered").model_copy_infos
        return [c.location for c in infos if c.copy_status == Status.LOADED]

    eventually(lambda: all(told(each) == newest_first for each in mesh.instances))
    infos = one.status("ordered").model_copy_infos
    assert [c.time for c in infos] == sorted((c.time for c in infos), reverse=True)
    for info, begun in zip(infos, reversed(begun_ms), strict=True):
        assert begun - 1 <= info.time <= time.time() * 1000, "milliseconds of the load's begin"
