"""What a runtime says of itself, before anybody asks for it."""

from __future__ import annotations

import math

import pytest

from mm.errors import StartupError
from mm.runtime import ModelRuntime
from mm.runtime.spi import RuntimeService


class Empty(ModelRuntime[str]):
    """Serves no methods."""

    capacity_bytes = 64 * 2**20

    def load(self, model_id: str, model_type: str, path: str, key: str) -> str:
        return path

    def size(self, model: str) -> int:
        return len(model)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("capacity_bytes", 2**20, "capacity_bytes is 1048576; at least 10485760 is needed"),
        ("capacity_bytes", 0, "capacity_bytes is 0"),
        ("default_model_size_bytes", 0, "default_model_size_bytes is 0; at least 8192 is needed"),
        ("loading_concurrency_max", 0, "loading_concurrency_max is 0; at least 1"),
        ("load_timeout_s", 0.01, "load_timeout_s is 0.01; at least 0.1"),
        ("call_threads_max", 0, "call_threads_max is 0"),
        ("load_timeout_s", math.nan, "load_timeout_s is nan; at least 0.1"),
        ("load_timeout_s", math.inf, "load_timeout_s is inf; at most 2147483.647 is allowed"),
        ("capacity_bytes", 2**66, "capacity_bytes is 73786976294838206464; at most"),
        ("model_concurrency_max", 2**31, "model_concurrency_max is 2147483648; at most"),
    ],
)
def test_settings_that_the_mesh_would_refuse(name: str, value: float, text: str) -> None:
    runtime = Empty()
    setattr(runtime, name, value)
    with pytest.raises(StartupError, match=text):
        RuntimeService(runtime)
