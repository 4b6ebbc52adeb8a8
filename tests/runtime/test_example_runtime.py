"""The example runtime as a foreign client sees it (spec around 21.1)."""

from __future__ import annotations

import queue
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from mm.pb.mm.testing import EchoRequest, EchoResponse
from mm.testing.example_runtime import ExampleRuntime, Settings, services, settings_from_environment

FAST = "SIZE_10000_0_0"
PREDICT = "/mmesh.ExamplePredictor/predict"
STATUS = mmesh.RuntimeStatusResponseStatus


class Runtime:
    """The SPI and the predictor through a client."""

    def __init__(self, client: Any, service: str = "mmesh.ModelRuntime") -> None:
        self.client = client
        self.service = service

    def spi(self, method: str, request: Any, response_type: Any) -> Any:
        return self.client.unary(f"/{self.service}/{method}", request, response_type)

    def status(self) -> Any:
        return self.spi("runtimeStatus", mmesh.RuntimeStatusRequest(), mmesh.RuntimeStatusResponse)

    def load(self, model_id: str, path: str = FAST) -> Any:
        request = mmesh.LoadModelRequest(model_id=model_id, model_path=path)
        return self.spi("loadModel", request, mmesh.LoadModelResponse)

    def unload(self, model_id: str) -> Any:
        request = mmesh.UnloadModelRequest(model_id=model_id)
        return self.spi("unloadModel", request, mmesh.UnloadModelResponse)

    def size(self, model_id: str) -> int:
        request = mmesh.ModelSizeRequest(model_id=model_id)
        size: int = self.spi("modelSize", request, mmesh.ModelSizeResponse).size_in_bytes
        return size

    def predict(self, model_id: str, text: str, **kwargs: Any) -> Any:
        kwargs.setdefault("metadata", [("mm-model-id", model_id)])
        request = mmesh.PredictRequest(text=text, model_name="name in the message")
        return self.client.unary(PREDICT, request, mmesh.PredictResponse, **kwargs)


@pytest.fixture
def start(serve: Any, connect: Any) -> Any:
    """A function that starts a runtime with these settings and answers how to call it."""

    def start(**settings: Any) -> Runtime:
        settings = {"start_delay_s": 0.0, **settings}
        [target] = serve(services(ExampleRuntime(Settings(**settings)), "0"))
        return Runtime(connect(target))

    return start


def fails_with(code: str, text: str) -> Any:
    """Expect an RpcError with this code and text."""
    return pytest.raises(
        grpc.RpcError, check=lambda e: (e.code().name, e.details()) == (code, text)
    )


def test_status_tells_the_documented_defaults(start: Any) -> None:
    answer = start().status()
    assert answer.status == STATUS.READY
    assert answer.capacity_in_bytes == 1024 * 2**20
    assert answer.default_model_size_in_bytes == 50 * 2**20
    assert answer.model_loading_timeout_ms == 90_000
    assert answer.max_loading_concurrency == 6
    assert answer.limit_model_concurrency is False
    assert answer.method_infos == {}


def test_starting_until_the_start_delay_is_over(start: Any) -> None:
    assert start(start_delay_s=60.0).status().status == STATUS.STARTING
    assert start(is_failing=True).status().status == STATUS.FAILING


def test_load_size_predict_unload(start: Any) -> None:
    runtime = start()
    assert runtime.load("m").size_in_bytes == 0
    assert runtime.size("m") == 10_000
    [first, second] = runtime.predict("m", "hello").results
    assert first.category == "classification for hello by model m"
    assert first.confidence == 1.0
    assert second.category == "name in the message"
    runtime.unload("m")
    with fails_with("NOT_FOUND", "model m is not loaded"):
        runtime.predict("m", "hello")
    with fails_with("NOT_FOUND", "model m is not loaded"):
        runtime.size("m")
    runtime.unload("m")


def test_sizes_before_and_with_the_load_are_options(start: Any) -> None:
    request = mmesh.PredictModelSizeRequest(model_id="m", model_path=FAST)
    with pytest.raises(grpc.RpcError, check=lambda e: e.code().name == "UNIMPLEMENTED"):
        start().spi("predictModelSize", request, mmesh.PredictModelSizeResponse)
    runtime = start(predicts_sizes=True, tells_loaded_sizes=True)
    answer = runtime.spi("predictModelSize", request, mmesh.PredictModelSizeResponse)
    assert answer.size_in_bytes == 10_000
    assert runtime.load("m").size_in_bytes == 10_000
    other = mmesh.PredictModelSizeRequest(model_id="n", model_path="somewhere")
    answer = runtime.spi("predictModelSize", other, mmesh.PredictModelSizeResponse)
    assert answer.size_in_bytes == 50 * 2**20


def test_a_late_status_request_purges_the_models(start: Any) -> None:
    runtime = start()
    runtime.load("m")
    runtime.status()
    with fails_with("NOT_FOUND", "model m is not loaded"):
        runtime.predict("m", "hello")


def test_the_first_load_of_a_failing_path_fails(start: Any) -> None:
    runtime = start()
    path = "FAIL_out of luck"
    with fails_with("INTERNAL", "out of luck"):
        runtime.load("m", path)
    runtime.load("m", path)
    assert len(runtime.predict("m", "hello").results) == 2


def test_texts_purge_fail_and_delay(start: Any) -> None:
    runtime = start()
    runtime.load("m")
    assert runtime.predict("m", "test:delay:ms=1").results
    with fails_with("UNAVAILABLE", "Fake: prediction"):
        runtime.predict("m", "test:error:code=UNAVAILABLE:message=Fake: prediction")
    assert runtime.predict("m", "test:purge-models").results
    with fails_with("NOT_FOUND", "model m is not loaded"):
        runtime.predict("m", "hello")


@pytest.mark.parametrize(
    ("switch", "code", "text"),
    [
        ("triton_not_found", "UNAVAILABLE", "Request for unknown model: 'm' is not found"),
        ("mlserver_not_found", "INVALID_ARGUMENT", "Model m not found"),
    ],
)
def test_other_servers_ways_to_say_not_found(start: Any, switch: str, code: str, text: str) -> None:
    with fails_with(code, text):
        start(**{switch: True}).predict("m", "hello")


def test_unload_of_an_unknown_model_can_be_not_found(start: Any) -> None:
    with fails_with("NOT_FOUND", "model m is not loaded"):
        start(unload_returns_not_found=True).unload("m")


def test_binary_id_header_and_many_ids(start: Any) -> None:
    runtime = start()
    for model_id in ("größe", "b"):
        runtime.load(model_id)
    [answer, _] = runtime.predict("", "x", metadata=[("mm-model-id-bin", "größe".encode())]).results
    assert answer.category == "classification for x by model größe"
    many = runtime.client.unary(
        "/mmesh.ExamplePredictor/multiPredict",
        mmesh.PredictRequest(text="x"),
        mmesh.MultiPredictResponse,
        metadata=[("mm-model-id-bin", "größe".encode()), ("mm-model-id-bin", b"b")],
    )
    assert set(many.per_model_results) == {"größe", "b"}
    with fails_with("INVALID_ARGUMENT", "the call names no model"):
        runtime.predict("", "x", metadata=[])


def test_environment_switches(start: Any) -> None:
    env = {"RS_METHOD_INFOS": "a.B/c=1,2;a.B/d=", "RS_ALLOW_ANY": "true"}
    runtime = start(model_concurrency_max=3, **settings_from_environment(env))
    answer = runtime.status()
    assert {k: v.id_injection_path for k, v in answer.method_infos.items()} == {
        "a.B/c": [1, 2],
        "a.B/d": [],
    }
    assert answer.allow_any_method is True
    assert answer.limit_model_concurrency is True
    assert runtime.load("m").max_concurrency == 3


def test_separate_ports_and_the_unix_socket(serve: Any, connect: Any, tmp_path: Any) -> None:
    example = ExampleRuntime(Settings(start_delay_s=0.0))
    management, serving = serve(services(example, f"unix://{tmp_path}/spi.sock,0"))
    runtime = Runtime(connect(management))
    runtime.load("m")
    assert Runtime(connect(serving)).predict("m", "x").results
    with fails_with("UNIMPLEMENTED", f"unknown method {PREDICT}"):
        runtime.predict("m", "x")


def test_legacy_name_only(serve: Any, connect: Any) -> None:
    example = ExampleRuntime(Settings(start_delay_s=0.0, is_legacy=True))
    [target] = serve(services(example, "0"))
    with fails_with("UNIMPLEMENTED", "unknown method /mmesh.ModelRuntime/runtimeStatus"):
        Runtime(connect(target)).status()
    legacy = "com.ibm.watson.tas.internal.proto.ModelServer"
    assert Runtime(connect(target), legacy).status().status == STATUS.READY


class TestEcho:
    """All four kinds of call, and what travels beside the messages."""

    METADATA = (
        ("mm-model-id", "m"),
        ("echo-initial-a", "one"),
        ("echo-initial-b-bin", b"\x00\xff"),
        ("echo-trailing-a", "two"),
        ("echo-trailing-b-bin", b"\xfe"),
    )

    @pytest.fixture
    def method(self, start: Any) -> Any:
        runtime = start()
        runtime.load("m")

        def of(kind: str, name: str) -> Any:
            multicallable = getattr(runtime.client.channel, kind)(
                f"/mm.testing.Echo/{name}",
                request_serializer=bytes,
                response_deserializer=EchoResponse.parse,
            )
            return lambda request: multicallable(request, metadata=self.METADATA, timeout=60)

        return of

    def test_unary(self, method: Any) -> None:
        answer = method("unary_unary", "unary")(EchoRequest(payload=b"x", model_name="n"))
        assert (answer.model_id, answer.model_name, answer.payload) == ("m", "n", b"x")
        assert 0 < answer.deadline_ms <= 60_500  # grpcio rounds up
        assert ("echo-initial-b-bin", b"\x00\xff") in [(h.key, h.value) for h in answer.headers]

    def test_server_stream(self, method: Any) -> None:
        call = method("unary_stream", "serverStream")(
            EchoRequest(reply_count=20, reply_bytes=300_000)
        )
        assert [len(answer.payload) for answer in call] == [300_000] * 20
        assert dict(call.initial_metadata())["echo-initial-a"] == "one"
        assert dict(call.initial_metadata())["echo-initial-b-bin"] == b"\x00\xff"
        assert dict(call.trailing_metadata())["echo-trailing-a"] == "two"
        assert dict(call.trailing_metadata())["echo-trailing-b-bin"] == b"\xfe"

    def test_client_stream(self, method: Any) -> None:
        requests = [EchoRequest(payload=bytes([i]) * 100_000) for i in range(30)]
        answer = method("stream_unary", "clientStream")(iter(requests))
        assert answer.request_count == 30
        assert answer.payload == b"".join(r.payload for r in requests)

    def test_bidi_stream_answers_before_the_next_request(self, method: Any) -> None:
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        call = method("stream_stream", "bidiStream")(iter(requests.get, None))
        for i in range(5):
            requests.put(EchoRequest(payload=b"%d" % i, reply_count=2))
            answers = [next(call), next(call)]
            assert [answer.payload for answer in answers] == [b"%d" % i] * 2
            assert answers[0].request_count == i + 1
        requests.put(None)
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK

    def test_status_with_details_after_answers(self, method: Any) -> None:
        call = method("unary_stream", "serverStream")(
            EchoRequest(
                reply_count=5,
                fail_after=2,
                fail_code=9,
                fail_message="50 % ä",
                fail_details=b"\1\2",
            )
        )
        answers = []
        with fails_with("FAILED_PRECONDITION", "50 % ä"):
            answers.extend(call)
        assert dict(call.trailing_metadata())["grpc-status-details-bin"] == b"\1\2"
        assert dict(call.trailing_metadata())["echo-trailing-a"] == "two"
