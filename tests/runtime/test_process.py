"""Runtimes as processes: their commands, their start, and that they stop when told to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import joblib
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from mm.pb import inference as oip
from mm.pb import mmesh

#: The import of scikit-learn alone takes five seconds of a slow core.
pytestmark = pytest.mark.system

#: Generous: what is tested is that a process ends at all, on a machine with much else to do.
STOP_TIMEOUT_S = 40

HUNG_RUNTIME = """
import time
from mm.pb.mmesh import PredictRequest
from mm.runtime import ModelRuntime
from mm.runtime.address import Address
from mm.runtime.process import run
from mm.runtime.spi import RuntimeService

class Hung(ModelRuntime[str]):
    capacity_bytes = 64 * 2**20
    def load(self, model_id, model_type, path, key):
        print("loading", flush=True)
        time.sleep(3600)
    def size(self, model):
        return 1

run([(Address(), RuntimeService(Hung()).methods())], stop_grace_s=0.1)
"""


class Process:
    """A runtime process and the addresses that it says it listens on."""

    def __init__(self, popen: subprocess.Popen[str], addresses_count: int) -> None:
        self.popen = popen
        self.targets = [
            self.line_after("listening on ").replace("unix://", "unix:")
            for _ in range(addresses_count)
        ]

    def line_after(self, prefix: str) -> str:
        """Answer the rest of the next line of stdout, which must begin so."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith(prefix), f"{line!r} {self.stderr() if not line else ''}"
        return line.removeprefix(prefix).strip()

    def stderr(self) -> str:
        assert self.popen.stderr is not None
        return self.popen.stderr.read()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and answer the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(STOP_TIMEOUT_S)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """A function that starts a program of this Python."""
    with ExitStack() as stack:

        def start(*args: str, addresses_count: int = 1, **env: str) -> Process:
            popen = subprocess.Popen(
                [sys.executable, "-W", "error", *args],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **env},
            )
            stack.enter_context(popen)
            stack.callback(popen.kill)
            return Process(popen, addresses_count)

        yield start


def spi(client: Any, method: str, request: Any, response_type: Any) -> Any:
    return client.unary(f"/mmesh.ModelRuntime/{method}", request, response_type)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_example_runtime_stops_while_a_client_stays_connected(
    start: Any, connect: Any, number: signal.Signals
) -> None:
    process = start("-m", "mm.testing.example_runtime", "0", "--start-delay", "0")
    client = connect(process.targets[0])
    spi(client, "runtimeStatus", mmesh.RuntimeStatusRequest(), mmesh.RuntimeStatusResponse)
    assert process.stop(number) == 0
    assert process.stderr() == ""


def test_the_example_runtime_as_a_command(start: Any, connect: Any, tmp_path: Path) -> None:
    process = start(
        *("-m", "mm", "runtime", "example", f"unix://{tmp_path}/r.sock,0", "3"),
        *("--start-delay", "0", "--capacity", "123456789"),
        addresses_count=2,
        RS_METHOD_INFOS="mmesh.ExamplePredictor/predict=1",
    )
    management, serving = (connect(target) for target in process.targets)
    status = spi(
        management, "runtimeStatus", mmesh.RuntimeStatusRequest(), mmesh.RuntimeStatusResponse
    )
    assert status.capacity_in_bytes == 123456789
    assert set(status.method_infos) == {"mmesh.ExamplePredictor/predict"}
    load = mmesh.LoadModelRequest(model_id="m", model_path="SIZE_1_0_0")
    assert spi(management, "loadModel", load, mmesh.LoadModelResponse).max_concurrency == 3
    answer = serving.unary(
        "/mmesh.ExamplePredictor/predict",
        mmesh.PredictRequest(text="x"),
        mmesh.PredictResponse,
        metadata=[("mm-model-id", "m")],
    )
    assert answer.results[0].category == "classification for x by model m"
    assert process.stop() == 0
    assert not (tmp_path / "r.sock").exists()


def test_the_sklearn_runtime_as_a_command(start: Any, connect: Any, tmp_path: Path) -> None:
    samples, labels = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=500).fit(samples, labels)
    joblib.dump(model, tmp_path / "iris.joblib")
    process = start(
        *("-m", "mm", "runtime", "sklearn", "--root", str(tmp_path), "--port", "0"),
        *("--capacity", "64MiB", "--default-size", "2MiB", "--threads", "3"),
    )
    client = connect(process.targets[0])
    status = spi(client, "runtimeStatus", mmesh.RuntimeStatusRequest(), mmesh.RuntimeStatusResponse)
    assert status.capacity_in_bytes == 64 * 2**20
    assert status.default_model_size_in_bytes == 2 * 2**20
    load = mmesh.LoadModelRequest(model_id="iris", model_path="iris.joblib")
    assert spi(client, "loadModel", load, mmesh.LoadModelResponse).size_in_bytes > 500
    tensor = oip.ModelInferRequestInferInputTensor(name="x", datatype="FP64", shape=[150, 4])
    request = oip.ModelInferRequest(
        model_name="iris", inputs=[tensor], raw_input_contents=[samples.tobytes()]
    )
    answer = client.unary(
        "/inference.GRPCInferenceService/ModelInfer", request, oip.ModelInferResponse
    )
    assert answer.raw_output_contents == [model.predict(samples).astype("<i8").tobytes()]
    assert process.stop() == 0


def test_a_load_that_never_ends_does_not_hold_up_the_stop(start: Any, connect: Any) -> None:
    process = start("-c", HUNG_RUNTIME)
    client = connect(process.targets[0])
    load = client.channel.unary_unary("/mmesh.ModelRuntime/loadModel").future(
        bytes(mmesh.LoadModelRequest(model_id="m")), timeout=60
    )
    process.line_after("loading")
    assert process.stop() == 0
    assert load.code() is grpc.StatusCode.UNAVAILABLE
    assert "stopping with a load or call that has not ended" in process.stderr()


def test_a_runtime_that_cannot_say_where_it_listens_serves_all_the_same() -> None:
    with (
        open("/dev/full", "wb") as full,
        subprocess.Popen(
            [sys.executable, "-m", "mm", "runtime", "example", "0"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stderr is not None
        line = process.stderr.readline()
        told = r"listening on (127\.0\.0\.1):(\d+); standard output cannot be written: No space "
        match = re.search(told, line)
        assert match, line
        socket.create_connection((match[1], int(match[2]))).close()
        process.terminate()
        assert process.wait(STOP_TIMEOUT_S) == 0


@pytest.mark.parametrize(
    ("args", "env", "text"),
    [
        (["example", "nowhere"], {}, "address 'nowhere'"),
        (["example", "203.0.113.1:80"], {}, "cannot listen on 203.0.113.1:80"),
        (["example"], {"RS_METHOD_INFOS": "a.B/c=x"}, "RS_METHOD_INFOS: 'a.B/c=x'; allowed is"),
        (["sklearn", "--root", "/nowhere"], {}, "the model root '/nowhere' is no directory"),
        (["sklearn", "--root", "/", "--capacity", "much"], {}, "--capacity 'much'; allowed are"),
        (
            ["sklearn", "--capacity", "0"],
            {},
            "--capacity '0'; with --default-size 1MiB at least 10485760 bytes are needed",
        ),
        (
            ["sklearn", "--capacity", f"{2**63}"],
            {},
            "--capacity '9223372036854775808'; at most 9223372036854775807 bytes are allowed",
        ),
        (["sklearn", "--default-size", "0"], {}, "--default-size '0'; at least 8192 bytes"),
    ],
)
def test_what_prevents_the_start_is_one_line(
    start: Any, args: list[str], env: dict[str, str], text: str
) -> None:
    process = start("-m", "mm", "runtime", *args, addresses_count=0, **env)
    assert process.popen.wait(STOP_TIMEOUT_S) in (1, 2)
    [line] = process.stderr().splitlines()
    assert text in line


def test_mm_itself_imports_nothing_heavy() -> None:
    """`mm serve` shares the package: numpy and scikit-learn are the runtime's alone."""
    code = (
        "import sys, mm.runtime, mm.runtime.process, mm.cli.runtime;"
        "print(sorted({'numpy', 'sklearn', 'joblib', 'grpc'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
