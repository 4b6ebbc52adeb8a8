"""Clients that never stop calling, and keep count of what failed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import grpc

from mm.pb import mmesh
from tests.system.meshes import CALL_TIMEOUT_S, Instance, channel_to
from tests.system.processes import eventually

PAUSE_S = 0.02


class Caller(threading.Thread):
    """Calls one model after the other at the first instance that listens, until told otherwise.

    Nothing is tried again, neither by it nor by its channel.
    """

    def __init__(self, model_ids: Sequence[str], *instances: Instance) -> None:
        super().__init__()
        self._model_ids = model_ids
        self._channel = channel_to(*(each.port for each in instances))
        self._ended = threading.Event()
        self.count = 0
        self.failures: list[str] = []

    def run(self) -> None:
        stub: Any = self._channel.unary_unary(
            "/mmesh.ExamplePredictor/predict",
            request_serializer=bytes,
            response_deserializer=mmesh.PredictResponse.parse,
        )
        request = mmesh.PredictRequest(text="hello")
        for model_id in cycle(self._model_ids):
            if self._ended.wait(PAUSE_S):
                return
            try:
                stub(request, metadata=(("mm-model-id", model_id),), timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as exc:
                self.failures.append(f"{model_id}: {exc}")
            self.count += 1

    def wait_calls(self) -> None:
        """Return when it has called every model twice more."""
        wanted = self.count + 2 * len(self._model_ids)
        eventually(lambda: self.count >= wanted, what="calls")

    def end(self) -> None:
        """Stop calling."""
        self._ended.set()
        self.join()
        self._channel.close()


def wait_calls(callers: Iterable[Caller]) -> None:
    """Return when each has called every model twice more."""
    for caller in callers:
        caller.wait_calls()
