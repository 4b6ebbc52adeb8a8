"""Ids in encoded messages, against a real protobuf implementation's reading of the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from mm.core.protobuf_ids import (
    FIELDS_MAX,
    FieldWalk,
    MalformedMessageError,
    encode_varint,
    extract_id,
    injection_suffix,
)


def _make_message_class() -> type:
    """Node { string name = 1; Node child = 2; bytes data = 300; fixed32 f = 4; fixed64 g = 5; }."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="node.proto", package="t", syntax="proto3")
    node = file.message_type.add(name="Node")
    for name, number, kind in [
        ("name", 1, field.TYPE_STRING),
        ("data", 300, field.TYPE_BYTES),
        ("f", 4, field.TYPE_FIXED32),
        ("g", 5, field.TYPE_FIXED64),
        ("n", 6, field.TYPE_INT64),
    ]:
        node.field.add(name=name, number=number, type=kind, label=field.LABEL_OPTIONAL)
    node.field.add(
        name="child",
        number=2,
        type=field.TYPE_MESSAGE,
        type_name=".t.Node",
        label=field.LABEL_OPTIONAL,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Node"))


Node = _make_message_class()


def _read(message: object, path: Sequence[int]) -> str:
    for _ in path[:-1]:
        message = message.child  # type: ignore[attr-defined]
    return message.name  # type: ignore[attr-defined,no-any-return]


def test_absent_present_and_empty() -> None:
    assert extract_id(b"", [1]) is None
    assert extract_id(Node(n=7, f=1, g=2, data=b"x" * 200).SerializeToString(), [1]) is None
    assert extract_id(Node(name="a", n=-1).SerializeToString(), [1]) == "a"
    assert extract_id(b"\x0a\x00", [1]) == ""
    assert extract_id(Node(child=Node(name="é" * 100)).SerializeToString(), [2, 1]) == "é" * 100
    assert extract_id(Node(name="outer").SerializeToString(), [2, 1]) is None


def test_last_string_wins_and_embedded_messages_merge() -> None:
    twice = Node(name="first").SerializeToString() + Node(name="second").SerializeToString()
    assert extract_id(twice, [1]) == "second"
    # The second child has no name, so the merged message keeps the first one's.
    merged = (
        Node(child=Node(name="inner")).SerializeToString()
        + Node(child=Node(n=4)).SerializeToString()
    )
    assert extract_id(merged, [2, 1]) == "inner" == Node.FromString(merged).child.name


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a",  # a tag without its length
        b"\x0a\x05ab",  # longer than the message
        b"\x08\x01",  # field 1 as a varint
        b"\x0d\x00\x00\x00\x00",  # field 1 as fixed32
        b"\x0a\x02\xff\xfe",  # not UTF-8
        b"\x23",  # a group that never ends
        b"\x24",  # a group that never began
        b"\x25\x00",  # half a fixed32
        b"\xff" * 11,  # a number without end
        b"\x02\x00",  # field number 0
        b"\x3e",  # wire type 6
    ],
)
def test_malformed(message: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        extract_id(message, [1])


def test_inner_length_must_stay_inside_its_parent() -> None:
    with pytest.raises(MalformedMessageError):
        extract_id(b"\x12\x02\x0a\x05abcde", [2, 1])


def test_groups_are_stepped_over() -> None:
    assert extract_id(b"\x1b\x0a\x01x\x1c" + b"\x0a\x01y", [1]) == "y"
    assert extract_id(b"\x0a\x01y" + b"\x1b\x0a\x01x\x1c", [1]) == "y"


def test_number_of_fields_is_bounded() -> None:
    message = b"\x30\x01" * (FIELDS_MAX + 1)
    with pytest.raises(MalformedMessageError, match="fields"):
        extract_id(message, [1])
    with pytest.raises(MalformedMessageError, match="fields"):
        FieldWalk().feed(message)
    assert extract_id(b"\x30\x01" * FIELDS_MAX, [1]) is None


_nodes = st.deferred(
    lambda: st.builds(
        Node,
        name=st.text(),
        data=st.binary(max_size=300),
        f=st.integers(0, 2**32 - 1),
        g=st.integers(0, 2**64 - 1),
        n=st.integers(-(2**63), 2**63 - 1),
        child=st.none() | _nodes,
    )
)
_paths = st.sampled_from([[1], [2, 1], [2, 2, 1]])


@given(st.lists(_nodes, max_size=3), _paths, st.text(min_size=1, max_size=300))
def test_appended_id_is_what_a_parser_reads(
    parts: list[object], path: list[int], model_id: str
) -> None:
    message = b"".join(part.SerializeToString() for part in parts)  # type: ignore[attr-defined]
    injected = message + injection_suffix(path, model_id)
    parsed, before = Node.FromString(injected), Node.FromString(message)
    assert _read(parsed, path) == model_id
    assert extract_id(injected, path) == model_id
    assert (extract_id(message, path) or "") == _read(before, path)
    # Nothing else changed.
    holder = parsed
    for _ in path[:-1]:
        holder = holder.child
    holder.name = _read(before, path)
    if _reach(before, path):
        assert parsed == before


def _reach(message: object, path: Sequence[int]) -> bool:
    for _ in path[:-1]:
        if not message.HasField("child"):  # type: ignore[attr-defined]
            return False
        message = message.child  # type: ignore[attr-defined]
    return True


@given(_nodes, st.integers(1, 9))
def test_walk_ends_at_a_boundary_however_the_bytes_arrive(message: object, step: int) -> None:
    encoded = message.SerializeToString()  # type: ignore[attr-defined]
    walk = FieldWalk()
    for at in range(0, len(encoded), step):
        walk.feed(encoded[at : at + step])
    assert walk.at_boundary


@given(st.binary(max_size=40))
def test_walk_accepts_exactly_what_extraction_accepts(message: bytes) -> None:
    walk = FieldWalk()
    try:
        extract_id(message, [2**28])
    except MalformedMessageError:
        accepted = False
    else:
        accepted = True
    try:
        walk.feed(message)
    except MalformedMessageError:
        assert not accepted
    else:
        assert walk.at_boundary == accepted


def test_a_message_that_would_swallow_the_id_does_not_end_at_a_boundary() -> None:
    suffix = injection_suffix([1], "honest")
    evil = b"\x0a\x04evil" + encode_varint(99 << 3 | 2) + encode_varint(len(suffix))
    assert Node.FromString(evil + suffix).name == "evil"  # why the walk exists
    walk = FieldWalk()
    walk.feed(evil)
    assert not walk.at_boundary
