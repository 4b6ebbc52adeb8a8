"""A runtime that freezes (SIGSTOP): its connections stand, and whatever is asked of it waits."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import grpc
import pytest

from tests.system.meshes import CALL_TIMEOUT_S, mesh_of
from tests.system.processes import eventually

pytestmark = pytest.mark.system
SIZE = "SIZE_1000000_10_0"


def test_time_is_up_when_it_is_and_all_is_well_afterwards(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> None:
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        only = mesh.add("only")
        only.register("m", SIZE, load_now=True, sync=True)
        only.predict("m")
        assert only.runtime is not None
        process = only.runtime.process
        process.send_signal(signal.SIGSTOP)
        try:
            patient = only.predict_later("m", "hello")
            only.wait_in_flight(1)
            began_s = time.monotonic()
            with pytest.raises(grpc.RpcError) as refused:
                only.predict("m", timeout_s=0.5)
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - began_s < CALL_TIMEOUT_S
        finally:
            process.send_signal(signal.SIGCONT)
        assert patient.result(timeout=CALL_TIMEOUT_S).results[0].confidence == 1.0
        only.predict("m")
        eventually(lambda: only.statistics().models_loaded == 1)
