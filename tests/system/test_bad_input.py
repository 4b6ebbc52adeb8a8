"""What clients do wrong, and what they are told (issue 3, "Bad input and faults"; around 6.1).

Each case at the instance that has the model and at one that would have to pass the call on.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from mm.pb.mm.testing import EchoRequest, EchoResponse
from tests.system.conftest import Pair
from tests.system.meshes import CALL_TIMEOUT_S, MESSAGE_BYTES_MAX, Instance, Metadata, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Code = grpc.StatusCode
NO_ID = "must include mm-model-id header"
BOTH = "must include only one of model id and vmodel id"
EMPTY = "provided model-id header must be non-empty"
EMPTY_VMODEL = "provided vmodel-id header must be non-empty"


@pytest.fixture(params=["holder", "other"])
def instance(request: pytest.FixtureRequest, pair: Pair) -> Iterator[Instance]:
    instance: Instance = getattr(pair, request.param)
    yield instance
    # Whatever was wrong was wrong with that call alone.
    assert instance.predict("echo").results[0].confidence == 1.0


@pytest.mark.parametrize(
    ("metadata", "code", "text"),
    [
        pytest.param([], Code.INVALID_ARGUMENT, NO_ID, id="no id"),
        pytest.param([("mm-model-id", "x")], Code.NOT_FOUND, "model not found", id="unknown"),
        pytest.param(
            [("mm-vmodel-id", "x")], Code.NOT_FOUND, "vmodel not found", id="unknown vmodel"
        ),
        pytest.param([("mm-model-id", "")], Code.INVALID_ARGUMENT, EMPTY, id="empty"),
        pytest.param([("mm-model-id-bin", b"")], Code.INVALID_ARGUMENT, EMPTY, id="empty -bin"),
        pytest.param(
            [("mm-vmodel-id", "")], Code.INVALID_ARGUMENT, EMPTY_VMODEL, id="empty vmodel"
        ),
        pytest.param(
            [("mm-model-id", "echo"), ("mm-vmodel-id", "echo")],
            Code.INVALID_ARGUMENT,
            BOTH,
            id="two kinds",
        ),
        pytest.param(
            [("mm-model-id", "echo"), ("mm-model-id", "")],
            Code.INVALID_ARGUMENT,
            EMPTY,
            id="one of two empty",
        ),
        pytest.param(
            [("mm-model-id-bin", b"\xff\xfe")],
            Code.INVALID_ARGUMENT,
            "header mm-model-id-bin cannot be decoded",
            id="no UTF-8",
        ),
    ],
)
def test_ids(instance: Instance, metadata: Metadata, code: Code, text: str) -> None:
    assert refusal(partial(instance.predict, "", metadata=metadata)) == (code, text)


def test_legacy_id_header(instance: Instance) -> None:
    reply = instance.predict("", metadata=[("tas-model-id", "echo")])
    assert reply.results[0].category == "classification for hello by model echo"


@pytest.mark.parametrize(
    "method",
    ["/mmesh.ExamplePredictor/noSuchMethod", "/no.such.Service/Method", "/mmesh.ModelMesh/nothing"],
)
def test_unknown_method(instance: Instance, method: str) -> None:
    """Without an allow-list it is the runtime that knows. With one: test_conformance_injection."""
    call = partial(instance.call, method, b"", mmesh.PredictResponse)
    assert refusal(call) == (Code.INVALID_ARGUMENT, NO_ID)
    with_id = partial(call, [("mm-model-id", "echo")])
    assert refusal(with_id) == (Code.UNIMPLEMENTED, f"unknown method {method}")


def test_message_that_is_no_protobuf(instance: Instance) -> None:
    """The mesh does not look into messages: it is the runtime that refuses this one."""
    call = partial(
        instance.call,
        "/mmesh.ExamplePredictor/predict",
        b"\xff\xff\xff",
        mmesh.PredictResponse,
        [("mm-model-id", "echo")],
    )
    assert refusal(call)[0] == Code.INVALID_ARGUMENT
    register = partial(
        instance.call, "/mmesh.ModelMesh/registerModel", b"\xff\xff\xff", mmesh.ModelStatusInfo
    )
    assert refusal(register)[0] == Code.INVALID_ARGUMENT


class TestMessagesAboveTheLimit:
    """RESOURCE_EXHAUSTED that names the limit, in both directions, unary and streamed."""

    LIMIT = f"the limit of {MESSAGE_BYTES_MAX} bytes"
    ID = (("mm-model-id", "echo"),)

    @staticmethod
    def stub(instance: Instance, kind: str, method: str) -> Any:
        make: Any = getattr(instance.channel, kind)
        return make(
            f"/mm.testing.Echo/{method}",
            request_serializer=bytes,
            response_deserializer=EchoResponse.parse,
        )

    def test_request(self, instance: Instance) -> None:
        stub = self.stub(instance, "unary_unary", "unary")
        request = EchoRequest(payload=bytes(MESSAGE_BYTES_MAX))
        code, text = refusal(partial(stub, request, metadata=self.ID, timeout=CALL_TIMEOUT_S))
        assert code == Code.RESOURCE_EXHAUSTED
        assert "request" in text
        assert self.LIMIT in text

    def test_later_request_of_a_stream(self, instance: Instance) -> None:
        stub = self.stub(instance, "stream_unary", "clientStream")
        requests = [EchoRequest(), EchoRequest(payload=bytes(MESSAGE_BYTES_MAX))]
        code, text = refusal(
            partial(stub, iter(requests), metadata=self.ID, timeout=CALL_TIMEOUT_S)
        )
        assert code == Code.RESOURCE_EXHAUSTED
        assert self.LIMIT in text

    def test_response(self, instance: Instance) -> None:
        stub = self.stub(instance, "unary_unary", "unary")
        request = EchoRequest(reply_bytes=MESSAGE_BYTES_MAX)
        code, text = refusal(partial(stub, request, metadata=self.ID, timeout=CALL_TIMEOUT_S))
        assert code == Code.RESOURCE_EXHAUSTED
        assert "response" in text
        assert self.LIMIT in text

    def test_management_request(self, instance: Instance) -> None:
        request = mmesh.RegisterModelRequest(
            model_id="x", model_info=mmesh.ModelInfo(type="t", key="k" * MESSAGE_BYTES_MAX)
        )
        call = partial(
            instance.call, "/mmesh.ModelMesh/registerModel", request, mmesh.ModelStatusInfo
        )
        code, text = refusal(call)
        assert code == Code.RESOURCE_EXHAUSTED
        assert self.LIMIT in text


def test_headers_above_the_limit(instance: Instance) -> None:
    metadata = [("mm-model-id", "echo"), ("x-large", "l" * 9000)]
    code, text = refusal(partial(instance.predict, "", metadata=metadata))
    assert code == Code.RESOURCE_EXHAUSTED
    assert "8192" in text


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        pytest.param(
            mmesh.RegisterModelRequest(model_info=mmesh.ModelInfo(type="t")),
            Code.INVALID_ARGUMENT,
            "must provide non-empty modelId",
            id="no id",
        ),
        pytest.param(
            mmesh.RegisterModelRequest(model_id="x"),
            Code.INVALID_ARGUMENT,
            "Must provide non-empty model type string",
            id="no type",
        ),
        pytest.param(
            mmesh.RegisterModelRequest(
                model_id="echo", model_info=mmesh.ModelInfo(type="example", path="another")
            ),
            Code.ALREADY_EXISTS,
            "Model already exists with different",
            id="other path",
        ),
        pytest.param(
            mmesh.RegisterModelRequest(
                model_id="y" * 5000, model_info=mmesh.ModelInfo(type="example")
            ),
            Code.INVALID_ARGUMENT,
            "an id has at most 4096 bytes, this one 5000: use a shorter one",
            id="long id",
        ),
        pytest.param(
            mmesh.RegisterModelRequest(
                model_id="x", model_info=mmesh.ModelInfo(type="example", path="p" * 2_000_000)
            ),
            Code.INVALID_ARGUMENT,
            "the path of a model has at most 65536 bytes, this one 2000000",
            id="long path",
        ),
    ],
)
def test_registrations(
    instance: Instance, request_: mmesh.RegisterModelRequest, code: Code, text: str
) -> None:
    call = partial(instance.call, "/mmesh.ModelMesh/registerModel", request_, mmesh.ModelStatusInfo)
    found = refusal(call)
    assert found[0] == code
    assert found[1].startswith(text)


@pytest.mark.parametrize("greeting", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 4096])
def test_who_does_not_speak_http2(instance: Instance, greeting: bytes) -> None:
    """A probe, a browser, garbage: their connection ends, the others do not notice."""
    with socket.create_connection(
        ("127.0.0.1", instance.port), timeout=CALL_TIMEOUT_S
    ) as connection:
        connection.sendall(greeting)
        if not greeting:
            return
        received = b""
        while chunk := _receive(connection):
            received += chunk
    eventually(lambda: instance.predict("echo").results)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionResetError:
        return b""
