"""Instances that are told to stop hand over what they have: ``testModelMigration`` (around 22.3).

With clients that never stop calling, which the Java test has not: at an instance that stays, and at
each that stops, as long as it listens. Those have a second address, as clients in a cluster have,
and no retries of their own: no call may fail, and none may wait for a load.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from mm.limits import Limits
from mm.pb import mmesh
from tests.system.callers import Caller, wait_calls
from tests.system.meshes import Instance, Mesh, mesh_of

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
MODELS = [f"migrate-{number}" for number in range(10)]
#: Many calls come in the time of a load: if they had to wait for it, some would.
PATH = "SIZE_1000000_500_0"
LEAVING = ("one", "two", "three")
STAYING = ("four", "five")
#: Far above what it takes, below the time limit of the stop and the kill after it.
STOP_S = 60.0
#: However soon all have moved, new connections are taken for so long.
LISTENS_S = Limits().stop_listens_s


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    # Copies come by the drain alone.
    settings = {"MM_DATAPLANE": dataplane, "MM_SCALEUP_RPM_THRESHOLD": "1000000"}
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        mesh.add_all(*LEAVING, *STAYING)
        yield mesh


def check_none_waited(mesh: Mesh, instance: Instance) -> None:
    """No call waited for a load; a machine that stood still for seconds proves nothing."""
    is_excused = any("does not answer" in each.serve.output() for each in mesh.instances)
    assert is_excused or instance.statistics().misses == 0


def stop(mesh: Mesh, leaver: Instance) -> None:
    """SIGTERM; all models that it has move."""
    check_none_waited(mesh, leaver)
    signalled_s = time.monotonic()
    leaver.serve.process.send_signal(signal.SIGTERM)
    assert leaver.serve.wait_end(STOP_S) == 0
    assert leaver.serve.ended_s - signalled_s >= LISTENS_S
    told = re.search(r"(\d+) of (\d+) models have moved", leaver.serve.output())
    assert told is not None, leaver.serve.output()
    assert told[1] == told[2], told[0]


def test_model_migration(mesh: Mesh) -> None:
    stays = mesh.instances[-1]
    for number, model_id in enumerate(MODELS):
        mesh[number % 3].register(model_id, PATH)
        mesh[number % 3].load_here(model_id)
    leavers = mesh.instances[:3]
    callers = [Caller(MODELS, stays), *(Caller(MODELS, each, stays) for each in leavers)]
    with ExitStack() as stack:
        for caller in callers:
            caller.start()
            stack.callback(caller.end)
        wait_calls(callers)
        for leaver in leavers:
            stop(mesh, leaver)
        wait_calls(callers)
    assert [caller.failures for caller in callers] == [[]] * len(callers)
    for instance in mesh.instances[3:]:
        check_none_waited(mesh, instance)
    for model_id in MODELS:
        info = stays.status(model_id)
        assert info.status == Status.LOADED
        assert {copy.location for copy in info.model_copy_infos} <= set(STAYING)
