"""The demo's models: specifications, sizes, memory for them, and what is expected of them."""

from __future__ import annotations

from pathlib import Path

import joblib
import numpy as np
import pytest

from mm.core.ids import UNIT_BYTES
from mm.demo.capacity import OTHERS_MIN, capacity
from mm.demo.training import SAMPLE_ROWS_MAX, SAMPLES_PER_MODEL, train
from mm.demo.zoo import LARGE_FAMILIES, MIB, SMALL_FAMILIES, ModelSpec, zoo
from mm.runtime.object_size import object_size_bytes


def test_the_same_seed_makes_the_same_models() -> None:
    assert zoo(60, 1) == zoo(60, 1)
    assert zoo(60, 1) != zoo(60, 2)
    assert zoo(60, 1)[:20] == zoo(20, 1)


def test_all_models_differ() -> None:
    specs = zoo(60, 1)
    assert len({spec.model_id for spec in specs}) == 60
    assert len({spec.first_class for spec in specs}) == 60
    assert len({(s.algorithm, s.data_set, s.parameter, s.seed) for s in specs}) == 60


def test_several_algorithms_over_all_data_sets() -> None:
    specs = zoo(60, 1)
    assert {spec.data_set for spec in specs} == {"digits", "wine", "iris", "breast-cancer"}
    assert len({spec.algorithm for spec in specs}) == 5


def extremes() -> list[ModelSpec]:
    """The smallest of each small family and the largest of each large one.

    Where a size limit would be broken first.
    """
    specs = zoo(200, 3)
    chosen = []
    for families, choose in ((SMALL_FAMILIES, min), (LARGE_FAMILIES, max)):
        for kind in dict.fromkeys((f.algorithm, f.data_set) for f in families):
            of_kind = [spec for spec in specs if (spec.algorithm, spec.data_set) == kind]
            chosen.append(choose(of_kind, key=lambda spec: spec.parameter))
    return chosen


@pytest.mark.parametrize("spec", extremes(), ids=lambda spec: spec.model_id)
def test_a_model_has_its_size_and_its_answers(spec: ModelSpec, tmp_path: Path) -> None:
    trained = train(spec, str(tmp_path))
    assert 0.5 * MIB <= trained.size_bytes <= 8 * MIB
    path = tmp_path / trained.file
    assert trained.file_bytes == path.stat().st_size <= trained.size_bytes
    model = joblib.load(path)
    assert object_size_bytes(model) == pytest.approx(trained.size_bytes, rel=0.02)
    assert len(trained.samples) == SAMPLES_PER_MODEL
    for sample in trained.samples:
        assert 1 <= len(sample.rows) <= SAMPLE_ROWS_MAX
        assert tuple(model.predict(np.array(sample.rows))) == sample.expected
        # No other model has these classes.
        assert all(spec.first_class <= label < spec.first_class + 100 for label in sample.expected)


def test_families_stay_within_half_and_eight_megabytes() -> None:
    """The sizes aimed at are well inside the limits that the trained models are held to."""
    assert len(SMALL_FAMILIES) + len(LARGE_FAMILIES) == 20
    for spec in zoo(500, 4):
        assert spec.parameter > 0 or spec.algorithm == "svm"


def test_capacity_is_a_quarter_where_that_is_enough() -> None:
    memory = capacity([MIB] * 120, 3)
    assert memory.share == pytest.approx(0.25, abs=0.001)
    assert memory.bytes_each == 10 * MIB


def test_capacity_has_room_for_the_largest_and_four_others() -> None:
    sizes = [MIB] * 9 + [8 * MIB]
    memory = capacity(sizes, 3)
    assert memory.bytes_each * 0.9 >= 8 * MIB + OTHERS_MIN * MIB
    assert memory.bytes_each % UNIT_BYTES == 0
    assert memory.share == memory.bytes_each * 3 / sum(sizes)
