"""Messages from outside, read as protobuf says and not as betterproto2 does.

betterproto2 takes what is cut off in the middle for complete, and puts a number into a field of
text if the wire says so: bytes of a client would become records that nobody can read. So what
comes from outside goes through protobuf's own parser first, with the descriptors that ``make
proto`` writes; fields that it does not know are dropped there.
"""

from __future__ import annotations

import struct
from functools import cache
from importlib import resources
from typing import Any, Final, TypeVar

import betterproto2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from mm.pb.message_pool import default_message_pool

M = TypeVar("M", bound=betterproto2.Message)

#: Read when the module is loaded, not when the event loop runs.
DESCRIPTORS: Final = resources.files("mm.pb").joinpath("descriptors.bin").read_bytes()

#: What betterproto2 raises for bytes that are no message.
_PARSE_ERRORS: Final = (
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    NotImplementedError,
    struct.error,
)


class NotAMessageError(ValueError):
    """The bytes are no message of the wanted type; the text says which type that is."""


def decode(message_type: type[M], data: bytes) -> M:
    """Answer the message that the bytes are; raises ``NotAMessageError``."""
    strict_type = _strict_type(message_type)
    try:
        if strict_type is not None:
            strict = strict_type.FromString(data)
            # A field of the wrong wire type counts as unknown, too.
            strict.DiscardUnknownFields()
            data = strict.SerializeToString()
        return message_type.parse(data)
    except (DecodeError, *_PARSE_ERRORS) as exc:
        raise NotAMessageError(f"not a valid {message_type.__name__}: {exc}") from exc


def parse(message_class: Any, data: bytes) -> Any:
    """Answer a message of protobuf's own class; raises ``NotAMessageError``."""
    try:
        return message_class.FromString(data)
    except DecodeError as exc:
        name = message_class.DESCRIPTOR.name
        raise NotAMessageError(f"not a valid {name}: {exc}") from exc


def message_class(name: str) -> Any:
    """Answer protobuf's own class of a message, which is many times as fast as betterproto2's: for
    answers with thousands of them.
    """
    return GetMessageClass(_pool().FindMessageTypeByName(name))


@cache
def _strict_type(message_type: type[betterproto2.Message]) -> Any:
    """Answer protobuf's own class for it; None if there are no descriptors."""
    url = default_message_pool.type_to_url.get(message_type, "")
    try:
        return GetMessageClass(_pool().FindMessageTypeByName(url.rpartition("/")[2]))
    except KeyError:
        return None


@cache
def _pool() -> Any:
    pool: Any = DescriptorPool()
    for file in FileDescriptorSet.FromString(DESCRIPTORS).file:
        pool.Add(file)
    return pool
