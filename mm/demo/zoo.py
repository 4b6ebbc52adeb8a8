"""Which models the demo trains: a list of specifications, the same for the same seed.

Pure: nothing of scikit-learn is imported here; ``training`` turns a specification into a model.

Sizes. Three instances together shall hold about a quarter of all models, and each of them its
largest model, the unload reserve and four others (``capacity``). With every size between 0.5 and
8 MB both are possible only if many models are small and some are large: a little more than half are
drawn between 0.7 and 1.7 MiB, the others between 3.4 and 5.8 MiB.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final, Literal

MIB: Final = 1024 * 1024

Algorithm = Literal["random-forest", "extra-trees", "k-neighbors", "kernel-svm", "svm"]
DataSet = Literal["digits", "wine", "iris", "breast-cancer"]

SMALL_BYTES: Final = (int(0.7 * MIB), int(1.7 * MIB))
LARGE_BYTES: Final = (int(3.4 * MIB), int(5.8 * MIB))

#: 55 % of the models are small.
_SMALL_OF_TWENTY: Final = 11


@dataclass(frozen=True, slots=True)
class Family:
    """An algorithm on a data set, and what one unit of its main parameter weighs.

    ``parameter_bytes`` was measured on the saved models; for ``kernel-svm`` the weight grows with
    the square of the parameter, and it is that of one squared unit.
    """

    algorithm: Algorithm
    data_set: DataSet
    parameter_bytes: float


#: The main parameter is the number of trees, of stored rows, or of kernel components.
SMALL_FAMILIES: Final = (
    Family("random-forest", "digits", 59_000),
    Family("k-neighbors", "iris", 83),
    Family("kernel-svm", "wine", 8.0),
    Family("extra-trees", "breast-cancer", 11_000),
    Family("svm", "digits", 0.0),
    Family("k-neighbors", "wine", 236),
    Family("kernel-svm", "iris", 8.0),
    Family("extra-trees", "digits", 121_000),
    Family("k-neighbors", "breast-cancer", 248),
    Family("kernel-svm", "breast-cancer", 8.4),
    Family("k-neighbors", "digits", 522),
)
LARGE_FAMILIES: Final = (
    Family("random-forest", "digits", 59_000),
    Family("k-neighbors", "breast-cancer", 248),
    Family("kernel-svm", "iris", 8.0),
    Family("k-neighbors", "wine", 236),
    Family("extra-trees", "digits", 121_000),
    Family("k-neighbors", "digits", 522),
    Family("kernel-svm", "breast-cancer", 8.4),
    Family("k-neighbors", "iris", 83),
    Family("kernel-svm", "wine", 8.0),
)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to train. ``parameter`` is the family's main one, chosen for the wanted size.

    ``first_class`` is the number of the model's first class: every model numbers its classes on
    its own, so that the answer of a wrong model is never right by accident.
    """

    model_id: str
    algorithm: Algorithm
    data_set: DataSet
    parameter: int
    seed: int
    first_class: int


def zoo(count: int, seed: int) -> tuple[ModelSpec, ...]:
    """Answer ``count`` specifications that all differ; the same for the same arguments."""
    rng = random.Random(seed)
    small = large = 0
    specs = []
    for index in range(count):
        # Spread evenly: a small one whenever the running share of small ones is due.
        if (index + 1) * _SMALL_OF_TWENTY // 20 > index * _SMALL_OF_TWENTY // 20:
            family, bounds = SMALL_FAMILIES[small % len(SMALL_FAMILIES)], SMALL_BYTES
            small += 1
        else:
            family, bounds = LARGE_FAMILIES[large % len(LARGE_FAMILIES)], LARGE_BYTES
            large += 1
        specs.append(
            ModelSpec(
                model_id=f"{family.data_set}-{family.algorithm}-{index:02d}",
                algorithm=family.algorithm,
                data_set=family.data_set,
                parameter=_parameter(family, rng.uniform(*bounds)),
                seed=rng.randrange(2**31),
                first_class=100 * (index + 1),
            )
        )
    return tuple(specs)


def _parameter(family: Family, size_bytes: float) -> int:
    if family.algorithm == "svm":
        # An SVM weighs what its support vectors weigh: the data decide.
        return 0
    if family.algorithm == "kernel-svm":
        return round(math.sqrt(size_bytes / family.parameter_bytes))
    return max(1, round(size_bytes / family.parameter_bytes))
