"""tritonclient against three instances with scikit-learn runtimes: real models, real answers.

Also what a file can do to its load: missing, corrupt, no model, outside of the root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.datasets import load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

import mm
from mm.pb import mmesh
from tests.system.meshes import Mesh, mesh_of

pytestmark = pytest.mark.system

Status = mmesh.ModelStatusInfoModelStatus
IRIS, IRIS_LABELS = load_iris(return_X_y=True)
WINE, WINE_LABELS = load_wine(return_X_y=True)
TIMEOUT_S = 60.0

#: As modelmesh-serving configures it, but for models instead of vmodels (around 7.1).
EXTRACTION = """{"allowOtherRpcs": true, "rpcConfigs": {
    "inference.GRPCInferenceService/ModelInfer": {"idExtractionPath": [1]},
    "inference.GRPCInferenceService/ModelReady": {"idExtractionPath": [1]},
    "inference.GRPCInferenceService/ModelMetadata": {"idExtractionPath": [1]}}}"""


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    """Name -> model and samples for it."""
    return {
        "tree": (DecisionTreeClassifier(random_state=0).fit(IRIS, IRIS_LABELS), IRIS),
        "neighbours": (KNeighborsClassifier().fit(WINE, WINE_LABELS), WINE),
        "regression": (LogisticRegression(max_iter=2000).fit(IRIS, IRIS_LABELS), IRIS),
    }


@pytest.fixture(scope="module")
def mesh(
    dataplane: str,
    kv_store: str,
    new_service_name: Callable[[], str],
    models: dict[str, tuple[Any, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mesh]:
    root = tmp_path_factory.mktemp("models")
    for name, (model, _) in models.items():
        joblib.dump(model, root / f"{name}.joblib")
    (root / "corrupt.joblib").write_bytes(b"\x80\x04 this is no pickle")
    (root / "empty.joblib").touch()
    joblib.dump({"not": "a model"}, root / "dict.joblib")
    joblib.dump(models["tree"][0], root.parent / "outside.joblib")
    settings = {"MM_DATAPLANE": dataplane, "MM_DATAPLANE_CONFIG": EXTRACTION}
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        add = partial(mesh.add_sklearn, root=Path(root), args=["--capacity", "64MiB"])
        with ThreadPoolExecutor() as pool:
            list(pool.map(add, ["sk-1", "sk-2", "sk-3"]))
        for name in models:
            mesh[0].register(name, f"{name}.joblib", model_type="sklearn")
        yield mesh


@pytest.fixture(scope="module", params=[0, 1, 2])
def client(request: pytest.FixtureRequest, mesh: Mesh) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(f"127.0.0.1:{mesh[request.param].port}") as client:
        yield client


def infer(client: InferenceServerClient, name: str, samples: Any, headers: Any = None) -> Any:
    # tritonclient sends numpy arrays as raw_input_contents.
    tensor = InferInput("x", list(samples.shape), "FP64")
    tensor.set_data_from_numpy(samples)
    outputs = [InferRequestedOutput("predict"), InferRequestedOutput("predict_proba")]
    return client.infer(
        name, [tensor], outputs=outputs, headers=headers, client_timeout=TIMEOUT_S, request_id="7"
    )


@pytest.mark.parametrize("name", ["tree", "neighbours", "regression"])
@pytest.mark.parametrize("by", ["message", "header"])
def test_answers_are_those_of_sklearn(
    client: InferenceServerClient, models: dict[str, tuple[Any, Any]], name: str, by: str
) -> None:
    model, samples = models[name]
    # An id in the message would beat one in the header, so there is none in it then.
    result = (
        infer(client, name, samples)
        if by == "message"
        else infer(client, "", samples, {"mm-model-id": name})
    )
    assert (result.get_response().id, result.get_response().model_name) == ("7", name)
    np.testing.assert_array_equal(result.as_numpy("predict"), model.predict(samples))
    np.testing.assert_array_equal(result.as_numpy("predict_proba"), model.predict_proba(samples))


def test_model_metadata_and_readiness(client: InferenceServerClient) -> None:
    assert client.is_model_ready("tree", client_timeout=TIMEOUT_S)
    metadata = client.get_model_metadata("tree", client_timeout=TIMEOUT_S)
    assert (metadata.name, metadata.platform) == ("tree", "sklearn")
    assert [(t.datatype, list(t.shape)) for t in metadata.inputs] == [("FP64", [-1, 4])]


def test_server_methods(client: InferenceServerClient) -> None:
    assert client.is_server_live(client_timeout=TIMEOUT_S)
    assert client.is_server_ready(client_timeout=TIMEOUT_S)
    metadata = client.get_server_metadata(client_timeout=TIMEOUT_S)
    assert (metadata.name, metadata.version) == ("mm", mm.__version__)


def test_unknown_model(client: InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="model not found") as caught:
        infer(client, "nobody", IRIS)
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_wrong_shape_is_the_models_own_answer(client: InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(client, "tree", WINE)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("missing.joblib", "missing.joblib"),
        ("corrupt.joblib", "corrupt.joblib"),
        ("empty.joblib", "empty.joblib"),
        ("dict.joblib", "dict"),
        ("../outside.joblib", "outside.joblib"),
    ],
)
def test_files_that_hold_no_model(mesh: Mesh, path: str, text: str) -> None:
    """The load fails for good, in words that name the file, and takes nobody else along."""
    name = f"bad-{path.removeprefix('../').partition('.')[0]}"
    status = mesh[0].register(name, path, model_type="sklearn", load_now=True, sync=True)
    assert status.status == Status.LOADING_FAILED
    assert status.errors
    assert all(text in error for error in status.errors)
    with InferenceServerClient(f"127.0.0.1:{mesh[1].port}") as client:
        with pytest.raises(InferenceServerException, match=text) as caught:
            infer(client, name, IRIS)
        assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"
        assert infer(client, "tree", IRIS).as_numpy("predict").shape == (len(IRIS),)
