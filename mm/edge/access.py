"""Lets calls in whose callers have the role that they need, before anything is done for them.

Owns asking at the listeners in Python: of everything that they are given, also by the wire, which
asks the same of what it serves itself. Who has which role is ``mm.core.access``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from mm.config import Config
from mm.core.access import AUTHORIZATION, Access, Identity, Role, role_of_own
from mm.core.headers import HeaderList, carries_id
from mm.edge.h2 import IncomingCall
from mm.edge.log_context import Handler
from mm.edge.unary import ServiceTable
from mm.errors import MeshError, StatusCode

#: By what name the wire knows the certificate of a call's client; empty: it has one that nobody
#: knows. From anybody but the wire such headers are stripped.
WIRE_CERTIFICATE: Final = b"mm-wire-certificate"


class Refused(Protocol):
    """Whatever counts as ``AccessStatistics`` does."""

    @property
    def unauthenticated(self) -> int:
        """By nobody who is known."""

    @property
    def denied(self) -> int:
        """By those without the role."""


@dataclass(frozen=True, slots=True)
class AccessStatistics:
    """Calls refused since the start: by nobody who is known, and by those without the role."""

    unauthenticated: int
    denied: int


class AccessControl:
    """What the file says now, and how often it kept somebody away."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._unauthenticated = 0
        self._denied = 0
        #: What is counted elsewhere.
        self.other_counts: Callable[[], Refused] = lambda: AccessStatistics(0, 0)

    @property
    def statistics(self) -> AccessStatistics:
        """What was counted, here and in the threads of the wire."""
        others = self.other_counts()
        return AccessStatistics(
            self._unauthenticated + others.unauthenticated, self._denied + others.denied
        )

    def before(self, services: ServiceTable, handler: Handler) -> Handler:
        """Answer a handler that asks who calls; ``services`` are those behind it."""
        own = dict(services.paths())

        async def serve(call: IncomingCall) -> None:
            yields_to_ids = own.get(call.head.path)
            needed = Role.INFER
            if yields_to_ids is not None and not (yields_to_ids and carries_id(call.head.mesh)):
                needed = role_of_own(call.head.path)
            if needed is not Role.ANYBODY:
                self._admit(call, needed)
            elif not self.access.passes_tokens:
                # Nobody is asked, and what is served has no use for it: the log gets none.
                _take_token(call)
            await handler(call)

        return serve

    def _admit(self, call: IncomingCall, needed: Role) -> None:
        """Raise ``MeshError`` unless the caller has the role."""
        access = self.access
        shown = [value for name, value in call.head.metadata if name == AUTHORIZATION]
        certificate, has_certificate = self._certificate(call)
        try:
            caller, by_token = access.caller(shown, certificate, has_certificate=has_certificate)
        except MeshError:
            self._unauthenticated += 1
            raise
        refusal = caller.refusal(needed)
        if refusal:
            self._denied += 1
            raise MeshError(refusal, code=StatusCode.PERMISSION_DENIED)
        call.caller = caller.name
        if by_token and not access.passes_tokens:
            # It is ours: neither runtimes nor observers get it.
            _take_token(call)

    def _certificate(self, call: IncomingCall) -> tuple[Identity | None, bool]:
        """Answer who the certificate of a call's client says it is, and whether there is one."""
        if call.link.is_wire:
            told = [value for name, value in call.head.mesh if name == WIRE_CERTIFICATE]
            return (self.access.named(told[0].decode()) if told else None), bool(told)
        names = call.link.certificate_names
        return self.access.of_certificate(names), bool(names)


def remarks_of(access: Access, config: Config) -> Iterator[str]:
    """Answer what is allowed, and most likely not meant."""
    if config.tls.client_auth == "none" and any(i.certificate_names for i in access.identities):
        yield (
            "certificateNames say nothing: with MM_TLS_CLIENT_AUTH=none no client is asked for"
            " a certificate"
        )


def _take_token(call: IncomingCall) -> None:
    call.head.metadata = _without_token(call.head.metadata)
    call.headers = _without_token(call.headers)


def _without_token(headers: HeaderList) -> HeaderList:
    return [header for header in headers if header[0] != AUTHORIZATION]
