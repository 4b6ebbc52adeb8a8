"""An instance that freezes (SIGSTOP) while it has calls: connections stand, nothing answers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from mm.pb import mmesh
from tests.system.meshes import CALL_TIMEOUT_S, Mesh, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system
LOADED = mmesh.ModelStatusInfoModelStatus.LOADED
SIZE = "SIZE_1000000_10_0"
#: For calls that have nothing to do with the frozen one; a busy machine takes a part of it.
SOON_S = 5.0
#: So many calls at once that one of two idle copies gets none of them in one of a million runs.
CALLS = 21


@pytest.fixture(scope="module")
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.add_all("caller", "frozen", "other")
        yield mesh


def test_no_call_is_lost_and_new_ones_go_elsewhere_until_it_answers(mesh: Mesh) -> None:
    caller, frozen, other = mesh.instances
    caller.register("shared", SIZE)
    for each in (frozen, other):
        each.load_here("shared")

    def both_ready() -> bool:
        copies = caller.status("shared").model_copy_infos
        return [copy.copy_status for copy in copies] == [LOADED, LOADED]

    eventually(both_ready)
    frozen.serve.process.send_signal(signal.SIGSTOP)
    try:
        stuck = [caller.predict_later("shared", "hello") for _ in range(CALLS)]
        caller.serve.wait_line("instance frozen does not answer: calls go elsewhere")
        for _ in range(CALLS):
            caller.predict("shared", timeout_s=SOON_S)
        for call in stuck:
            assert call.result(timeout=CALL_TIMEOUT_S).results[0].confidence == 1.0
    finally:
        frozen.serve.process.send_signal(signal.SIGCONT)
    before = frozen.statistics().calls

    def is_called_again() -> bool:
        caller.predict("shared", timeout_s=SOON_S)
        return frozen.statistics().calls > before

    eventually(is_called_again)
