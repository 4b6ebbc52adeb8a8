"""``mm runtime sklearn``: scikit-learn models behind the Open Inference Protocol.

Models are files below one root directory (``model_files.py``): ``.joblib``, ``.pkl`` and
``.pickle`` load with joblib, ``.skops`` with skops.

**A joblib or pickle file runs code of its maker's choice when it is loaded.** Load only what you
trust, or start with ``--skops-only``. A ``.skops`` file cannot run code: it loads only if every
type in it is one that skops knows to be harmless, or one named with ``--trust``.

A model's size is the bytes of the loaded object graph (``object_size.py`` has the rules) or the
size of its file if that is larger; never the growth of the process, which says more about the
allocator and the neighbours than about the model.

One input tensor with a row a sample; FP, INT, UINT and BOOL tensors go to the model as they are,
BYTES as text. Output ``predict``, and where the model has them, asked for by name,
``predict_proba``, ``decision_function`` and ``transform``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import joblib
import numpy as np
import sklearn

from mm.errors import StatusCode
from mm.runtime.call import CallError
from mm.runtime.inference import InferenceRuntime, TensorSpec
from mm.runtime.model_files import ModelRoot
from mm.runtime.object_size import object_size_bytes
from mm.runtime.tensors import BYTES, Array, InvalidTensorError

logger = logging.getLogger(__name__)

JOBLIB_SUFFIXES: Final = (".joblib", ".pkl", ".pickle")
SKOPS_SUFFIX: Final = ".skops"

#: What a model can be asked for, the usual one first.
OUTPUTS: Final = ("predict", "predict_proba", "decision_function", "transform")


@dataclass(frozen=True, slots=True)
class SklearnModel:
    """A loaded estimator and where it came from."""

    estimator: Any
    file_bytes: int

    def outputs(self) -> list[str]:
        """Answer what the estimator can be asked for."""
        return [name for name in OUTPUTS if hasattr(self.estimator, name)]

    def features_count(self) -> int | None:
        """Answer how many columns the input has; None where the estimator does not say."""
        count = getattr(self.estimator, "n_features_in_", None)
        return None if count is None else int(count)


class SklearnRuntime(InferenceRuntime[SklearnModel]):
    """See the module."""

    platform = "sklearn"
    version = sklearn.__version__

    def __init__(
        self,
        root: ModelRoot,
        *,
        capacity_bytes: int,
        trusted_types: Sequence[str] = (),
        skops_only: bool = False,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self._root = root
        self._trusted_types = frozenset(trusted_types)
        self._suffixes = (SKOPS_SUFFIX, *(() if skops_only else JOBLIB_SUFFIXES))

    # --- models -----------------------------------------------------------------------------------

    def load_model(self, model_id: str, model_type: str, path: str, key: str) -> SklearnModel:
        """Load a file. Type and key do not matter."""
        del model_type, key
        file = self._root.file(path, self._suffixes)
        file_bytes = file.stat().st_size
        if file.suffix == SKOPS_SUFFIX:
            estimator = self._load_skops(path, file)
        else:
            estimator = joblib.load(file)
        model = SklearnModel(estimator, file_bytes)
        if not model.outputs():
            what = f"a {type(estimator).__name__} has none of {', '.join(OUTPUTS)}"
            raise CallError(StatusCode.INVALID_ARGUMENT, f"model path {path!r}: {what}")
        logger.info("loaded %s: %s from %s", model_id, type(estimator).__name__, file)
        return model

    def _load_skops(self, path: str, file: Path) -> Any:
        import skops.io  # 0.4 s that those who have joblib files need not wait

        untrusted = sorted(set(skops.io.get_untrusted_types(file=file)) - self._trusted_types)
        if untrusted:
            what = f"types that are not trusted: {', '.join(untrusted)}; allow them with --trust"
            raise CallError(StatusCode.FAILED_PRECONDITION, f"model path {path!r}: {what}")
        return skops.io.load(file, trusted=sorted(self._trusted_types))

    def size_of_model(self, model: SklearnModel) -> int:
        """Answer the larger of the object graph and the file."""
        return max(object_size_bytes(model), model.file_bytes)

    def predict_size(self, model_id: str, model_type: str, path: str, key: str) -> int | None:
        """Guess the size of the file: close, unless it is compressed."""
        del model_id, model_type, key
        return self._root.file(path, self._suffixes).stat().st_size

    # --- calls ------------------------------------------------------------------------------------

    def predict(
        self, model: SklearnModel, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> Mapping[str, Array]:
        """Answer what the estimator says."""
        available = model.outputs()
        wanted = outputs or available[:1]
        for name in wanted:
            if name not in available:
                text = f"output {name!r}; this model has {', '.join(available)}"
                raise CallError(StatusCode.INVALID_ARGUMENT, text)
        samples = samples_of(model, inputs)
        # A call keeps to its one thread whatever n_jobs the model was saved with: there are as
        # many calls as threads already.
        with joblib.parallel_config(backend="sequential"):
            return {name: self._ask(model, name, samples) for name in wanted}

    def _ask(self, model: SklearnModel, output: str, samples: Any) -> Array:
        try:
            answer = getattr(model.estimator, output)(samples)
        except ValueError as exc:  # how scikit-learn refuses values: NaN, shapes, too few samples
            raise CallError(StatusCode.INVALID_ARGUMENT, f"{output}: {exc}") from exc
        if isinstance(answer, list):  # one array an output of a model with several
            answer = np.stack(answer, axis=1)
        if hasattr(answer, "toarray"):
            answer = answer.toarray()
        return np.asarray(answer)

    def describe(self, model: SklearnModel) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Answer what is known of an estimator: scikit-learn does not say all of it."""
        features_count = model.features_count()
        inputs = (
            TensorSpec("input", BYTES, (-1,))
            if features_count is None
            else TensorSpec("input", "FP64", (-1, features_count))
        )
        classes = getattr(model.estimator, "classes_", None)
        labels = np.asarray(classes) if isinstance(classes, list | np.ndarray) else None
        outputs = []
        for name in model.outputs():
            if name == "predict":
                outputs.append(TensorSpec(name, _label_datatype(labels), (-1,)))
            else:
                outputs.append(TensorSpec(name, "FP64", (-1, -1)))
        return [inputs], outputs


def _label_datatype(labels: Array | None) -> str:
    if labels is None:
        return "FP64"
    return {"b": "BOOL", "i": "INT64", "u": "UINT64", "f": "FP64"}.get(labels.dtype.kind, BYTES)


def samples_of(model: SklearnModel, inputs: Mapping[str, Array]) -> Any:
    """Answer the one input of a request as the estimator wants it, or say what is wrong."""
    if len(inputs) != 1:
        names = ", ".join(inputs) or "none"
        text = f"{len(inputs)} input tensors ({names}); 1 is expected, with a row a sample"
        raise CallError(StatusCode.INVALID_ARGUMENT, text)
    [(name, array)] = inputs.items()
    features_count = model.features_count()
    if features_count is not None and (array.ndim != 2 or array.shape[1] != features_count):
        text = f"shape {list(array.shape)}; [-1, {features_count}] is expected"
        raise InvalidTensorError(name, text)
    if array.dtype != object:
        return array
    try:
        texts = [element.decode() for element in array.ravel()]
    except UnicodeDecodeError as exc:
        raise InvalidTensorError(name, f"a BYTES element is not UTF-8: {exc}") from exc
    return np.array(texts, dtype=object).reshape(array.shape)
