"""The life of models in a runtime, and its blocking code in threads."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from mm.pb import mmesh
from mm.runtime import CallError, ModelRuntime, StatusCode, serves
from mm.runtime import spi as spi_module
from mm.runtime.address import Address
from mm.runtime.spi import RuntimeService

PREDICT = "/mmesh.ExamplePredictor/predict"
STATUS = mmesh.RuntimeStatusResponseStatus


class Gate:
    """Blocks a thread until opened, and tells that it is there."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def wait(self) -> None:
        self.entered.release()
        assert self.opened.wait(20)

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=60)


class Gated(ModelRuntime[str]):
    """Models are their paths. A path ``gate:NAME`` blocks where a test has put a gate."""

    capacity_bytes = 64 * 2**20
    loading_concurrency_max = 2
    call_threads_max = 2
    call_queue_length_max = 1
    model_concurrency_max = 5
    version = "gated"

    def __init__(self) -> None:
        self.gates: dict[str, Gate] = {}
        self.events: Counter[str] = Counter()
        self.predicted_bytes: int | None = None

    def _pass(self, gate: str) -> None:
        self.events[gate] += 1
        if gate in self.gates:
            self.gates[gate].wait()

    def load(self, model_id: str, model_type: str, path: str, key: str) -> str:
        self._pass(f"load {model_id}")
        if path == "missing":
            raise FileNotFoundError(2, "No such file or directory", path)
        if path == "bad":
            raise ValueError("not a model")
        if path == "refused":
            raise CallError(StatusCode.INVALID_ARGUMENT, "this type is not served")
        return path

    def unload(self, model: str) -> None:
        self._pass(f"unload {model}")
        if model == "sticky" and self.events["unload sticky"] == 1:
            raise OSError("cannot let go")

    def size(self, model: str) -> int:
        if model == "immeasurable":
            raise TypeError("no size")
        return 1000 + len(model)

    def predict_size(self, model_id: str, model_type: str, path: str, key: str) -> int | None:
        return self.predicted_bytes

    @serves("mmesh.ExamplePredictor/predict", mmesh.PredictRequest, id_path=(1,))
    def predict(self, model: str, request: mmesh.PredictRequest) -> mmesh.PredictResponse:
        self._pass(f"predict {model}")
        if request.text == "bug":
            raise ZeroDivisionError("oops")
        answer = mmesh.CategoryAndConfidence(category=f"{model}: {request.text}")
        return mmesh.PredictResponse(results=[answer])

    @serves("mmesh.ExamplePredictor/multiPredict", mmesh.PredictRequest, needs_model=False)
    def about(self, request: mmesh.PredictRequest) -> mmesh.MultiPredictResponse:
        return mmesh.MultiPredictResponse(per_model_results={request.text: mmesh.PredictResponse()})


class Served:
    """A runtime and calls of it, in the foreground or not."""

    def __init__(self, runtime: Gated, client: Any) -> None:
        self.runtime = runtime
        self.client = client

    def start(self, path: str, request: Any, response_type: Any) -> Any:
        method = self.client.channel.unary_unary(
            path, request_serializer=bytes, response_deserializer=response_type.parse
        )
        return method.future(request, timeout=60)

    def load(self, model_id: str, path: str = "p", **info: str) -> Any:
        request = mmesh.LoadModelRequest(model_id=model_id, model_path=path, **info)
        return self.start("/mmesh.ModelRuntime/loadModel", request, mmesh.LoadModelResponse)

    def unload(self, model_id: str) -> Any:
        request = mmesh.UnloadModelRequest(model_id=model_id)
        return self.start("/mmesh.ModelRuntime/unloadModel", request, mmesh.UnloadModelResponse)

    def size(self, model_id: str) -> Any:
        request = mmesh.ModelSizeRequest(model_id=model_id)
        return self.start("/mmesh.ModelRuntime/modelSize", request, mmesh.ModelSizeResponse)

    def predict(self, model_id: str, text: str = "x") -> Any:
        request = mmesh.PredictRequest(model_name=model_id, text=text)
        return self.start(PREDICT, request, mmesh.PredictResponse)

    def status(self) -> Any:
        return self.start(
            "/mmesh.ModelRuntime/runtimeStatus",
            mmesh.RuntimeStatusRequest(),
            mmesh.RuntimeStatusResponse,
        ).result()

    def gate(self, name: str) -> Gate:
        return self.runtime.gates.setdefault(name, Gate())


@pytest.fixture
def served(serve: Any, connect: Any) -> Any:
    runtime = Gated()
    [target] = serve([(Address(), RuntimeService(runtime).methods())])
    yield Served(runtime, connect(target))
    for gate in runtime.gates.values():
        gate.opened.set()


def status_of(call: Any) -> tuple[str, str]:
    """Answer how a call ended."""
    return call.code().name, call.details()


# --- load and call --------------------------------------------------------------------------------


def test_load_tells_size_and_concurrency(served: Served) -> None:
    answer = served.load("m", "path").result()
    assert (answer.size_in_bytes, answer.max_concurrency) == (1004, 5)
    assert served.predict("m", "hi").result().results[0].category == "path: hi"
    status = served.status()
    assert status.limit_model_concurrency
    assert status.runtime_version == "gated"
    assert {k: v.id_injection_path for k, v in status.method_infos.items()} == {PREDICT[1:]: [1]}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (
            "missing",
            (
                "FAILED_PRECONDITION",
                "cannot load model m from 'missing': No such file or directory",
            ),
        ),
        ("bad", ("INTERNAL", "cannot load model m from 'bad': ValueError: not a model")),
        ("refused", ("INVALID_ARGUMENT", "this type is not served")),
        ("immeasurable", ("INTERNAL", "cannot measure model m: TypeError: no size")),
    ],
)
def test_a_load_that_fails_leaves_nothing(
    served: Served, path: str, status: tuple[str, str]
) -> None:
    assert status_of(served.load("m", path)) == status
    assert status_of(served.predict("m")) == ("NOT_FOUND", "model m is not loaded")
    assert served.runtime.events["unload immeasurable"] == (path == "immeasurable")
    assert served.load("m", "good").code() is grpc.StatusCode.OK


def test_bugs_of_a_runtime_are_answers(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.load("m").result()
    text = "cannot call model m: ZeroDivisionError: oops"
    assert status_of(served.predict("m", "bug")) == ("INTERNAL", text)
    assert "Traceback" in caplog.text
    assert served.predict("m").code() is grpc.StatusCode.OK


def test_no_size_is_predicted_unless_the_runtime_does(served: Served) -> None:
    call = served.start(
        "/mmesh.ModelRuntime/predictModelSize",
        mmesh.PredictModelSizeRequest(model_id="m"),
        mmesh.PredictModelSizeResponse,
    )
    assert status_of(call) == ("UNIMPLEMENTED", "this runtime predicts no sizes")


def test_a_size_is_predicted_while_all_threads_for_calls_are_busy(served: Served) -> None:
    """The mesh waits half a second for it: calls may take longer."""
    served.load("m").result()
    gate = served.gate("predict p")
    calls = [served.predict("m") for _ in range(3)]  # two in threads, one in line
    for _ in range(2):
        gate.wait_entered()
    served.runtime.predicted_bytes = 7
    answer = served.start(
        "/mmesh.ModelRuntime/predictModelSize",
        mmesh.PredictModelSizeRequest(model_id="n"),
        mmesh.PredictModelSizeResponse,
    )
    assert answer.result().size_in_bytes == 7
    gate.opened.set()
    assert {call.code().name for call in calls} == {"OK"}


def test_methods_without_a_model(served: Served) -> None:
    call = served.start(
        "/mmesh.ExamplePredictor/multiPredict",
        mmesh.PredictRequest(text="a"),
        mmesh.MultiPredictResponse,
    )
    assert set(call.result().per_model_results) == {"a"}


def test_two_loads_of_one_id_load_once(served: Served) -> None:
    gate = served.gate("load m")
    calls = [served.load("m"), served.load("m")]
    gate.wait_entered()
    gate.opened.set()
    assert [call.result().size_in_bytes for call in calls] == [1001, 1001]
    assert served.runtime.events["load m"] == 1


def test_a_load_with_other_info_replaces_the_model(served: Served) -> None:
    served.load("m", "one").result()
    served.load("m", "two").result()
    assert served.runtime.events["unload one"] == 1
    assert served.predict("m", "x").result().results[0].category == "two: x"


def test_as_many_loads_at_a_time_as_told(served: Served) -> None:
    gates = [served.gate(f"load {i}") for i in range(5)]
    for gate in gates:
        gate.entered = gates[0].entered  # who enters does not matter, how many does
    calls = [served.load(str(i)) for i in range(5)]
    for _ in range(2):
        gates[0].wait_entered()
    for _ in range(20):  # the server has been asked for all five by now, and had time for them
        assert served.size("other").code() is grpc.StatusCode.NOT_FOUND
    assert sum(served.runtime.events[f"load {i}"] for i in range(5)) == 2
    for gate in gates:
        gate.opened.set()
    assert all(call.result() for call in calls)


def test_calls_have_threads_a_queue_and_then_a_refusal(served: Served) -> None:
    served.load("m").result()
    gate = served.gate("predict p")
    running = [served.predict("m"), served.predict("m")]
    for _ in running:
        gate.wait_entered()
    # Of two more, one finds room in the queue.
    more = [served.predict("m"), served.predict("m")]
    refused = next(call for call in _as_completed(more))
    assert status_of(refused) == ("RESOURCE_EXHAUSTED", "1 calls are waiting already")
    gate.opened.set()
    for call in (*running, *(call for call in more if call is not refused)):
        assert call.result().results


def test_a_call_given_up_in_the_queue_is_never_made(served: Served) -> None:
    served.load("m").result()
    gate = served.gate("predict p")
    running = [served.predict("m"), served.predict("m")]
    for _ in running:
        gate.wait_entered()
    given_up = served.predict("m")
    assert status_of(served.predict("m"))[0] == "RESOURCE_EXHAUSTED"  # it has the place
    given_up.cancel()
    served.size("m").result()  # sent after the cancellation, so that has arrived
    gate.opened.set()
    for call in running:
        call.result()
    served.unload("m").result()
    assert served.runtime.events["predict p"] == 2


def test_a_call_given_up_keeps_its_model_while_its_thread_runs(served: Served) -> None:
    served.load("m").result()
    gate = served.gate("predict p")
    call = served.predict("m")
    gate.wait_entered()
    call.cancel()
    unload = served.unload("m")
    with pytest.raises(grpc.FutureTimeoutError):
        unload.result(timeout=0.05)
    assert served.runtime.events["unload p"] == 0
    gate.opened.set()
    assert unload.code() is grpc.StatusCode.OK
    assert served.runtime.events["unload p"] == 1


def _as_completed(calls: list[Any]) -> Any:
    done = threading.Semaphore(0)
    finished: list[Any] = []
    for call in calls:
        call.add_done_callback(lambda call: (finished.append(call), done.release()))
    for _ in calls:
        assert done.acquire(timeout=60)
        yield finished.pop(0)


# --- unload ---------------------------------------------------------------------------------------


def test_unload_waits_for_the_calls_in_flight(served: Served) -> None:
    served.load("m").result()
    gate = served.gate("predict p")
    call = served.predict("m")
    gate.wait_entered()
    unload = served.unload("m")
    # Nobody else finds the model once the unload has begun; the call in flight keeps it.
    while served.size("m").code() is grpc.StatusCode.OK:
        pass
    assert served.predict("m").code() is grpc.StatusCode.NOT_FOUND
    assert not unload.done()
    gate.opened.set()
    assert call.result().results[0].category == "p: x"
    assert unload.code() is grpc.StatusCode.OK
    assert served.runtime.events["unload p"] == 1


def test_unload_that_waits_too_long_says_so(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spi_module, "UNLOAD_WAIT_S", 0.01)
    served.load("m").result()
    gate = served.gate("predict p")
    call = served.predict("m")
    gate.wait_entered()
    text = "model m still has 1 calls in flight"
    assert status_of(served.unload("m")) == ("UNAVAILABLE", text)
    gate.opened.set()
    call.result()
    assert served.unload("m").code() is grpc.StatusCode.OK


def test_unload_wins_over_a_load_that_runs(served: Served) -> None:
    gate = served.gate("load m")
    load = served.load("m")
    gate.wait_entered()
    unload = served.unload("m")
    with pytest.raises(grpc.FutureTimeoutError):
        unload.result(timeout=0.05)  # memory is not free before the load has ended
    gate.opened.set()
    assert status_of(load) == ("ABORTED", "model m was unloaded while it was loading")
    assert unload.code() is grpc.StatusCode.OK
    assert served.predict("m").code() is grpc.StatusCode.NOT_FOUND
    assert served.runtime.events["unload p"] == 1


def test_a_load_given_up_by_the_mesh_is_unloaded_by_it(served: Served) -> None:
    gate = served.gate("load m")
    load = served.load("m")
    gate.wait_entered()
    load.cancel()
    unload = served.unload("m")
    gate.opened.set()
    assert unload.code() is grpc.StatusCode.OK
    assert served.runtime.events == {"load m": 1, "unload p": 1}


def test_an_unload_that_failed_is_tried_again(served: Served) -> None:
    served.load("m", "sticky").result()
    text = "cannot unload model m: OSError: cannot let go"
    assert status_of(served.unload("m")) == ("INTERNAL", text)
    assert served.predict("m").code() is grpc.StatusCode.NOT_FOUND
    assert served.unload("m").code() is grpc.StatusCode.OK
    assert served.runtime.events["unload sticky"] == 2


# --- the handshake --------------------------------------------------------------------------------


def test_status_drops_every_model(served: Served) -> None:
    for model_id in "abc":
        served.load(model_id, model_id).result()
    assert served.status().status == STATUS.READY
    for model_id in "abc":
        assert served.predict(model_id).code() is grpc.StatusCode.NOT_FOUND
        assert served.runtime.events[f"unload {model_id}"] == 1


def test_status_is_starting_while_a_load_is_on_its_way(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spi_module, "PURGE_WAIT_S", 0.01)
    gate = served.gate("load m")
    load = served.load("m")
    gate.wait_entered()
    assert served.status().status == STATUS.STARTING
    gate.opened.set()
    assert status_of(load)[0] == "ABORTED"
    assert served.status().status == STATUS.READY
    assert served.runtime.events["unload p"] == 1


def test_status_survives_an_unload_that_fails(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spi_module, "PURGE_WAIT_S", 0.01)
    served.load("m", "sticky").result()
    assert served.status().status == STATUS.STARTING
    assert served.status().status == STATUS.READY


# --- the documentation ----------------------------------------------------------------------------


def test_the_runtime_of_the_docstring_works(serve: Any, connect: Any, tmp_path: Path) -> None:
    """The complete runtime that ``base.py`` shows: at most 30 lines, and it runs."""
    import mm.runtime.base

    assert mm.runtime.base.__doc__
    _, _, example = mm.runtime.base.__doc__.partition("::\n")
    lines = [line.removeprefix("    ") for line in example.strip("\n").splitlines()]
    assert len(lines) <= 30
    assert lines[-1] == 'run_runtime(WordCounter(), "8085")'
    namespace: dict[str, Any] = {"__name__": "example"}
    exec("\n".join(lines[:-1]), namespace)
    [target] = serve([(Address(), RuntimeService(namespace["WordCounter"]()).methods())])
    (tmp_path / "words").write_text("apple pear")
    served = Served(Gated(), connect(target))
    assert served.load("m", str(tmp_path / "words")).result().size_in_bytes == 209
    assert served.predict("m", "pear and apple").result().results[0].confidence == 2.0
    assert "No such file" in served.load("n", "/absent").details()
