"""Ids in messages, injected and extracted, and which methods are let through (around 22.5, 7)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import grpc
import pytest

from mm.pb import mmesh
from mm.pb.mm.testing import EchoRequest, EchoResponse
from tests.system.meshes import CALL_TIMEOUT_S, Instance, Mesh, mesh_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

PREDICT = "mmesh.ExamplePredictor/predict"
MULTI_PREDICT = "mmesh.ExamplePredictor/multiPredict"
NO_ID = "must include mm-model-id header"
SIZE = "SIZE_1000000_10_0"

NewMesh = Callable[[dict[str, str]], AbstractContextManager[Mesh]]


@pytest.fixture(scope="module")
def new_mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> NewMesh:
    def make(settings: dict[str, str]) -> AbstractContextManager[Mesh]:
        return mesh_of(kv_store, {"MM_DATAPLANE": dataplane, **settings}, new_service_name())

    return make


def start(mesh: Mesh, runtime_settings: dict[str, str]) -> Instance:
    instance = mesh.add("only", runtime_settings=runtime_settings)
    instance.register("injected", SIZE, load_now=True)
    return instance


def seen_name(instance: Instance, **options: object) -> str:
    """The model name that was in the message when it reached the runtime."""
    reply = instance.predict("injected", **options)  # type: ignore[arg-type]
    assert reply.results[0].category == "classification for hello by model injected"
    return reply.results[1].category


def seen_name_of_many(instance: Instance, model_name: str) -> str:
    reply = instance.call(
        f"/{MULTI_PREDICT}",
        mmesh.PredictRequest(text="hello", model_name=model_name),
        mmesh.MultiPredictResponse,
        [("mm-model-id", "injected")],
    )
    return str(reply.per_model_results["injected"].results[1].category)


class TestOnlyListed:
    """ModelMeshIdInjectTest: the runtime lists one method, with a path."""

    @pytest.fixture(scope="class")
    @classmethod
    def instance(cls, new_mesh: NewMesh) -> Iterator[Instance]:
        with new_mesh({}) as mesh:
            yield start(mesh, {"RS_METHOD_INFOS": f"{PREDICT}=1"})

    @pytest.mark.parametrize("name", ["", "injected", "other", "x" * 200])
    def test_id_injection(self, instance: Instance, name: str) -> None:
        assert seen_name(instance, model_name=name) == "injected"

    def test_no_header(self, instance: Instance) -> None:
        code, text = refusal(partial(instance.predict, "injected", metadata=[]))
        assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, NO_ID)

    def test_method_that_is_not_listed(self, instance: Instance) -> None:
        code, text = refusal(partial(seen_name_of_many, instance, ""))
        assert code == grpc.StatusCode.UNIMPLEMENTED
        assert text == f"Method not found or not permitted: {MULTI_PREDICT}"

    def test_large_message(self, instance: Instance) -> None:
        text = "z" * 5_000_000
        reply = instance.predict("injected", text, model_name="other")
        assert reply.results[0].category == f"classification for {text} by model injected"
        assert reply.results[1].category == "injected"

    def test_across_a_hop(self, new_mesh: NewMesh) -> None:
        """Who injects is the instance at the copy; the other one's runtime lists nothing."""
        with new_mesh({}) as mesh:
            holder = start(mesh, {"RS_METHOD_INFOS": f"{PREDICT}=1"})
            assert seen_name(holder, model_name="other") == "injected"
            other = mesh.add("without-infos")
            assert seen_name(other, model_name="other") == "injected"


class TestAllowed:
    """ModelMeshAllowAnyMethodTest and ModelMeshAllowWithNoInjectionTest."""

    PERMISSIONS: ClassVar = {
        "allow any": {"RS_METHOD_INFOS": f"{PREDICT}=1", "RS_ALLOW_ANY": "true"},
        "listed without a path": {"RS_METHOD_INFOS": f"{PREDICT}=1;{MULTI_PREDICT}="},
    }

    @pytest.fixture(scope="class", params=PERMISSIONS)
    @classmethod
    def instance(cls, request: pytest.FixtureRequest, new_mesh: NewMesh) -> Iterator[Instance]:
        with new_mesh({}) as mesh:
            yield start(mesh, cls.PERMISSIONS[request.param])

    def test_id_injection(self, instance: Instance) -> None:
        assert seen_name(instance, model_name="other") == "injected"
        assert seen_name_of_many(instance, "other") == "other"

    @pytest.mark.parametrize(
        "service", ["mmesh.ModelRuntime", "com.ibm.watson.tas.internal.proto.ModelServer"]
    )
    def test_prohibited_management_service(self, instance: Instance, service: str) -> None:
        unload = partial(
            instance.call,
            f"/{service}/unloadModel",
            mmesh.UnloadModelRequest(model_id="injected"),
            mmesh.UnloadModelResponse,
            [("mm-model-id", "injected")],
        )
        code, text = refusal(unload)
        assert code == grpc.StatusCode.UNIMPLEMENTED
        assert text == f"Method not found or not permitted: {service}/unloadModel"


class TestExtraction:
    """ModelMeshIdExtractTest: the id is in the message, the runtime has it injected, too."""

    @pytest.fixture(scope="class")
    @classmethod
    def instance(cls, new_mesh: NewMesh) -> Iterator[Instance]:
        dataplane = {
            "rpcConfigs": {PREDICT: {"idExtractionPath": [1]}},
            "allowOtherRpcs": True,
        }
        infos = {"RS_METHOD_INFOS": f"{PREDICT}=1;{MULTI_PREDICT}="}
        with new_mesh({"MM_DATAPLANE_CONFIG": json.dumps(dataplane)}) as mesh:
            yield start(mesh, infos)

    def test_header_only(self, instance: Instance) -> None:
        assert seen_name(instance) == "injected"

    def test_message_only(self, instance: Instance) -> None:
        assert seen_name(instance, model_name="injected", metadata=[]) == "injected"

    def test_message_beats_header(self, instance: Instance) -> None:
        bogus = [("mm-model-id", "bogus")]
        assert seen_name(instance, model_name="injected", metadata=bogus) == "injected"

    def test_other_method_by_header(self, instance: Instance) -> None:
        assert seen_name_of_many(instance, "") == ""

    def test_last_of_two_ids(self, instance: Instance) -> None:
        """What parsers take is the last one, so that decides, and the runtime sees no other."""
        request = bytes(mmesh.PredictRequest(text="hello", model_name="bogus")) + bytes(
            mmesh.PredictRequest(model_name="injected")
        )
        reply = instance.call(f"/{PREDICT}", request, mmesh.PredictResponse)
        assert reply.results[1].category == "injected"

    def test_no_id_anywhere(self, instance: Instance) -> None:
        refused = refusal(partial(instance.predict, "injected", metadata=[]))
        assert refused == (grpc.StatusCode.INVALID_ARGUMENT, NO_ID)

    def test_message_that_is_no_protobuf(self, instance: Instance) -> None:
        """Field 1 as a varint cannot be an id; whatever is said, it is no crash."""
        call = partial(instance.call, f"/{PREDICT}", b"\x08\x01", mmesh.PredictResponse)
        assert refusal(call)[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert seen_name(instance) == "injected"


def in_payload(model_id: str) -> EchoRequest:
    """An id at [2, 1]: a message with field 1 inside the field 2 of another."""
    return EchoRequest(payload=bytes(EchoRequest(model_name=model_id)))


#: A group of field 15 with an id of its own inside, which is not the message's.
GROUP = b"\x7b" + bytes(EchoRequest(model_name="bogus")) + b"\x7c"


class TestExtractionFromEveryMessage:
    """Nested ids, streams, compression, and messages that are wrong (around 7.3, 23)."""

    @pytest.fixture(scope="class")
    @classmethod
    def instance(cls, new_mesh: NewMesh) -> Iterator[Instance]:
        dataplane = {
            "rpcConfigs": {
                "mm.testing.Echo/unary": {"idExtractionPath": [2, 1]},
                "mm.testing.Echo/bidiStream": {"idExtractionPath": [1]},
            }
        }
        with new_mesh({"MM_DATAPLANE_CONFIG": json.dumps(dataplane)}) as mesh:
            instance = mesh.add("only")
            for model_id in ("first", "second"):
                instance.register(model_id, SIZE)
            yield instance

    @staticmethod
    def model_of(
        instance: Instance, request: EchoRequest | bytes, header: str = "", **options: object
    ) -> str:
        """Answer the model that a call of the unary method reached."""
        stub = instance.channel.unary_unary(
            "/mm.testing.Echo/unary",
            request_serializer=bytes,
            response_deserializer=EchoResponse.parse,
        )
        metadata = (("mm-model-id", header),) if header else ()
        reply = stub(request, metadata=metadata, timeout=CALL_TIMEOUT_S, **options)
        return str(reply.model_id)

    @pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
    def test_nested(self, instance: Instance, compression: grpc.Compression | None) -> None:
        found = partial(self.model_of, instance, compression=compression)
        assert found(in_payload("first"), header="second") == "first"
        # Protobuf merges messages that are there twice: the last id counts, wherever it stands.
        twice = bytes(in_payload("first")) + bytes(in_payload("second"))
        assert found(twice) == "second"
        assert found(bytes(in_payload("first")) + b"\x12\x00") == "first"
        assert found(EchoRequest(payload=b""), header="second") == "second"

    @pytest.mark.parametrize(
        ("request_", "text"),
        [
            (b"\x12\x02\x0a\x00", "provided model-id header must be non-empty"),
            (b"\x10\x01", "field 2 of the id path has wire type 0"),
            (b"\x13\x14", "field 2 of the id path has wire type 3"),
            (b"\x12\x02\x08\x01", "field 1 of the id path has wire type 0"),
            (b"\x12\x7f\x0a\x01a", "field 2 reaches beyond the end of its message"),
            (b"\x12\x03\x0a\x02a", "field 1 reaches beyond the end of its message"),
            (b"\x12\x03\x0a\x01\xff", "the id in the request message is not valid UTF-8"),
            (GROUP[:-1], "the request message is cut off"),
            (b"\xff" * 20, "a number in the request message is too long"),
            (GROUP, NO_ID),
            (b"", NO_ID),
        ],
    )
    def test_bad_messages(self, instance: Instance, request_: bytes, text: str) -> None:
        refused = refusal(partial(self.model_of, instance, request_))
        assert refused == (grpc.StatusCode.INVALID_ARGUMENT, text)
        assert self.model_of(instance, in_payload("first")) == "first"

    def test_the_first_message_of_a_stream_decides(self, instance: Instance) -> None:
        stub: Any = instance.channel.stream_stream(
            "/mm.testing.Echo/bidiStream",
            request_serializer=bytes,
            response_deserializer=EchoResponse.parse,
        )
        names = ["second", "first", "", "unknown"]
        requests = iter([EchoRequest(model_name=name, payload=b"p") for name in names])
        replies = list(stub(requests, metadata=(("mm-model-id", "first"),), timeout=CALL_TIMEOUT_S))
        assert [reply.model_id for reply in replies] == ["second"] * 4
        assert refusal(lambda: list(stub(iter([]), timeout=CALL_TIMEOUT_S))) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "Half-closed without a request",
        )

    def test_a_method_that_is_not_listed(self, instance: Instance) -> None:
        refused = refusal(partial(instance.predict, "first"))
        assert refused == (grpc.StatusCode.UNIMPLEMENTED, "")


def set_vmodel(instance: Instance, vmodel_id: str, target: str, owner: str = "") -> None:
    request = mmesh.SetVModelRequest(
        v_model_id=vmodel_id, target_model_id=target, owner=owner, sync=True
    )
    instance.call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)


class TestVModelExtraction:
    """ModelMeshVmIdExtractTest: the id in the message is a vmodel's; other methods are denied."""

    @pytest.fixture(scope="class")
    @classmethod
    def instance(cls, new_mesh: NewMesh) -> Iterator[Instance]:
        dataplane = {"rpcConfigs": {PREDICT: {"idExtractionPath": [1], "vModelId": True}}}
        with new_mesh({"MM_DATAPLANE_CONFIG": json.dumps(dataplane)}) as mesh:
            instance = start(mesh, {"RS_METHOD_INFOS": f"{PREDICT}=1"})
            set_vmodel(instance, "alias", "injected", owner="owner")
            yield instance

    def test_header(self, instance: Instance) -> None:
        header = [("mm-vmodel-id", "alias")]
        assert seen_name(instance, metadata=header) == "injected"

    def test_message(self, instance: Instance) -> None:
        assert seen_name(instance, model_name="alias", metadata=[]) == "injected"

    def test_model_id_in_the_message_is_no_vmodel(self, instance: Instance) -> None:
        refused = refusal(partial(instance.predict, "", model_name="injected", metadata=[]))
        assert refused == (grpc.StatusCode.NOT_FOUND, "vmodel not found")

    def test_other_method_is_denied(self, instance: Instance) -> None:
        code, text = refusal(partial(seen_name_of_many, instance, ""))
        assert (code, text) == (grpc.StatusCode.UNIMPLEMENTED, "")

    def test_vmodel_moves_on(self, instance: Instance) -> None:
        """A new active model takes over, the runtime sees its id."""
        instance.register("successor", SIZE, load_now=True, sync=True)

        def seen() -> str:
            reply = instance.predict("", metadata=[("mm-vmodel-id", "moving")])
            return reply.results[1].category

        set_vmodel(instance, "moving", "injected")
        assert seen() == "injected"
        set_vmodel(instance, "moving", "successor")
        eventually(lambda: seen() == "successor")
