"""A base class for runtimes that speak the Open Inference Protocol: arrays in, arrays out.

Serves the six methods of ``inference.GRPCInferenceService``; whoever writes a runtime sees numpy
arrays only. An answer travels in the form in which the question came, typed or raw.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic

import mm
from mm.errors import StatusCode
from mm.pb import inference as oip
from mm.runtime.base import ModelRuntime, ModelT, serves
from mm.runtime.call import CallError
from mm.runtime.tensors import Array, InvalidTensorError, contents_of, decode, encode, raw_of

SERVICE: Final = "inference.GRPCInferenceService"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What ModelMetadata tells of a tensor; -1 in the shape: any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def as_message(self) -> oip.ModelMetadataResponseTensorMetadata:
        """Answer the protocol's form."""
        return oip.ModelMetadataResponseTensorMetadata(
            name=self.name, datatype=self.datatype, shape=list(self.shape)
        )


@dataclass(frozen=True, slots=True)
class NamedModel(Generic[ModelT]):
    """A loaded model and its id, which the protocol wants back in every answer."""

    model_id: str
    model: ModelT


class InferenceRuntime(ModelRuntime[NamedModel[ModelT]]):
    """A runtime of models from arrays to arrays.

    Instead of ``load``, ``unload`` and ``size`` of the base class, fill in those that end in
    ``_model``, ``predict`` and what describes a model.
    """

    platform: str = ""

    @abstractmethod
    def load_model(self, model_id: str, model_type: str, path: str, key: str) -> ModelT:
        """Load a model and answer it; type, path and key are as registered."""

    @abstractmethod
    def size_of_model(self, model: ModelT) -> int:
        """Answer the bytes that a loaded model takes."""

    def unload_model(self, model: ModelT) -> None:
        """Free what is not freed by forgetting the model."""

    @abstractmethod
    def predict(
        self, model: ModelT, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> Mapping[str, Array]:
        """Answer the outputs asked for by name; none: the usual ones.

        BYTES inputs are arrays of ``bytes`` objects.
        """

    @abstractmethod
    def describe(self, model: ModelT) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
        """Answer the inputs and the outputs of a model."""

    # --- the base class ---------------------------------------------------------------------------

    def load(self, model_id: str, model_type: str, path: str, key: str) -> NamedModel[ModelT]:
        """Load."""
        return NamedModel(model_id, self.load_model(model_id, model_type, path, key))

    def size(self, model: NamedModel[ModelT]) -> int:
        """Measure."""
        return self.size_of_model(model.model)

    def unload(self, model: NamedModel[ModelT]) -> None:
        """Unload."""
        self.unload_model(model.model)

    # --- the protocol -----------------------------------------------------------------------------

    @serves(f"{SERVICE}/ServerLive", oip.ServerLiveRequest, needs_model=False)
    def server_live(self, request: oip.ServerLiveRequest) -> oip.ServerLiveResponse:
        """Answer that the server is up."""
        del request
        return oip.ServerLiveResponse(live=True)

    @serves(f"{SERVICE}/ServerReady", oip.ServerReadyRequest, needs_model=False)
    def server_ready(self, request: oip.ServerReadyRequest) -> oip.ServerReadyResponse:
        """Answer that models can be called."""
        del request
        return oip.ServerReadyResponse(ready=True)

    @serves(f"{SERVICE}/ServerMetadata", oip.ServerMetadataRequest, needs_model=False)
    def server_metadata(self, request: oip.ServerMetadataRequest) -> oip.ServerMetadataResponse:
        """Answer what server this is."""
        del request
        return oip.ServerMetadataResponse(name=f"mm-{self.platform}", version=mm.__version__)

    @serves(f"{SERVICE}/ModelReady", oip.ModelReadyRequest, id_path=(1,))
    def model_ready(
        self, model: NamedModel[ModelT], request: oip.ModelReadyRequest
    ) -> oip.ModelReadyResponse:
        """Answer that a model is loaded; the call has ended with NOT_FOUND if it is not."""
        del model
        _refuse_version(request.version)
        return oip.ModelReadyResponse(ready=True)

    @serves(f"{SERVICE}/ModelMetadata", oip.ModelMetadataRequest, id_path=(1,))
    def model_metadata(
        self, model: NamedModel[ModelT], request: oip.ModelMetadataRequest
    ) -> oip.ModelMetadataResponse:
        """Answer a model's inputs and outputs."""
        _refuse_version(request.version)
        inputs, outputs = self.describe(model.model)
        return oip.ModelMetadataResponse(
            name=model.model_id,
            platform=self.platform,
            inputs=[spec.as_message() for spec in inputs],
            outputs=[spec.as_message() for spec in outputs],
        )

    @serves(f"{SERVICE}/ModelInfer", oip.ModelInferRequest, id_path=(1,))
    def model_infer(
        self, model: NamedModel[ModelT], request: oip.ModelInferRequest
    ) -> oip.ModelInferResponse:
        """Answer what the model says."""
        _refuse_version(request.model_version)
        inputs = decode_inputs(request)
        answers = self.predict(model.model, inputs, [output.name for output in request.outputs])
        response = oip.ModelInferResponse(model_name=model.model_id, id=request.id)
        for name, array in answers.items():
            head, values = encode(name, array)
            if request.raw_input_contents:
                response.raw_output_contents.append(raw_of(head.datatype, values))
            else:
                head.contents = contents_of(head.datatype, values)
            response.outputs.append(head)
        return response


def decode_inputs(request: oip.ModelInferRequest) -> dict[str, Array]:
    """Answer the inputs of a request by name, in order."""
    raws: Sequence[Any] = request.raw_input_contents or [None] * len(request.inputs)
    if len(raws) != len(request.inputs):
        text = f"{len(raws)} raw_input_contents for {len(request.inputs)} inputs"
        raise CallError(StatusCode.INVALID_ARGUMENT, text)
    inputs: dict[str, Array] = {}
    for tensor, raw in zip(request.inputs, raws, strict=True):
        if tensor.name in inputs:
            raise InvalidTensorError(tensor.name, "is there twice")
        inputs[tensor.name] = decode(tensor, raw)
    return inputs


def _refuse_version(version: str) -> None:
    if version:
        text = f"version {version!r}: models have no versions here; register another model"
        raise CallError(StatusCode.INVALID_ARGUMENT, text)
