"""Making the demo's models: train, save, and write down what scikit-learn answers.

Runs in worker processes: scikit-learn is imported inside the functions, so that the demo itself
stays small. The expected answers come from the *saved* file, loaded again, for exactly the batches
that will be sent: what counts is what scikit-learn says of the model that is served.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mm.demo.zoo import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Different requests a model; each is sent many times.
SAMPLES_PER_MODEL: Final = 12
SAMPLE_ROWS_MAX: Final = 4

#: How far a copied row is moved, in standard deviations of its column: as a measuring error would.
_JITTER: Final = 0.05

#: One thread each: the demo runs as many workers as there are cores.
SINGLE_THREADED: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One request and the only right answer to it."""

    rows: tuple[tuple[float, ...], ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model on disk. ``file`` is relative to the directory; ``size_bytes`` is in memory."""

    model_id: str
    file: str
    file_bytes: int
    size_bytes: int
    samples: tuple[Sample, ...]


def train(spec: ModelSpec, directory: str) -> TrainedModel:
    """Train ``spec``, save it below ``directory`` and answer what to expect of it."""
    for name, value in SINGLE_THREADED.items():
        os.environ.setdefault(name, value)
    import joblib

    from mm.runtime.object_size import object_size_bytes

    data, classes = _load(spec)
    model = _estimator(spec)
    model.fit(*_training_set(spec, data, classes))
    path = Path(directory) / f"{spec.model_id}.joblib"
    joblib.dump(model, path)
    saved = joblib.load(path)
    file_bytes = path.stat().st_size
    return TrainedModel(
        model_id=spec.model_id,
        file=path.name,
        file_bytes=file_bytes,
        # As the runtime measures it.
        size_bytes=max(object_size_bytes(saved), file_bytes),
        samples=_samples(spec, saved, data),
    )


def _load(spec: ModelSpec) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    import numpy as np
    from sklearn import datasets

    loaders = {
        "digits": datasets.load_digits,
        "wine": datasets.load_wine,
        "iris": datasets.load_iris,
        "breast-cancer": datasets.load_breast_cancer,
    }
    data, classes = loaders[spec.data_set](return_X_y=True)
    return np.ascontiguousarray(data, dtype=np.float64), classes.astype(np.int64) + spec.first_class


def _estimator(spec: ModelSpec) -> Any:
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
    from sklearn.kernel_approximation import Nystroem
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC, LinearSVC

    match spec.algorithm:
        case "random-forest":
            return RandomForestClassifier(spec.parameter, random_state=spec.seed)
        case "extra-trees":
            return ExtraTreesClassifier(spec.parameter, random_state=spec.seed)
        case "k-neighbors":
            return KNeighborsClassifier(3 + 2 * (spec.seed % 3))
        case "svm":
            return make_pipeline(StandardScaler(), SVC(C=1 + spec.seed % 10, gamma=1.0))
        case "kernel-svm":
            kernel_map = Nystroem(n_components=spec.parameter, random_state=spec.seed)
            return make_pipeline(StandardScaler(), kernel_map, LinearSVC(random_state=spec.seed))


def _training_set(
    spec: ModelSpec, data: NDArray[np.float64], classes: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Answer the data set, with slightly moved copies of rows where more rows are wanted."""
    import numpy as np

    row_count = spec.parameter if spec.algorithm in ("k-neighbors", "kernel-svm") else 0
    if row_count <= len(data):
        return data, classes
    rng = np.random.default_rng(spec.seed)
    chosen = rng.integers(len(data), size=row_count - len(data))
    moved = data[chosen] + rng.normal(size=(len(chosen), data.shape[1])) * (
        data.std(axis=0) * _JITTER
    )
    return np.concatenate([data, moved]), np.concatenate([classes, classes[chosen]])


def _samples(spec: ModelSpec, model: Any, data: NDArray[np.float64]) -> tuple[Sample, ...]:
    import numpy as np

    rng = np.random.default_rng(spec.seed)
    samples = []
    for _ in range(SAMPLES_PER_MODEL):
        # Real rows of the data set, never more than a client would send at once.
        batch = data[rng.integers(len(data), size=rng.integers(1, SAMPLE_ROWS_MAX + 1))]
        answer = model.predict(batch)
        samples.append(
            Sample(
                rows=tuple(tuple(float(value) for value in row) for row in batch),
                expected=tuple(int(label) for label in answer),
            )
        )
    return tuple(samples)
