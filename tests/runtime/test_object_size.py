"""The rules of ``object_size`` one by one, then real models."""

from __future__ import annotations

import array
import functools
import gc
import mmap
import pickle
import sys
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from mm.runtime.object_size import object_size_bytes

MB = 1_000_000
#: More than any header, less than any payload of these tests.
SLACK = 4_000


class WithDict:
    def __init__(self, value: object) -> None:
        self.value = value


class WithSlots:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class SlotsAndDict(WithSlots):
    pass


class ArrayWithNotes(np.ndarray[Any, Any]):
    notes: object


def near(size_bytes: int, payload_bytes: int) -> bool:
    return payload_bytes <= size_bytes <= payload_bytes + SLACK


@pytest.mark.parametrize(
    "wrap",
    [
        lambda payload: payload,
        WithDict,
        WithSlots,
        lambda payload: [payload, payload],
        lambda payload: (payload,),
        lambda payload: {"key": payload},
        lambda payload: {payload: 1},
        lambda payload: {1, payload},
        lambda payload: frozenset([payload]),
        lambda payload: deque([payload]),
        lambda payload: functools.partial(print, payload),
        lambda payload: WithDict([{"a": WithSlots((payload,))}]),
        lambda payload: WithDict(payload).__init__,  # a bound method keeps its object
    ],
)
@pytest.mark.parametrize("payload", [bytes(MB), "x" * MB, 1 << 8 * MB], ids=["bytes", "str", "int"])
def test_containers_and_attributes_lead_on(wrap: Any, payload: object) -> None:
    wrapped = wrap(payload)
    assert near(object_size_bytes(wrapped), sys.getsizeof(payload))


def test_attributes_beside_slots() -> None:
    obj = SlotsAndDict(bytes(MB))
    obj.other = bytes(MB)  # type: ignore[attr-defined]
    assert near(object_size_bytes(obj), 2 * MB)


def test_plain_objects_count_as_getsizeof_says() -> None:
    assert object_size_bytes(b"abc") == sys.getsizeof(b"abc")
    assert object_size_bytes([]) == sys.getsizeof([])
    text = "text"
    assert object_size_bytes([text, text]) == sys.getsizeof([0, 0]) + sys.getsizeof(text)


def test_cycles_end() -> None:
    first: list[object] = [bytes(MB)]
    first.append(WithDict(first))
    assert near(object_size_bytes(first), MB)


def test_what_is_not_the_models_own() -> None:
    payload = WithDict(bytes(MB))
    others = [weakref.ref(payload), type(payload), sys, near, WithDict.__init__, np.float64, np.add]
    assert object_size_bytes(others) < SLACK


def test_an_array_counts_its_buffer_once() -> None:
    data = np.zeros(MB, dtype=np.uint8)
    assert near(object_size_bytes(data), MB)
    assert near(object_size_bytes([data, data[:10], data[::2], data.reshape(10, -1).T]), MB)


def test_a_view_keeps_the_whole_buffer_alive() -> None:
    view = np.zeros(MB, dtype=np.uint8)[5:6]
    assert near(object_size_bytes(view), MB)
    structured = np.zeros(1000, dtype=[("a", "S999"), ("b", "u1")])["b"]
    assert near(object_size_bytes(structured), MB)


def test_arrays_on_other_buffers(tmp_path: Path) -> None:
    data = bytes(MB)
    assert near(object_size_bytes([np.frombuffer(data, np.uint8), data]), MB)
    assert near(object_size_bytes(np.asarray(memoryview(bytearray(MB)))), MB)
    assert near(object_size_bytes(memoryview(data)), MB)
    floats = array.array("d", bytes(MB))
    assert near(object_size_bytes(np.frombuffer(floats)), sys.getsizeof(floats))
    mapped = np.memmap(tmp_path / "m", np.uint8, "w+", shape=MB)
    assert near(object_size_bytes(mapped), MB)
    with mmap.mmap(-1, MB) as anonymous:
        assert near(object_size_bytes(anonymous), MB)


def test_arrays_of_objects_and_subclasses_lead_on() -> None:
    elements = np.empty(3, dtype=object)
    elements[:] = [bytes(MB), WithDict(bytes(MB)), None]
    assert near(object_size_bytes(elements), 2 * MB)
    records = np.empty(2, dtype=[("a", object), ("b", "i4")])
    records["a"] = [bytes(MB), bytes(MB)]
    assert near(object_size_bytes(records), 2 * MB)
    noted = np.zeros(10).view(ArrayWithNotes)
    noted.notes = bytes(MB)
    assert near(object_size_bytes(noted), MB)


def test_scalars_and_empty_arrays() -> None:
    small = [np.float64(1.0), np.zeros(()), np.zeros((0, 5)), np.array("abc"), np.dtype("f8")]
    assert object_size_bytes(small) < SLACK


def test_random_state_of_numpy_counts() -> None:
    state = np.random.RandomState(0)
    assert object_size_bytes(state) > len(pickle.dumps(state)) / 2


X, Y = (part[:300] for part in load_digits(return_X_y=True))


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(20, random_state=0),
        GradientBoostingClassifier(n_estimators=20, random_state=0),
        HistGradientBoostingClassifier(max_iter=5, random_state=0),
        KNeighborsClassifier(algorithm="kd_tree"),
        KNeighborsClassifier(algorithm="ball_tree"),
        KNeighborsClassifier(algorithm="brute"),
        SVC(),
        MLPClassifier((100,), max_iter=2, random_state=0),
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=3)),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_models_count_what_a_pickle_holds(estimator: Any) -> None:
    """A pickle holds every byte of the arrays and little else: the size is near it, never below.

    Trees, k-d trees and the like keep their nodes where Python cannot see them.
    """
    with threadpool_limits(1):  # more would spin for seconds on cores that others use
        estimator.fit(X, Y)
    pickled = pickle.dumps(estimator)
    loaded = pickle.loads(pickled)
    size_bytes = object_size_bytes(loaded)
    assert len(pickled) * 0.99 <= size_bytes <= len(pickled) * 1.7
    # Measuring leaves nothing behind and says the same again.
    gc.collect()
    assert object_size_bytes(loaded) == size_bytes
