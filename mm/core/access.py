"""Who may do what: the roles of callers, as a file says them (docs/security.md).

Owns the values, the parser of the file, and the answer to who calls. Which role a method needs is
here, too; who asks is ``mm.edge.access`` and, in C, ``mm/wire/_wire_access.pxi``, with these texts.
"""

from __future__ import annotations

import enum
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Final

import msgspec

from mm.core.json_input import check_said_once, decode_entries, decode_json
from mm.errors import MeshError, StatusCode


class Role(enum.IntEnum):
    """What a caller may do; ``ANYBODY``: no role is needed."""

    ANYBODY = 0
    READ = 1
    INFER = 2
    MANAGE = 3


#: As a file names them.
ROLES: Final = {role.name.lower(): role for role in Role if role is not Role.ANYBODY}

_MODELS: Final = ("/mmesh.ModelMesh/", "/com.ibm.watson.tas.proto.TasRuntime/")
_NEEDED: Final = {
    Role.READ: (
        *(name + each for name in _MODELS for each in ("getModelStatus", "getVModelStatus")),
        *(_MODELS[0] + each for each in ("listModels", "listVModels")),
        *(_MODELS[0] + each for each in ("watchModels", "watchVModels")),
        "/inference.GRPCInferenceService/ServerMetadata",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ),
    # Probes and balancers ask without knowing anybody's secret, and hear one bit.
    Role.ANYBODY: (
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    ),
}
_ROLE_OF: Final = {path.encode(): role for role, paths in _NEEDED.items() for path in paths}


def role_of_own(path: bytes) -> Role:
    """Answer what a method of the mesh's own needs: to manage, if nothing else is said."""
    return _ROLE_OF.get(path, Role.MANAGE)


#: Longer than any token of a person's, or of an identity provider's.
TOKEN_BYTES_MAX: Final = 4096
AUTHORIZATION: Final = b"authorization"
#: RFC 6750, 2.1.
TOKEN_FORM: Final = rb"[A-Za-z0-9\-._~+/]+=*"
_BEARER = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +(" + TOKEN_FORM + rb")")
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_CERTIFICATE_NAME = re.compile(r"(CN|DNS|URI):[\x21-\x7e][\x20-\x7e]{0,253}")
#: Digests are found by so many of their bytes, which tell nothing of a token; the rest is compared
#: in constant time.
_PLACE_BYTES: Final = 8
_SETTING: Final = "MM_ACCESS_CONFIG_PATH"

#: Why nobody is known by what a call shows.
NOTHING_SHOWN: Final = (
    "no credentials: a call has to show a bearer token (authorization: Bearer TOKEN) or a"
    f" certificate of its client that are known here ({_SETTING})"
)
NOT_A_TOKEN: Final = 'the header authorization has not the form "Bearer TOKEN"'
SHOWN_TWICE: Final = "the header authorization is there more than once"
UNKNOWN_TOKEN: Final = f"the bearer token is not known here ({_SETTING})"
UNKNOWN_CERTIFICATE: Final = (
    f"no bearer token, and no name in the certificate of the client is known here ({_SETTING})"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody who may call."""

    name: str
    roles: frozenset[Role]
    #: SHA-256 of bearer tokens.
    digests: tuple[bytes, ...] = field(default=(), repr=False)
    #: Each with its kind: "CN:", "DNS:" or "URI:". Those of DNS in lower case.
    certificate_names: tuple[str, ...] = ()

    def refusal(self, needed: Role) -> str:
        """Answer why a call that needs this role is refused; empty: it is not."""
        if needed is Role.ANYBODY or needed in self.roles:
            return ""
        has = ", ".join(name for name, role in ROLES.items() if role in self.roles)
        return f'"{self.name}" may not: the call needs the role {needed.name.lower()}, not {has}'


@dataclass(frozen=True, slots=True)
class Access:
    """All of them."""

    identities: tuple[Identity, ...]
    #: The tokens go on to runtimes, with the calls.
    passes_tokens: bool = False
    _by_place: Mapping[bytes, tuple[tuple[bytes, Identity], ...]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _by_certificate: Mapping[str, Identity] = field(default_factory=dict, repr=False, compare=False)
    _by_name: Mapping[str, Identity] = field(default_factory=dict, repr=False, compare=False)

    def named(self, name: str) -> Identity | None:
        """Answer the one with this name."""
        return self._by_name.get(name)

    def of_certificate(self, names: Sequence[str]) -> Identity | None:
        """Answer whose a certificate is: the first of its names that is known says so."""
        return next((found for each in names if (found := self._by_certificate.get(each))), None)

    def of_token(self, token: bytes) -> Identity | None:
        """Answer whose a token is."""
        if len(token) > TOKEN_BYTES_MAX:
            return None
        digest = sha256(token).digest()
        for each, identity in self._by_place.get(digest[:_PLACE_BYTES], ()):
            if hmac.compare_digest(each, digest):
                return identity
        return None

    def caller(
        self, shown: Sequence[bytes], certificate: Identity | None, *, has_certificate: bool
    ) -> tuple[Identity, bool]:
        """Answer who calls, and whether by a token; raises ``MeshError``.

        ``shown``: the values of the header ``authorization``. A token that is known counts before
        a certificate; one that is not may be meant for the runtime, where the certificate is known.
        """
        if len(shown) > 1:
            raise _unknown(SHOWN_TWICE)
        match = _BEARER.fullmatch(shown[0]) if shown else None
        found = None if match is None else self.of_token(match[1])
        if found is not None:
            return found, True
        if certificate is not None:
            return certificate, False
        if not shown:
            raise _unknown(UNKNOWN_CERTIFICATE if has_certificate else NOTHING_SHOWN)
        raise _unknown(NOT_A_TOKEN if match is None else UNKNOWN_TOKEN)


def _unknown(text: str) -> MeshError:
    return MeshError(text, code=StatusCode.UNAUTHENTICATED)


class _IdentityJson(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    roles: tuple[str, ...]
    token_sha256: tuple[str, ...] = msgspec.field(default=(), name="tokenSha256")
    certificate_names: tuple[str, ...] = ()


class _AccessJson(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    identities: dict[str, msgspec.Raw]
    pass_tokens: bool = False


def parse_access(text: str | bytes) -> Access:
    """Read the JSON of a file; raises ``ValueError`` that names the entry and the way out.

    No value is repeated: whoever writes a token where its digest belongs has it in no log.
    """
    raw = decode_json(text, _AccessJson)
    entries = decode_entries(raw.identities, _IdentityJson)
    check_said_once(text)
    if not entries:
        raise ValueError('"identities" is empty, so nobody could call; name somebody')
    identities = tuple(_identity(name, entry) for name, entry in entries.items())
    by_certificate: dict[str, Identity] = {}
    by_digest: dict[bytes, Identity] = {}
    for identity in identities:
        for digest in identity.digests:
            if by_digest.setdefault(digest, identity) is not identity:
                other = by_digest[digest].name
                raise ValueError(f'"{identity.name}": a token of "{other}", too; give each its own')
        for name in identity.certificate_names:
            if by_certificate.setdefault(name, identity) is not identity:
                other = by_certificate[name].name
                raise ValueError(
                    f'"{identity.name}": certificate name "{name}" is of "{other}", too;'
                    " give it to one of them"
                )
    by_place: dict[bytes, tuple[tuple[bytes, Identity], ...]] = {}
    for digest, identity in by_digest.items():
        place = digest[:_PLACE_BYTES]
        by_place[place] = (*by_place.get(place, ()), (digest, identity))
    return Access(
        identities,
        raw.pass_tokens,
        MappingProxyType(by_place),
        MappingProxyType(by_certificate),
        MappingProxyType({each.name: each for each in identities}),
    )


def _identity(name: str, entry: _IdentityJson) -> Identity:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f'"{name[:64]}" is no name for an identity;'
            " allowed: 1 to 64 letters, digits and . _ @ -"
        )
    for problem in _problems(entry):
        raise ValueError(f'"{name}": {problem}')
    return Identity(
        name,
        frozenset(ROLES[each] for each in entry.roles),
        tuple(dict.fromkeys(map(bytes.fromhex, entry.token_sha256))),
        tuple(dict.fromkeys(map(_lowered, entry.certificate_names))),
    )


_DIGEST_OF_NOTHING: Final = sha256(b"").hexdigest()


def _problems(entry: _IdentityJson) -> Iterator[str]:
    for number, role in enumerate(entry.roles):
        if role not in ROLES:
            yield f"roles[{number}] is no role; allowed: {', '.join(ROLES)}"
    if not entry.roles:
        yield f"no roles; allowed: {', '.join(ROLES)}"
    for number, digest in enumerate(entry.token_sha256):
        if not _DIGEST.fullmatch(digest):
            yield (
                f"tokenSha256[{number}] is no SHA-256 in 64 hexadecimal digits;"
                ' make it with: printf %s "$TOKEN" | sha256sum'
            )
        elif digest.lower() == _DIGEST_OF_NOTHING:
            yield f"tokenSha256[{number}] is that of an empty text; was TOKEN set?"
    for number, name in enumerate(entry.certificate_names):
        if not _CERTIFICATE_NAME.fullmatch(name):
            yield (
                f"certificateNames[{number}] has not the form CN:NAME, DNS:NAME or URI:NAME,"
                " in ASCII"
            )
    if not (entry.token_sha256 or entry.certificate_names):
        yield "nothing to know it by; give it tokenSha256 or certificateNames"


def _lowered(name: str) -> str:
    return name.lower().replace("dns:", "DNS:", 1) if name.startswith("DNS:") else name
