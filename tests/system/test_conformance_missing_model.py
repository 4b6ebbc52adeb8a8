"""The runtime loses a model behind the mesh's back (around 22.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest

from mm.pb import mmesh
from tests.system.meshes import CALL_TIMEOUT_S, Instance, channel_to, mesh_of
from tests.system.processes import eventually

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


def forget(instance: Instance, model_id: str) -> None:
    """Have the runtime unload a model behind the mesh's back."""
    with channel_to(int(instance.settings["INTERNAL_GRPC_PORT"])) as runtime:
        unload = runtime.unary_unary(
            "/mmesh.ModelRuntime/unloadModel",
            request_serializer=bytes,
            response_deserializer=mmesh.UnloadModelResponse.parse,
        )
        request = mmesh.UnloadModelRequest(model_id=model_id)
        code = unload.future(request, timeout=CALL_TIMEOUT_S).code()
        # Some variants unload it and say that there was nothing to unload.
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize("variant", VARIANTS)
def test_handle_missing_model(variant: str, instances: dict[str, Instance]) -> None:
    instance = instances[variant]
    status = instance.register("m", "SIZE_1000000_10_0", load_now=True, sync=True)
    assert status.status == mmesh.ModelStatusInfoModelStatus.LOADED
    instance.predict("m")
    for _ in range(2):
        forget(instance, "m")
        reply = instance.predict("m", "again")
        assert reply.results[0].category == "classification for again by model m"


def test_calls_too_large_to_be_sent_again_have_the_model_brought_back(
    instances: dict[str, Instance],
) -> None:
    """The first hears that it is lost; were that all, so would every other."""
    instance = instances["plain"]
    instance.register("large", "SIZE_1000000_10_0", load_now=True, sync=True)
    text = "x" * 2**21
    instance.predict("large", text)
    forget(instance, "large")
    with pytest.raises(grpc.RpcError) as caught:
        instance.predict("large", text)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    def answers() -> bool:
        code = instance.predict_later("large", text).code()
        # That it is lost may not have been heard yet.
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND)
        return bool(code is grpc.StatusCode.OK)

    eventually(answers)
