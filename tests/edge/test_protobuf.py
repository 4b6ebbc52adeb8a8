"""Bytes from outside become messages as protobuf says, or are refused."""

from __future__ import annotations

from dataclasses import dataclass

import betterproto2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.edge.protobuf import NotAMessageError, decode, encode
from mm.pb import inference, mmesh
from mm.pb.message_pool import default_message_pool


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xff\xff", id="a number without an end"),
        pytest.param(b"\x0a", id="a tag without a value"),
        pytest.param(b"\x0a\x05ab", id="a text cut off"),
        pytest.param(b"\x0a\x02\xff\xfe", id="a text that is no UTF-8"),
        pytest.param(b"\x0f\x01", id="a wire type that there is not"),
        pytest.param(b"\x00\x01", id="field 0"),
        pytest.param(b"\x0b", id="a group without an end"),
        pytest.param(b"\x0d\x01", id="a fixed number cut off"),
        pytest.param(b"\x0a" + b"\xff" * 11, id="a length without an end"),
    ],
)
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(NotAMessageError, match="not a valid GetStatusRequest"):
        decode(mmesh.GetStatusRequest, data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x08\x01", id="a number where a text belongs"),
        pytest.param(b"\xf2\x01\x03abc", id="a field that nobody knows"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_what_says_nothing_that_is_known(data: bytes) -> None:
    assert decode(mmesh.GetStatusRequest, data) == mmesh.GetStatusRequest()


def test_wrong_types_inside() -> None:
    """A model type that is a number used to reach the registry, where it is no record."""
    data = b"\x0a\x01m\x12\x02\x08\x01\x18\x01"
    assert decode(mmesh.RegisterModelRequest, data) == mmesh.RegisterModelRequest(
        model_id="m", model_info=mmesh.ModelInfo(), load_now=True
    )


def test_the_last_of_two_values_counts() -> None:
    data = bytes(mmesh.GetStatusRequest(model_id="first")) + bytes(
        mmesh.GetStatusRequest(model_id="last")
    )
    assert decode(mmesh.GetStatusRequest, data).model_id == "last"


def test_nested_and_repeated_fields_survive() -> None:
    request = inference.ModelInferRequest(
        model_name="größe",
        parameters={"a": inference.InferParameter(int64_param=-5)},
        inputs=[
            inference.ModelInferRequestInferInputTensor(
                name="x",
                datatype="FP32",
                shape=[2, -1],
                contents=inference.InferTensorContents(fp32_contents=[1.5, -2.0]),
            )
        ],
        raw_input_contents=[b"\0\xff", b""],
    )
    assert decode(inference.ModelInferRequest, bytes(request)) == request
    assert encode(request) == bytes(request)


@pytest.mark.parametrize(
    "message",
    [
        mmesh.RegisterModelRequest(model_id="m", min_copies=0, pinned=False),
        mmesh.RegisterModelRequest(model_info=mmesh.ModelInfo()),
        mmesh.ModelStatusInfo(
            status=mmesh.ModelStatusInfoModelStatus.LOADED,
            errors=["", "größe"],
            model_copy_infos=[
                mmesh.ModelStatusInfoModelCopyInfo(location="a", time=1 << 63),
                mmesh.ModelStatusInfoModelCopyInfo(),
            ],
        ),
        mmesh.ModelStatusInfo(status=mmesh.ModelStatusInfoModelStatus(77)),
        mmesh.RuntimeStatusResponse(
            method_infos={"a": mmesh.RuntimeStatusResponseMethodInfo(id_injection_path=[1, 300])}
        ),
    ],
    ids=["zeros that are there", "an empty message inside", "lists", "a new status", "a map"],
)
def test_there_and_back(message: betterproto2.Message) -> None:
    assert encode(message) == bytes(message)
    assert decode(type(message), encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        mmesh.RegisterModelRequest(min_copies=1 << 31),
        mmesh.RegisterModelRequest(model_id="\ud800"),
        mmesh.ModelStatusInfo(errors=["\ud800"]),
    ],
    ids=["too large", "no text", "no text in a list"],
)
def test_values_that_no_bytes_can_hold(message: betterproto2.Message) -> None:
    with pytest.raises(ValueError, match=r"range|surrogate|encode"):
        encode(message)


@pytest.mark.parametrize(
    "message_type",
    [
        message_type
        for message_type, url in default_message_pool.type_to_url.items()
        if not url.startswith("type.googleapis.com/google.")
    ],
    ids=lambda message_type: message_type.__name__,
)
def test_every_message_of_ours_is_read_strictly(message_type: type[betterproto2.Message]) -> None:
    """To betterproto2 this would be an empty message; so the descriptors were found."""
    with pytest.raises(NotAMessageError):
        decode(message_type, b"\xff\xff\xff")
    assert decode(message_type, b"") == message_type()


def test_messages_without_descriptors() -> None:
    """Somebody's own runtime: betterproto2 is all there is."""

    @dataclass
    class Foreign(betterproto2.Message):
        name: str = betterproto2.field(1, betterproto2.TYPE_STRING)

    assert decode(Foreign, b"\x0a\x01a") == Foreign(name="a")
    assert encode(Foreign(name="a")) == b"\x0a\x01a"
    with pytest.raises(NotAMessageError, match="not a valid Foreign"):
        decode(Foreign, b"\x0a")


@given(st.binary(max_size=40))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        message = decode(mmesh.RegisterModelRequest, data)
    except NotAMessageError:
        return
    assert isinstance(message.model_id, str)
    assert isinstance(message.last_used_time, int)
    info = message.model_info
    assert info is None or isinstance(info.type, str)
    assert decode(mmesh.RegisterModelRequest, bytes(message)) == message
