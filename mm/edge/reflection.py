"""gRPC server reflection (v1 and v1alpha), from the descriptor set that ``make proto`` writes.

grpclib's own reflection finds no descriptors behind betterproto2's messages. Extensions are not
served: proto3 has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources
from types import ModuleType
from typing import Final

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from mm.edge.h2 import IncomingCall
from mm.edge.unary import MessageStream, ServiceTable, parse_message
from mm.errors import StatusCode
from mm.pb.grpc.reflection import v1, v1alpha

#: What clients may call on the external port. Descriptors of all others resolve, too.
LISTED: Final = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
    "mmesh.ModelMesh",
)
#: Of these, what is at its own port where there is one (``mm.edge.services``).
MANAGEMENT: Final = "mmesh.ModelMesh"
INFERENCE: Final = "inference.GRPCInferenceService"


#: Read when the module is loaded, not when the event loop runs.
_ENCODED: Final = resources.files("mm.pb").joinpath("descriptors.bin").read_bytes()


class Descriptors:
    """The descriptor set, by file and by symbol."""

    def __init__(self, encoded: bytes) -> None:
        self._files = {file.name: file for file in FileDescriptorSet.FromString(encoded).file}
        self._symbols = {symbol: file for file in self._files.values() for symbol in _symbols(file)}

    def file(self, name: str) -> list[bytes] | None:
        """Answer a file and what it imports, itself first; None if there is none."""
        file = self._files.get(name)
        return None if file is None else self._with_imports(file)

    def containing(self, symbol: str) -> list[bytes] | None:
        """Answer the file that declares a symbol, and what it imports."""
        file = self._symbols.get(symbol.removeprefix("."))
        return None if file is None else self._with_imports(file)

    def _with_imports(self, file: FileDescriptorProto) -> list[bytes]:
        names = [file.name]
        for name in names:
            names += [needed for needed in self._files[name].dependency if needed not in names]
        return [self._files[name].SerializeToString() for name in names]


def _symbols(file: FileDescriptorProto) -> Iterator[str]:
    prefix = file.package + "." if file.package else ""
    for service in file.service:
        yield prefix + service.name
        yield from (f"{prefix}{service.name}.{method.name}" for method in service.method)
    yield from (prefix + enum.name for enum in file.enum_type)
    yield from _message_symbols(prefix, file.message_type)


def _message_symbols(prefix: str, messages: Iterable[DescriptorProto]) -> Iterator[str]:
    for message in messages:
        name = prefix + message.name
        yield name
        yield from (f"{name}.{field.name}" for field in message.field)
        yield from (f"{name}.{enum.name}" for enum in message.enum_type)
        yield from _message_symbols(name + ".", message.nested_type)


class Reflection:
    """One version of the service. The two differ by their package's name alone."""

    def __init__(
        self, descriptors: Descriptors, messages: ModuleType, listed: Iterable[str] = LISTED
    ) -> None:
        self._descriptors = descriptors
        self._listed = tuple(listed)
        self._messages = messages

    async def serve(self, call: IncomingCall) -> None:
        """Answer questions until the client has no more."""
        stream = MessageStream(call)
        while (data := await stream.read()) is not None:
            request = parse_message(self._messages.ServerReflectionRequest, data)
            await stream.send(bytes(self._answer(request)))
        if not call.headers_sent:
            call.send_headers()
        call.send_status(StatusCode.OK)

    def _answer(self, request: v1.ServerReflectionRequest) -> v1.ServerReflectionResponse:
        made = self._messages
        answer: v1.ServerReflectionResponse = made.ServerReflectionResponse(
            valid_host=request.host, original_request=request
        )
        found: list[bytes] | None = None
        if request.list_services is not None:
            names = [made.ServiceResponse(name=name) for name in self._listed]
            answer.list_services_response = made.ListServiceResponse(service=names)
            return answer
        if request.file_by_filename is not None:
            found = self._descriptors.file(request.file_by_filename)
        elif request.file_containing_symbol is not None:
            found = self._descriptors.containing(request.file_containing_symbol)
        if found is None:
            answer.error_response = made.ErrorResponse(
                error_code=StatusCode.NOT_FOUND, error_message="not found"
            )
        else:
            answer.file_descriptor_response = made.FileDescriptorResponse(
                file_descriptor_proto=found
            )
        return answer


def add_reflection(services: ServiceTable, listed: Iterable[str] = LISTED) -> None:
    """Serve both versions, also to calls with a model id: tools send the headers of the call that
    they prepare along with the question for its messages.
    """
    listed = tuple(listed)
    descriptors = Descriptors(_ENCODED)
    for package, messages in (("v1", v1), ("v1alpha", v1alpha)):
        services.add(
            f"/grpc.reflection.{package}.ServerReflection/ServerReflectionInfo",
            Reflection(descriptors, messages, listed).serve,
        )
