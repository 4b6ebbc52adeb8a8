"""Tensors of the Open Inference Protocol as numpy arrays, and back.

Every disagreement between a tensor's datatype, shape and values is an ``InvalidTensorError``
that names the tensor and the value. Values travel typed (``contents``) or as raw little-endian
bytes; BYTES elements in raw form each have their length before them, four bytes.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mm.errors import StatusCode
from mm.pb.inference import (
    InferTensorContents,
    ModelInferRequestInferInputTensor,
    ModelInferResponseInferOutputTensor,
)
from mm.runtime.call import CallError

Array = NDArray[Any]

BYTES: Final = "BYTES"

#: Datatype -> (numpy dtype, field of InferTensorContents; None: raw only).
DATATYPES: Final[dict[str, tuple[str, str | None]]] = {
    "BOOL": ("?", "bool_contents"),
    "UINT8": ("<u1", "uint_contents"),
    "UINT16": ("<u2", "uint_contents"),
    "UINT32": ("<u4", "uint_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "INT8": ("<i1", "int_contents"),
    "INT16": ("<i2", "int_contents"),
    "INT32": ("<i4", "int_contents"),
    "INT64": ("<i8", "int64_contents"),
    "FP16": ("<f2", None),
    "FP32": ("<f4", "fp32_contents"),
    "FP64": ("<f8", "fp64_contents"),
    BYTES: ("O", "bytes_contents"),
}

#: What an output is sent as, by the kind of its numpy dtype.
_OUTPUT_DATATYPES: Final = {"b": "BOOL", "i": "INT64", "u": "UINT64", "f": "FP64"}

_DIMENSIONS_MAX: Final = 16
_LENGTH: Final = struct.Struct("<I")


class InvalidTensorError(CallError):
    """A tensor of a request is wrong."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(StatusCode.INVALID_ARGUMENT, f"input {name!r}: {what}")


def decode(tensor: ModelInferRequestInferInputTensor, raw: bytes | None) -> Array:
    """Answer an input as an array; ``raw`` are its bytes if the request carries raw ones."""
    name = tensor.name
    if tensor.datatype not in DATATYPES:
        raise InvalidTensorError(
            name, f"datatype {tensor.datatype!r}; allowed are {', '.join(DATATYPES)}"
        )
    shape = tuple(tensor.shape)
    if len(shape) > _DIMENSIONS_MAX or any(not 0 <= size < 2**31 for size in shape):
        raise InvalidTensorError(
            name, f"shape {list(shape)}; allowed are up to {_DIMENSIONS_MAX} sizes from 0 to 2^31-1"
        )
    values = (
        _from_contents(name, tensor.datatype, tensor.contents or InferTensorContents())
        if raw is None
        else _from_raw(tensor, raw)
    )
    if values.size != math.prod(shape):
        raise InvalidTensorError(
            name,
            f"{values.size} values, but shape {list(shape)} has {math.prod(shape)}",
        )
    return values.reshape(shape)


def _from_raw(tensor: ModelInferRequestInferInputTensor, raw: bytes) -> Array:
    if tensor.contents is not None:
        raise InvalidTensorError(tensor.name, "values both in contents and in raw_input_contents")
    if tensor.datatype == BYTES:
        return _array_of_bytes(_split_bytes(tensor.name, raw))
    dtype = np.dtype(DATATYPES[tensor.datatype][0])
    if len(raw) % dtype.itemsize:
        raise InvalidTensorError(
            tensor.name,
            f"{len(raw)} raw bytes are no whole number of {tensor.datatype} values"
            f" of {dtype.itemsize} bytes",
        )
    return np.frombuffer(raw, dtype)


def _split_bytes(name: str, raw: bytes) -> list[bytes]:
    elements = []
    at = 0
    while at < len(raw):
        if at + _LENGTH.size > len(raw):
            raise InvalidTensorError(name, "raw BYTES end inside an element's length")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if at + length > len(raw):
            raise InvalidTensorError(name, f"raw BYTES end inside an element of {length} bytes")
        elements.append(raw[at : at + length])
        at += length
    return elements


def _from_contents(name: str, datatype: str, contents: InferTensorContents) -> Array:
    dtype, field = DATATYPES[datatype]
    if field is None:
        raise InvalidTensorError(name, f"{datatype} travels in raw_input_contents only")
    for other in {field for _, field in DATATYPES.values() if field}:
        if other != field and getattr(contents, other):
            raise InvalidTensorError(name, f"values in {other}; those of {datatype} are in {field}")
    values = getattr(contents, field)
    if datatype == BYTES:
        return _array_of_bytes(values)
    try:
        return np.array(values, dtype)  # refuses integers that the type cannot hold
    except OverflowError as exc:
        raise InvalidTensorError(name, f"a value is outside of {datatype}: {exc}") from exc


def _array_of_bytes(elements: list[bytes]) -> Array:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def encode(name: str, array: Array) -> tuple[ModelInferResponseInferOutputTensor, Array]:
    """Answer the head of an output, and its values as they will travel.

    Integers travel as INT64 (UINT64), floats as FP64 (FP32 stays), anything else as BYTES: text
    in UTF-8.
    """
    if array.dtype == np.float32:
        datatype = "FP32"
    else:
        datatype = _OUTPUT_DATATYPES.get(array.dtype.kind, BYTES)
    if datatype == BYTES:
        flat = [
            element if isinstance(element, bytes) else str(element).encode()
            for element in array.ravel().tolist()
        ]
        values = _array_of_bytes(flat)
    else:
        values = np.ascontiguousarray(array, DATATYPES[datatype][0]).ravel()
    head = ModelInferResponseInferOutputTensor(
        name=name, datatype=datatype, shape=list(array.shape)
    )
    return head, values


def contents_of(datatype: str, values: Array) -> InferTensorContents:
    """Answer values in typed form."""
    _, field = DATATYPES[datatype]
    assert field is not None
    return InferTensorContents(**{field: values.tolist()})


def raw_of(datatype: str, values: Array) -> bytes:
    """Answer values in raw form."""
    if datatype == BYTES:
        return b"".join(_LENGTH.pack(len(element)) + element for element in values)
    return values.tobytes()
