"""Calls to copy and paste, for the instances that `mm demo --keep` leaves up."""

from __future__ import annotations

import json
import sys
from typing import Final

from mm.demo.traffic import Target
from mm.demo.training import TrainedModel

_PYTHON: Final = """\
{python} - <<'END'
import asyncio
from grpclib.client import Channel
from mm.pb.inference import (
    GrpcInferenceServiceStub, InferTensorContents, ModelInferRequest,
    ModelInferRequestInferInputTensor,
)

async def main():
    async with Channel("{host}", {port}) as channel:
        tensor = ModelInferRequestInferInputTensor(
            name="input-0", datatype="FP64", shape={shape},
            contents=InferTensorContents(fp64_contents={values}),
        )
        response = await GrpcInferenceServiceStub(channel).model_infer(
            ModelInferRequest(model_name="{model_id}", inputs=[tensor]),
            metadata={{"mm-model-id": "{model_id}"}},
        )
        print(response.model_name, response.outputs[0])  # scikit-learn says {expected}

asyncio.run(main())
END"""


def model_commands(target: Target, model: TrainedModel) -> tuple[str, ...]:
    """Answer calls of the management API."""
    address = f"{target.host}:{target.port}"
    mm = f"{sys.executable} -m mm"
    return (
        f"{mm} model status {model.model_id} --address {address}",
        f"{mm} model ensure-loaded {model.model_id} --address {address}",
        f"{mm} model register again --type sklearn --path {model.file} --wait --address {address}",
        f"{mm} model unregister again --address {address}",
    )


def python_client(target: Target, model: TrainedModel) -> str:
    """Answer a shell command that runs a Python client."""
    sample = model.samples[0]
    return _PYTHON.format(
        python=sys.executable,
        host=target.host,
        port=target.port,
        model_id=model.model_id,
        shape=[len(sample.rows), len(sample.rows[0])],
        values=[value for row in sample.rows for value in row],
        expected=list(sample.expected),
    )


def grpcurl(target: Target, model: TrainedModel) -> str:
    """Answer the same call for grpcurl, which learns the messages by reflection.

    The header goes with the call alone (-H would send it with the reflection call too, which would
    then be the model's to answer).
    """
    sample = model.samples[0]
    message = {
        "model_name": model.model_id,
        "inputs": [
            {
                "name": "input-0",
                "datatype": "FP64",
                "shape": [len(sample.rows), len(sample.rows[0])],
                "contents": {"fp64_contents": [value for row in sample.rows for value in row]},
            }
        ],
    }
    return (
        f"grpcurl -plaintext -rpc-header 'mm-model-id: {model.model_id}' "
        f"-d '{json.dumps(message)}' "
        f"{target.host}:{target.port} inference.GRPCInferenceService/ModelInfer"
    )


def sheet(target: Target, models: tuple[TrainedModel, ...]) -> str:
    """Answer everything to paste, with the model of the fewest values: it fits on a screen."""
    model = min(models, key=lambda m: len(m.samples[0].rows) * len(m.samples[0].rows[0]))
    parts = (
        ("manage models", "\n".join(model_commands(target, model))),
        ("a Python client", python_client(target, model)),
        ("grpcurl", grpcurl(target, model)),
    )
    return "\n\n".join(f"# {title}\n{text}" for title, text in parts)
