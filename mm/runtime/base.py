"""What somebody who writes a model runtime fills in: ``ModelRuntime`` and ``serves``.

A runtime says how a model is loaded, measured, called and let go, in ordinary blocking code.
Threads, limits and the mesh's protocol are the business of ``spi.py``; the process is
``process.py``'s. A complete one::

    from pathlib import Path

    from mm.pb.mmesh import CategoryAndConfidence, PredictRequest, PredictResponse
    from mm.runtime import ModelRuntime, run_runtime, serves


    class WordCounter(ModelRuntime[set[str]]):
        capacity_bytes = 64 * 2**20

        def load(self, model_id, model_type, path, key):
            return set(Path(path).read_text().split())

        def size(self, model):
            return sum(map(len, model)) + 100 * len(model)

        @serves("mmesh.ExamplePredictor/predict", PredictRequest, id_path=(1,))
        def predict(self, model, request):
            known = sum(word in model for word in request.text.split())
            return PredictResponse([CategoryAndConfidence("known", known)])


    run_runtime(WordCounter(), "8085")
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

from betterproto2 import Message

from mm.core.ids import UNIT_BYTES
from mm.errors import StartupError

MIB = 2**20

#: The largest that the protocol carries and every mesh reads: the Java one takes the unsigned
#: integers of its fields, of 64 bits for sizes and 32 bits for all else, for signed ones.
BYTES_MAX: Final = 2**63 - 1
COUNT_MAX: Final = 2**31 - 1
LOAD_TIMEOUT_S_MAX: Final = COUNT_MAX / 1000

ModelT = TypeVar("ModelT")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class ServedMethod:
    """A method of a runtime that clients call by gRPC."""

    #: With the leading slash.
    path: str
    request_type: type[Message]
    #: Where in the request the model's id stands, and where the mesh puts it; empty: nowhere.
    id_path: tuple[int, ...]
    needs_model: bool
    #: The name of the Python method.
    attribute: str


def serves(
    name: str,
    request_type: type[Message],
    *,
    id_path: tuple[int, ...] = (),
    needs_model: bool = True,
) -> Callable[[MethodT], MethodT]:
    """Make a method answer the gRPC method ``package.Service/Method``.

    It is called as ``method(model, request)`` in a worker thread and returns the response. The
    model is the one that the call's metadata names (``mm-model-id``), else the request at
    ``id_path``, the field numbers down to a string; if it is not loaded the call has ended with
    NOT_FOUND, and the mesh loads it again. With ``needs_model=False`` it is called as
    ``method(request)`` on the event loop and must not block.
    """

    def mark(method: MethodT) -> MethodT:
        served = ServedMethod(f"/{name}", request_type, id_path, needs_model, method.__name__)
        method.__mm_serves__ = served  # type: ignore[attr-defined]
        return method

    return mark


class ModelRuntime(ABC, Generic[ModelT]):
    """A model runtime, as far as models are concerned.

    ``load``, ``unload``, ``size``, ``predict_size`` and the methods marked with ``serves`` may
    block: they run in worker threads, several at a time. An exception ends the call that caused
    it: ``CallError`` with its status, a missing or unreadable file in ``load`` with
    FAILED_PRECONDITION, any other with INTERNAL and a traceback in the log.
    """

    #: Memory for models; the mesh never asks for more than fits by what ``size`` answers.
    capacity_bytes: int
    #: What the mesh reserves for a model that it has never seen loaded.
    default_model_size_bytes: int = 1 * MIB
    #: Loads at a time.
    loading_concurrency_max: int = 2
    #: A load that takes longer is given up by the mesh.
    load_timeout_s: float = 60.0
    #: Calls of models at a time, and so the threads for them.
    call_threads_max: int = max(2, os.cpu_count() or 2)
    #: Calls that wait for one of those threads; more are refused with RESOURCE_EXHAUSTED.
    call_queue_length_max: int = 1_000
    #: Calls of one model at a time that the mesh shall send; 0: no limit.
    model_concurrency_max: int = 0
    version: str = ""

    #: Bounds of the mesh for what it is told (spec around 8).
    _LOAD_TIMEOUT_S_MIN: ClassVar = 0.1

    @abstractmethod
    def load(self, model_id: str, model_type: str, path: str, key: str) -> ModelT:
        """Load a model and answer it; type, path and key are as registered."""

    @abstractmethod
    def size(self, model: ModelT) -> int:
        """Answer the bytes that a loaded model takes."""

    # Not abstract: most models need nothing but to be forgotten.
    def unload(self, model: ModelT) -> None:
        """Free what is not freed by forgetting the model. Called once it has no callers."""

    def predict_size(self, model_id: str, model_type: str, path: str, key: str) -> int | None:
        """Guess within half a second what a model will take; None if there is nothing to go by.

        Runs in threads of its own, as many as loads have, so that calls do not delay it.
        """
        del model_id, model_type, path, key
        return None

    @classmethod
    def served_methods(cls) -> Iterator[ServedMethod]:
        """Yield what ``serves`` has marked."""
        for attribute in dir(cls):
            served = getattr(getattr(cls, attribute), "__mm_serves__", None)
            if isinstance(served, ServedMethod):
                yield served

    def check(self) -> None:
        """Raise ``StartupError`` for what the mesh would refuse (spec around 8) or never read."""
        default_bytes = self.default_model_size_bytes
        checks = [
            ("default_model_size_bytes", default_bytes, UNIT_BYTES, BYTES_MAX),
            ("capacity_bytes", self.capacity_bytes, capacity_bytes_min(default_bytes), BYTES_MAX),
            ("loading_concurrency_max", self.loading_concurrency_max, 1, COUNT_MAX),
            (
                "load_timeout_s",
                self.load_timeout_s,
                self._LOAD_TIMEOUT_S_MIN,
                LOAD_TIMEOUT_S_MAX,
            ),
            ("call_threads_max", self.call_threads_max, 1, COUNT_MAX),
            ("call_queue_length_max", self.call_queue_length_max, 0, COUNT_MAX),
            ("model_concurrency_max", self.model_concurrency_max, 0, COUNT_MAX),
        ]
        for name, value, minimum, maximum in checks:
            if not value >= minimum:  # nor is NaN
                raise StartupError(f"{name} is {value}; at least {minimum} is needed")
            if value > maximum:
                raise StartupError(f"{name} is {value}; at most {maximum} is allowed")


def capacity_bytes_min(default_model_size_bytes: int) -> int:
    """Answer the smallest capacity that the mesh starts with (spec core 3.1)."""
    return max(2 * default_model_size_bytes, min(512 * MIB, 10 * default_model_size_bytes))
