"""Calls as a runtime answers them: its table of methods, its errors, the models a call names.

Calls themselves are ``mm.edge``'s: handlers get an ``IncomingCall``, read and answer it by
``mm.edge.unary``.
"""

from __future__ import annotations

import base64

from mm.core.headers import HeaderList, carries_id, read_ids
from mm.edge.h2 import IncomingCall
from mm.edge.unary import ServiceTable
from mm.errors import InvalidRequestError, MeshError, MethodRefusedError, StatusCode

_CONTENT_TYPES = (b"application/grpc", b"application/grpc+proto")


class CallError(MeshError):
    """Ends a call with this status. ``details`` is sent as ``grpc-status-details-bin``, as is."""

    def __init__(self, code: StatusCode, message: str, *, details: bytes = b"") -> None:
        super().__init__(message, code=code)
        self.details = details

    def trailers(self) -> HeaderList:
        """Answer what is sent beside code and message."""
        if not self.details:
            return []
        return [(b"grpc-status-details-bin", base64.b64encode(self.details).rstrip(b"="))]


class Methods(ServiceTable):
    """The methods that a runtime serves at one address."""

    def __init__(self) -> None:
        super().__init__(fallback=_refuse_method)

    async def __call__(self, call: IncomingCall) -> None:
        """Serve a call."""
        content_type = call.head.content_type
        if content_type.partition(b";")[0] not in _CONTENT_TYPES:
            name = content_type.decode("latin-1")
            raise InvalidRequestError(f"content-type {name!r}; application/grpc is served")
        try:
            await super().__call__(call)
        except CallError as error:
            call.send_status(error.code, error.message, error.trailers())


async def _refuse_method(call: IncomingCall) -> None:
    raise MethodRefusedError(f"unknown method {call.method}")


def model_ids(call: IncomingCall) -> list[str]:
    """Answer the ids that the headers of a call name; the ASCII one hides the other."""
    return read_ids(call.head.mesh)[1] if carries_id(call.head.mesh) else []
