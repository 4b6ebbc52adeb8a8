"""Conformance with the Java mesh: the second copy of what is in recurring use (around 22.3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from mm.pb import mmesh
from tests.system.meshes import Mesh, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
AGE_MIN_S = 4
#: Calls a minute make no copies here.
SETTINGS = {
    "MM_SCALEUP_RPM_THRESHOLD": "1000000",
    "MM_MIN_SECOND_COPY_AGE_SECS": str(AGE_MIN_S),
    "MM_MAX_SECOND_COPY_AGE_SECS": "60",
}


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane, **SETTINGS}, new_service_name()) as mesh:
        mesh.add_all("one", "two", "three")
        yield mesh


def locations(mesh: Mesh) -> set[str]:
    infos = mesh[0].status("recurring").model_copy_infos
    return {info.location for info in infos if info.copy_status == Status.LOADED}


def test_second_copy_trigger(mesh: Mesh) -> None:
    """Uses at one time leave it at one copy; one more use, long enough after, makes it two."""
    begun_s = time.monotonic()
    mesh[0].register("recurring", "SIZE_1000000_20_0", load_now=True, sync=True)
    for _ in range(3):
        mesh[1].predict("recurring")
        copies_count = len(locations(mesh))
        if time.monotonic() - begun_s < AGE_MIN_S:  # a machine that stood still proves nothing
            assert copies_count == 1

    def is_twice_when_used_again() -> bool:
        mesh[1].predict("recurring")
        return len(locations(mesh)) == 2

    eventually(is_twice_when_used_again, what="there is a second copy")
    assert time.monotonic() - begun_s >= AGE_MIN_S
    holders = [each for each in mesh.instances if each.instance_id in locations(mesh)]
    assert len(holders) == 2
    for holder in holders:
        before = holder.statistics().calls
        assert holder.predict("recurring").results[0].confidence == 1.0
        assert holder.statistics().calls > before
