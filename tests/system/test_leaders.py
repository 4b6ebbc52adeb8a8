"""The leader is killed, and the next one freezes: the third leads, and does what leaders do."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.system.etcd import Keys, Records
from tests.system.meshes import Instance, Mesh, mesh_of, record_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system

LEASE_TTL_S = 4
#: What an instance left is pruned, and what only it had is loaded elsewhere, so long after it.
GONE_AFTER_S = 8.0
LOST_AFTER_S = 1.0
#: etcd looks at leases twice a second, and the machine has other work.
LATE_S = 10.0
MODELS = [f"m{number}" for number in range(4)]
NAMES = ("one", "two", "three")


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        mesh.limits = {
            "lease_ttl_s": LEASE_TTL_S,
            "gone_after_s": GONE_AFTER_S,
            "mm.mesh.filler.LOST_AFTER_S": LOST_AFTER_S,
        }
        for name in NAMES:  # one after the other: who stands first leads first
            mesh.add(name)
        yield mesh


def leads(instance: Instance) -> bool:
    """Answer what it said last."""
    told = re.findall(r"instance \w+ (is|is not) the leader", instance.serve.output())
    return told[-1:] == ["is"]


def holders(records: Records, model_id: str) -> set[str]:
    return set(record_of(records, model_id).get("instanceIds", ()))


def test_another_leads_and_does_what_leaders_do(mesh: Mesh, keys: Keys) -> None:
    one, two, three = mesh.instances
    assert leads(one)
    for model_id in MODELS:
        one.register(model_id, "SIZE_1000000_10_0", last_used_ms=int(time.time() * 1000))
        one.load_here(model_id)

    one.kill()
    killed_s = time.monotonic()
    eventually(lambda: leads(two), what="the next one leads")
    assert time.monotonic() - killed_s < LEASE_TTL_S + LATE_S
    # Nobody calls them: the new leader has them loaded, and prunes what the dead one left.
    keys.wait(
        mesh.prefix("registry"),
        lambda records: all(
            holders(records, m) and holders(records, m) <= {"two", "three"} for m in MODELS
        ),
    )

    two.serve.process.send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: leads(three), what="the third leads")
        keys.wait(mesh.prefix("instances"), lambda records: set(records) == {"three"})
    finally:
        two.serve.process.send_signal(signal.SIGCONT)
    keys.wait(mesh.prefix("instances"), lambda records: set(records) == {"two", "three"})
    eventually(lambda: not leads(two), what="it knows that it leads no more")
    assert leads(three)
    for instance in (two, three):
        for model_id in MODELS:
            instance.predict(model_id)
        assert "Traceback" not in instance.serve.output()
