"""The runtime loses a model behind the mesh's back (around 22.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest

from mm.pb import mmesh
from tests.system.meshes import CALL_TIMEOUT_S, Instance, channel_to, mesh_of

pytestmark = pytest.mark.system

VARIANTS: dict[str, tuple[Sequence[str], dict[str, str]]] = {
    "plain": (["0"], {}),
    "triton": (["0"], {"TRITON_NOT_FOUND_BEHAVIOUR": "true"}),
    "mlserver": (["0"], {"MLSERVER_NOT_FOUND_BEHAVIOUR": "true"}),
    "separate serving port": (["0,0"], {}),
    "separate, unload says not found": (["0,0"], {"UNLOAD_RETURN_NOT_FOUND": "true"}),
    "unload says not found": (["0"], {"UNLOAD_RETURN_NOT_FOUND": "true"}),
}


@pytest.fixture(scope="module")
def instances(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str]
) -> Iterator[dict[str, Instance]]:
    """One instance for each variant, which do not know each other; started at the same time."""
    with ExitStack() as stack, ThreadPoolExecutor(len(VARIANTS)) as pool:

        def start(variant: str) -> Instance:
            place, switches = VARIANTS[variant]
            mesh = mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name())
            return stack.enter_context(mesh).add("only", place, switches)

        yield dict(zip(VARIANTS, pool.map(start, VARIANTS), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_handle_missing_model(variant: str, instances: dict[str, Instance]) -> None:
    instance = instances[variant]
    status = instance.register("m", "SIZE_1000000_10_0", load_now=True, sync=True)
    assert status.status == mmesh.ModelStatusInfoModelStatus.LOADED
    instance.predict("m")
    port = int(instance.settings["INTERNAL_GRPC_PORT"])
    with channel_to(port) as runtime:
        unload = runtime.unary_unary(
            "/mmesh.ModelRuntime/unloadModel",
            request_serializer=bytes,
            response_deserializer=mmesh.UnloadModelResponse.parse,
        )
        for _ in range(2):
            # Some variants unload it and say that there was nothing to unload.
            code = unload.future(
                mmesh.UnloadModelRequest(model_id="m"), timeout=CALL_TIMEOUT_S
            ).code()
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND)
            reply = instance.predict("m", "again")
            assert reply.results[0].category == "classification for again by model m"
