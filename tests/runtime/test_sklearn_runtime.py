"""The scikit-learn runtime over real sockets, asked by grpcio and tritonclient."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import grpc
import joblib
import numpy as np
import pytest
from sklearn.datasets import load_digits, load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

from mm.pb import inference as oip
from mm.pb import mmesh
from mm.runtime.address import Address
from mm.runtime.model_files import ModelRoot
from mm.runtime.sklearn import SklearnRuntime
from mm.runtime.spi import RuntimeService

MIB = 2**20
OIP = "/inference.GRPCInferenceService"

DIGITS, DIGIT_LABELS = load_digits(return_X_y=True)
IRIS, IRIS_LABELS = load_iris(return_X_y=True)
IRIS_NAMES = np.array(["setosa", "versicolor", "virginica"])[IRIS_LABELS]


def shout(texts: Any) -> Any:
    """A function that skops cannot know."""
    return texts


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    return {
        "forest": RandomForestClassifier(10, random_state=0, n_jobs=-1).fit(DIGITS, DIGIT_LABELS),
        "svm": SVC(random_state=0).fit(IRIS, IRIS_NAMES),
        "linear": LinearRegression().fit(IRIS[:, :3], IRIS[:, 3]),
        "text": make_pipeline(CountVectorizer(), MultinomialNB()).fit(
            ["good fine", "bad poor", "fine", "poor"], ["up", "down", "up", "down"]
        ),
    }


@pytest.fixture
def root(tmp_path: Path, models: dict[str, Any]) -> Path:
    """A directory of model files, and one beside it that nobody may read."""
    import skops.io  # searches all modules that there are: seconds in every process that collects

    root = tmp_path / "root"
    root.mkdir()
    for name, model in models.items():
        joblib.dump(model, root / f"{name}.joblib")
    skops.io.dump(models["svm"], root / "svm.skops")
    skops.io.dump(
        make_pipeline(FunctionTransformer(shout), models["linear"]), root / "untrusted.skops"
    )
    (root / "nested").mkdir()
    (root / "nested" / "link.joblib").symlink_to(root / "linear.joblib")
    (root / "corrupt.joblib").write_bytes(b"no model at all")
    (root / "notes.txt").write_text("x")
    joblib.dump({"a": 1}, root / "dict.joblib")
    outside = tmp_path / "outside"
    outside.mkdir()
    joblib.dump(models["linear"], outside / "secret.joblib")
    (root / "escape.joblib").symlink_to(outside / "secret.joblib")
    (root / "escape").symlink_to(outside)
    return root


class Runtime:
    """A runtime being served, through grpcio."""

    def __init__(self, target: str, client: Any) -> None:
        self.target = target
        self.client = client

    def spi(self, method: str, request: Any, response_type: Any) -> Any:
        return self.client.unary(f"/mmesh.ModelRuntime/{method}", request, response_type)

    def load(self, model_id: str, path: str | None = None) -> int:
        request = mmesh.LoadModelRequest(
            model_id=model_id, model_path=f"{model_id}.joblib" if path is None else path
        )
        size: int = self.spi("loadModel", request, mmesh.LoadModelResponse).size_in_bytes
        return size

    def unload(self, model_id: str) -> None:
        request = mmesh.UnloadModelRequest(model_id=model_id)
        self.spi("unloadModel", request, mmesh.UnloadModelResponse)

    def status(self) -> Any:
        return self.spi("runtimeStatus", mmesh.RuntimeStatusRequest(), mmesh.RuntimeStatusResponse)

    def infer(self, request: Any, **kwargs: Any) -> Any:
        return self.client.unary(f"{OIP}/ModelInfer", request, oip.ModelInferResponse, **kwargs)


@pytest.fixture
def start(serve: Any, connect: Any, root: Path) -> Any:
    """A function that starts a runtime and answers how to call it."""

    def start(**options: Any) -> Runtime:
        runtime = SklearnRuntime(ModelRoot(root), **{"capacity_bytes": 64 * MIB, **options})
        [target] = serve([(Address(), RuntimeService(runtime).methods())])
        return Runtime(target, connect(target))

    return start


@pytest.fixture
def runtime(start: Any) -> Runtime:
    started: Runtime = start()
    return started


def fails_with(code: str, *parts: str) -> Any:
    """Expect an RpcError with this code and these parts in its text."""
    return pytest.raises(
        grpc.RpcError,
        check=lambda e: e.code().name == code and all(part in e.details() for part in parts),
    )


def request_of(model_id: str, array: Any, datatype: str, **contents: Any) -> Any:
    """A request with one typed input."""
    tensor = oip.ModelInferRequestInferInputTensor(
        name="x",
        datatype=datatype,
        shape=list(np.shape(array)),
        contents=oip.InferTensorContents(**contents),
    )
    return oip.ModelInferRequest(model_name=model_id, inputs=[tensor])


# --- the SPI -----------------------------------------------------------------------------------


def test_status(runtime: Runtime) -> None:
    answer = runtime.status()
    assert answer.status == mmesh.RuntimeStatusResponseStatus.READY
    assert answer.capacity_in_bytes == 64 * MIB
    assert answer.default_model_size_in_bytes == MIB
    assert answer.max_loading_concurrency == 2
    assert answer.model_loading_timeout_ms == 60_000
    assert {k: v.id_injection_path for k, v in answer.method_infos.items()} == {
        "inference.GRPCInferenceService/ModelInfer": [1],
        "inference.GRPCInferenceService/ModelMetadata": [1],
        "inference.GRPCInferenceService/ModelReady": [1],
    }


def test_size_is_that_of_the_model(runtime: Runtime, root: Path) -> None:
    size = runtime.load("forest")
    assert (root / "forest.joblib").stat().st_size <= size < 3 * MIB
    request = mmesh.ModelSizeRequest(model_id="forest")
    assert runtime.spi("modelSize", request, mmesh.ModelSizeResponse).size_in_bytes == size
    predicted = runtime.spi(
        "predictModelSize",
        mmesh.PredictModelSizeRequest(model_id="forest", model_path="forest.joblib"),
        mmesh.PredictModelSizeResponse,
    )
    assert predicted.size_in_bytes == (root / "forest.joblib").stat().st_size


@pytest.mark.parametrize(
    ("path", "code", "parts"),
    [
        ("absent.joblib", "FAILED_PRECONDITION", ["'absent.joblib'", "No such file"]),
        ("", "FAILED_PRECONDITION", ["a path is needed"]),
        ("../outside/secret.joblib", "FAILED_PRECONDITION", ["'..' is not allowed"]),
        ("nested/../linear.joblib", "FAILED_PRECONDITION", ["'..' is not allowed"]),
        ("escape.joblib", "FAILED_PRECONDITION", ["'escape.joblib'", "leads out of"]),
        ("escape/secret.joblib", "FAILED_PRECONDITION", ["leads out of"]),
        # Whether there is something outside is not told.
        ("escape/absent.joblib", "FAILED_PRECONDITION", ["leads out of"]),
        ("/absent", "FAILED_PRECONDITION", ["'/absent'", "leads out of"]),
        ("/etc/passwd", "FAILED_PRECONDITION", ["'/etc/passwd'", "leads out of"]),
        ("a\0b.joblib", "FAILED_PRECONDITION", ["NUL"]),
        ("notes.txt", "FAILED_PRECONDITION", ["suffix '.txt'", ".skops"]),
        ("linear.joblib/x", "FAILED_PRECONDITION", ["Not a directory"]),
        (".", "FAILED_PRECONDITION", ["files of", "1 is needed"]),
        ("corrupt.joblib", "INTERNAL", ["'corrupt.joblib'", "cannot load model m"]),
        ("dict.joblib", "INVALID_ARGUMENT", ["a dict has none of predict"]),
        ("untrusted.skops", "FAILED_PRECONDITION", ["not trusted", "shout", "--trust"]),
    ],
)
def test_what_does_not_load(runtime: Runtime, path: str, code: str, parts: list[str]) -> None:
    with fails_with(code, *parts):
        runtime.load("m", path)
    with fails_with("NOT_FOUND", "model m is not loaded"):
        runtime.infer(request_of("m", [[1.0]], "FP64", fp64_contents=[1.0]))


def test_links_and_absolute_paths_inside_the_root_load(runtime: Runtime, root: Path) -> None:
    runtime.load("a", "nested/link.joblib")
    runtime.load("b", str(root / "linear.joblib"))
    runtime.load("c", "nested")


def test_skops_files(start: Any, models: dict[str, Any]) -> None:
    runtime = start(skops_only=True)
    runtime.load("svm", "svm.skops")
    request = request_of("svm", IRIS[:3], "FP64", fp64_contents=IRIS[:3].ravel().tolist())
    [output] = runtime.infer(request).outputs
    assert output.contents.bytes_contents == [b"setosa"] * 3
    with fails_with("FAILED_PRECONDITION", "suffix '.joblib'; allowed are .skops"):
        runtime.load("svm2", "svm.joblib")


def test_trusted_types_load(start: Any) -> None:
    name = f"{shout.__module__}.{shout.__qualname__}"
    start(trusted_types=[name]).load("m", "untrusted.skops")


def test_unload_purge_and_not_found(runtime: Runtime) -> None:
    request = request_of("linear", [[1.0] * 3], "FP64", fp64_contents=[1.0] * 3)
    for drop in (lambda: runtime.unload("linear"), runtime.status):
        runtime.load("linear")
        runtime.load("linear")
        runtime.infer(request)
        drop()
        with fails_with("NOT_FOUND", "model linear is not loaded"):
            runtime.infer(request)
    runtime.unload("linear")
    with fails_with("INVALID_ARGUMENT", "model_id is empty"):
        runtime.load("", "linear.joblib")


# --- the Open Inference Protocol ----------------------------------------------------------------


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("dtype", ["FP32", "FP64", "INT8", "UINT8", "INT64", "UINT16"])
def test_tritonclient_gets_what_sklearn_says(
    runtime: Runtime, models: dict[str, Any], dtype: str, is_raw: bool
) -> None:
    runtime.load("forest")
    numpy_type = np.dtype(dtype.lower().replace("fp", "float"))
    samples = DIGITS[:20].astype(numpy_type)
    expected = models["forest"].predict(samples)
    if is_raw:
        with InferenceServerClient(runtime.target) as client:
            tensor = InferInput("x", list(samples.shape), dtype)
            tensor.set_data_from_numpy(samples)
            result = client.infer(
                "forest",
                [tensor],
                outputs=[InferRequestedOutput("predict"), InferRequestedOutput("predict_proba")],
                request_id="r1",
            )
            assert result.get_response().id == "r1"
            assert result.get_response().model_name == "forest"
            np.testing.assert_array_equal(result.as_numpy("predict"), expected)
            np.testing.assert_array_equal(
                result.as_numpy("predict_proba"), models["forest"].predict_proba(samples)
            )
        return
    field = {
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
        "INT64": "int64_contents",
        "INT8": "int_contents",
    }.get(dtype, "uint_contents")
    request = request_of("forest", samples, dtype, **{field: samples.ravel().tolist()})
    [output] = runtime.infer(request).outputs
    assert (output.name, output.datatype, output.shape) == ("predict", "INT64", [20])
    np.testing.assert_array_equal(output.contents.int64_contents, expected)


def test_text_in_and_labels_out(runtime: Runtime, models: dict[str, Any]) -> None:
    runtime.load("text")
    texts = ["fine", "really bad, poor", "größe"]
    with InferenceServerClient(runtime.target) as client:
        tensor = InferInput("x", [3], "BYTES")
        tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=object))
        result = client.infer("text", [tensor])
        assert [label.decode() for label in result.as_numpy("predict")] == list(
            models["text"].predict(texts)
        )
    request = request_of("text", texts, "BYTES", bytes_contents=[t.encode() for t in texts])
    [output] = runtime.infer(request).outputs
    assert (output.datatype, output.contents.bytes_contents[0]) == ("BYTES", b"up")


def test_floats_out(runtime: Runtime, models: dict[str, Any]) -> None:
    runtime.load("linear")
    samples = IRIS[:5, :3]
    request = request_of("linear", samples, "FP64", fp64_contents=samples.ravel().tolist())
    [output] = runtime.infer(request).outputs
    assert (output.datatype, output.shape) == ("FP64", [5])
    np.testing.assert_array_equal(output.contents.fp64_contents, models["linear"].predict(samples))


def test_the_five_other_methods(runtime: Runtime) -> None:
    runtime.load("svm")
    with InferenceServerClient(runtime.target) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.get_server_metadata().name == "mm-sklearn"
        assert client.is_model_ready("svm")
        metadata = client.get_model_metadata("svm")
    assert (metadata.name, metadata.platform) == ("svm", "sklearn")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("input", "FP64", [-1, 4])
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("predict", "BYTES", [-1]),
        ("decision_function", "FP64", [-1, -1]),
    ]
    with fails_with("NOT_FOUND", "model other is not loaded"):
        runtime.client.unary(
            f"{OIP}/ModelReady", oip.ModelReadyRequest(name="other"), oip.ModelReadyResponse
        )


def test_the_header_names_the_model_before_the_message_does(runtime: Runtime) -> None:
    runtime.load("größe", "linear.joblib")
    request = request_of("other", [[1.0] * 3], "FP64", fp64_contents=[1.0] * 3)
    answer = runtime.infer(request, metadata=[("mm-model-id-bin", "größe".encode())])
    assert answer.model_name == "größe"
    with fails_with("NOT_FOUND", "model other is not loaded"):
        runtime.infer(request)
    request.model_name = ""
    with fails_with("INVALID_ARGUMENT", "names no model"):
        runtime.infer(request)
    with fails_with("INVALID_ARGUMENT", "names 2 models"):
        runtime.infer(request, metadata=[("mm-model-id", "a"), ("mm-model-id", "b")])
    with fails_with("INVALID_ARGUMENT", "header mm-model-id-bin cannot be decoded"):
        runtime.infer(request, metadata=[("mm-model-id-bin", b"\xff")])


ROW = [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"datatype": "FP99"}, ["'x'", "'FP99'", "FP64"]),
        ({"shape": [1, 4]}, ["'x'", "3 values", "[1, 4]"]),
        ({"shape": [3]}, ["'x'", "[3]", "[-1, 3]"]),
        ({"shape": [-1, 3]}, ["'x'", "[-1, 3]"]),
        ({"shape": [1] * 17}, ["up to 16"]),
        ({"shape": [0, 2**62]}, ["'x'", str(2**62)]),
        ({"datatype": "FP32"}, ["'x'", "fp64_contents", "fp32_contents"]),
        ({"datatype": "FP16"}, ["FP16 travels in raw_input_contents only"]),
        ({"contents": {"fp64_contents": [1.0, float("nan"), 3.0]}}, ["NaN"]),
        (
            {"datatype": "INT8", "contents": {"int_contents": [1, 2, 300]}},
            ["'x'", "INT8", "300"],
        ),
        ({"raw": [b"\0" * 24]}, ["both in contents and in raw_input_contents"]),
        ({"contents": None, "raw": [b"\0" * 23]}, ["'x'", "23 raw bytes", "FP64"]),
        ({"contents": None, "raw": [b"\0" * 24, b""]}, ["2 raw_input_contents for 1 inputs"]),
        (
            {"contents": None, "datatype": "BYTES", "raw": [struct.pack("<I", 9) + b"abc"]},
            ["'x'", "9 bytes"],
        ),
        ({"contents": None, "datatype": "BYTES", "raw": [b"\1"]}, ["an element's length"]),
        ({"output": "predict_proba"}, ["'predict_proba'", "this model has predict"]),
        ({"version": "7"}, ["version '7'"]),
        ({"inputs_count": 0}, ["0 input tensors (none)"]),
        ({"inputs_count": 2}, ["'x'", "there twice"]),
    ],
)
def test_bad_inputs_are_named(runtime: Runtime, change: dict[str, Any], parts: list[str]) -> None:
    runtime.load("linear")
    contents = change.get("contents", {"fp64_contents": ROW[0]})
    tensor = oip.ModelInferRequestInferInputTensor(
        name="x",
        datatype=change.get("datatype", "FP64"),
        shape=change.get("shape", [1, 3]),
        contents=None if contents is None else oip.InferTensorContents(**contents),
    )
    request = oip.ModelInferRequest(
        model_name="linear",
        model_version=change.get("version", ""),
        inputs=[tensor] * change.get("inputs_count", 1),
        raw_input_contents=change.get("raw", []),
    )
    if "output" in change:
        request.outputs.append(
            oip.ModelInferRequestInferRequestedOutputTensor(name=change["output"])
        )
    with fails_with("INVALID_ARGUMENT", *parts):
        runtime.infer(request)


@pytest.mark.parametrize("message", [b"\xff\xff\xff", b"\x0a\x05abc", b"\x0a\x02\xff\xfe"])
def test_what_is_no_message(runtime: Runtime, message: bytes) -> None:
    runtime.load("linear")
    with fails_with("INVALID_ARGUMENT"):
        runtime.infer(message)
    with fails_with("INVALID_ARGUMENT"):
        runtime.infer(message, metadata=[("mm-model-id", "linear")])


def test_file_modes(runtime: Runtime, root: Path) -> None:
    if os.geteuid() == 0:
        os.mkfifo(root / "pipe.joblib")  # root may read anything; a pipe would block for ever
        with fails_with("FAILED_PRECONDITION", "no regular file"):
            runtime.load("m", "pipe.joblib")
    else:
        (root / "linear.joblib").chmod(0)
        with fails_with("FAILED_PRECONDITION", "Permission denied"):
            runtime.load("m", "linear.joblib")
