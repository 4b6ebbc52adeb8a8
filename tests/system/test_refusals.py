"""What one instance refuses by its settings and limits, in real processes: churn, models, ids.

The churn guard (spec core 3.12), `MM_MAX_MODELS`, the longest id, the watches of one connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import grpc
import pytest

from mm.limits import Limits
from mm.mesh.watches import WATCHES_OF_CLIENT_MAX
from mm.pb import mmesh
from tests.system.meshes import Instance, Mesh, channel_to, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

MIB = 2**20
#: Room for ten models of 20 MiB, and a reserve of a tenth.
ROOM = 10
RUNTIME_ARGS = ["--capacity", str(28_445 * 8192), "--default-size", str(20 * MIB)]
PATH = f"SIZE_{20 * MIB}_5_80"
#: The one that churns, and the one with the long id.
MODELS_MAX = ROOM + 2
CHURN_AGE_S = 3600
CALLS = 150
LONGEST_ID = "x" * Limits().id_bytes_max


@pytest.fixture(scope="module")
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    """One instance, full of models that were used just now."""
    settings = {
        "MM_DATAPLANE": dataplane,
        "MM_MIN_CHURN_AGE_MS": f"{CHURN_AGE_S * 1000}",
        "MM_MAX_MODELS": f"{MODELS_MAX}",
    }
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        mesh.add("alone", runtime_args=RUNTIME_ARGS)
        for number in range(ROOM):
            mesh[0].register(f"used-{number}", PATH, load_now=True, sync=True)
        mesh[0].register("new", PATH)
        mesh[0].register(LONGEST_ID, PATH)
        yield mesh


@pytest.fixture
def instance(mesh: Mesh) -> Iterator[Instance]:
    yield mesh[0]
    # Whatever was refused, what is loaded serves.
    assert mesh[0].predict("used-0").results


def test_the_churn_guard_refuses_with_a_pause_and_little_noise(instance: Instance) -> None:
    lines, begun_s = instance.serve.lines, time.monotonic()
    first = len(lines)
    for _ in range(CALLS):
        with pytest.raises(grpc.RpcError) as caught:
            instance.predict("new")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "Cache churn threshold exceeded"
        pushback_ms = dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
        assert 0 < int(pushback_ms) <= 1000 * CHURN_AGE_S
    took_s = time.monotonic() - begun_s
    assert instance.statistics().loads_churned == CALLS

    def told() -> list[str]:
        return [line for line in lines[first:] if "MM_MIN_CHURN_AGE_MS" in line]

    assert eventually(told, what="a line about churn")
    assert len(told()) <= 1 + took_s
    assert instance.status("used-0").status.name == "LOADED"


def test_more_models_than_allowed_are_refused_with_the_way_out(instance: Instance) -> None:
    code, text = refusal(partial(instance.register, "one-too-many", PATH))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"the limit is {MODELS_MAX}" in text
    assert "MM_MAX_MODELS" in text
    assert instance.register("new", PATH).status.name in ("NOT_LOADED", "LOADING_FAILED")
    assert instance.status("one-too-many").status.name == "NOT_FOUND"


def test_ids_longer_than_4_kib_are_refused_with_the_limit(instance: Instance) -> None:
    too_long = LONGEST_ID + "x"
    for call in (
        partial(instance.register, too_long, PATH),
        partial(instance.status, too_long),
        partial(instance.ensure_loaded, too_long),
        partial(instance.predict, too_long),
    ):
        code, text = refusal(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "4096" in text, text
    # The longest that is allowed is as good as any: it is known, and only churn is in its way.
    code, text = refusal(partial(instance.predict, LONGEST_ID))
    assert (code, text) == (grpc.StatusCode.UNAVAILABLE, "Cache churn threshold exceeded")


def test_a_connection_has_its_share_of_watches_and_no_more(instance: Instance) -> None:
    """On the wire, too, where all clients share the connections to what serves watches."""
    request = bytes(mmesh.WatchRequest(id="used-0"))
    with closing(channel_to(instance.port)) as greedy, closing(channel_to(instance.port)) as other:

        def watch(channel: grpc.Channel) -> Any:
            call = channel.unary_stream("/mmesh.ModelMesh/watchModels")(request, timeout=60)
            call.initial_metadata()  # sent when the watch is there, or is refused
            return call

        watches = [watch(greedy) for _ in range(WATCHES_OF_CLIENT_MAX)]
        for _ in range(2):
            # A word that only the wire may say does not help.
            forged = (("mm-wire-client", "1-1"),)
            more = greedy.unary_stream("/mmesh.ModelMesh/watchModels")(
                request, metadata=forged, timeout=60
            )
            status, text = refusal(partial(next, more))
            assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert text == f"this connection has {WATCHES_OF_CLIENT_MAX} watches open, the limit"
        assert watch(other).is_active()
        watches.pop().cancel()
        eventually(lambda: watch(greedy).is_active(), what="the place of one that left")
        assert all(each.is_active() for each in watches)
