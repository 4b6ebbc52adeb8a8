"""The grammar of ``KV_STORE``: what a person writes, and which store it means (spec around 4.1).

Owns the parsing of the variable and of the JSON file it may name; the keys and certificates that
the file may name in turn are ``mm.edge.etcd_tls``'s. Nothing here touches the network.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mm.core.json_input import JSON_BYTES_MAX
from mm.edge.etcd_tls import EtcdTls, certificates_fault, key_fault, system_roots
from mm.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_PORT: Final = 2379

_VARIABLE: Final = "KV_STORE"
_ALLOWED: Final = (
    "allowed: etcd:<host[:port][,host[:port]...][;rootPrefix=<prefix>]>, "
    "etcd:<path of a JSON file>, embedded, memory"
)
_ENDPOINT: Final = re.compile(
    r"(?:(?P<scheme>https?)://)?"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9.])?)"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)
_USERINFO: Final = re.compile(r"[^,;]*@")
#: Whatever somebody thinks up to hand over a password: of parameters only ours is shown.
_PARAMETER: Final = re.compile(r"(;(?!rootPrefix=)[^;=]*=)[^;]*")

#: Each also with "_file" behind it: then the name of a file, beside the JSON file or absolute.
_ROOTS, _CHAIN, _KEY = "certificate", "client_certificate", "client_key"
_TLS_ATTRIBUTES: Final = frozenset(
    attribute for name in (_ROOTS, _CHAIN, _KEY) for attribute in (name, f"{name}_file")
)
_PLAIN_ATTRIBUTES: Final = frozenset(
    {"endpoints", "userid", "password", "root_prefix", "override_authority"}
)
#: As a name in a certificate, or of a host with a port.
_AUTHORITY: Final = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")

#: Answers what stands in a file; raises ``OSError``.
Read = Callable[[Path], bytes]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One etcd member's client address."""

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class EtcdTarget:
    """An etcd cluster. ``root_prefix`` goes before every key as it is (spec core 1.2)."""

    endpoints: tuple[Endpoint, ...]
    root_prefix: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    #: None: plain text.
    tls: EtcdTls | None = None
    #: The name under which every member is spoken to, and which its certificate must bear; empty:
    #: that of its endpoint.
    authority: str = ""

    def __str__(self) -> str:
        return "etcd at " + ", ".join(map(str, self.endpoints))


@dataclass(frozen=True, slots=True)
class Embedded:
    """An etcd of its own for this one instance; its data goes when the process goes."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The store of one process, gone with it."""


StoreTarget = EtcdTarget | Embedded | Memory


def read_file(path: Path) -> bytes:
    """Answer what stands in a file, no more than anybody writes there; raises ``OSError``."""
    with path.open("rb") as file:
        return file.read(JSON_BYTES_MAX + 1)


def secret_path(kv_store: str) -> Path | None:
    """Answer the JSON file that ``KV_STORE`` names, if it names one that is there."""
    kind, _, rest = kv_store.strip().partition(":")
    return Path(rest) if kind == "etcd" and rest and _is_file(Path(rest)) else None


def parse(kv_store: str) -> StoreTarget:
    """Answer what ``KV_STORE`` names; ``ConfigError`` names the value and what is allowed."""
    value = kv_store.strip()
    if not value:
        raise ConfigError(f"{_VARIABLE} is not set; {_ALLOWED}")
    if value == "embedded":
        return Embedded()
    if value == "memory":
        return Memory()
    kind, colon, rest = value.partition(":")
    if kind == "zookeeper" and colon:
        raise ConfigError(
            f"{_VARIABLE}={kind}:{masked(rest)}: ZooKeeper is not supported by mm; "
            f"migrate the registry to etcd first; {_ALLOWED}"
        )
    if kind != "etcd" or not colon:
        shown = kind + colon + masked(rest)
        raise ConfigError(f"{_VARIABLE}={shown}: unknown kind of store; {_ALLOWED}")
    if not rest:
        raise ConfigError(f"{_VARIABLE}={value}: nothing follows etcd: ; {_ALLOWED}")
    path = secret_path(value)
    return _from_inline(rest) if path is None else read_secret(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False  # a name too long, a null byte: no file, and the grammar will say so


def _from_inline(text: str) -> EtcdTarget:
    origin = f"{_VARIABLE}=etcd:{masked(text)}"
    endpoints_text, *parameters = text.split(";")
    if "/" in endpoints_text and "://" not in endpoints_text:
        raise ConfigError(
            f"{origin}: there is no such file, and these are no endpoints; {_ALLOWED}"
        )
    root_prefix = ""
    for parameter in parameters:
        name, equals, value = parameter.partition("=")
        if name != "rootPrefix" or not equals:
            raise ConfigError(
                f"{origin}: unknown parameter {name!r}; allowed: rootPrefix=<prefix> (user and"
                " password stand in a JSON file: etcd:<path>)"
            )
        if root_prefix:
            raise ConfigError(f"{origin}: rootPrefix is given twice; allowed: once")
        root_prefix = value
    endpoints, is_tls = _endpoints(endpoints_text, origin, has_certificate=False)
    return EtcdTarget(
        endpoints=endpoints,
        root_prefix=root_prefix,
        tls=EtcdTls(system_roots()) if is_tls else None,
    )


def read_secret(path: Path, read: Read = read_file) -> EtcdTarget:
    """Answer what the JSON file says, and the files beside it; raises ``ConfigError``."""
    origin = f"{_VARIABLE}=etcd:{path}"
    attributes = _read_object(path, origin, read)
    unknown = sorted(attributes.keys() - _PLAIN_ATTRIBUTES - _TLS_ATTRIBUTES)
    if unknown:
        logger.warning("%s: attributes not understood, and ignored: %s", path, ", ".join(unknown))

    endpoints_text = _text(attributes, "endpoints", origin)
    if not endpoints_text:
        raise ConfigError(
            f'{origin}: attribute "endpoints" is missing; '
            "allowed: comma-separated host[:port], http://host[:port] or https://host[:port]"
        )
    given = sorted(name for name in _TLS_ATTRIBUTES if _text(attributes, name, origin))
    endpoints, is_tls = _endpoints(
        endpoints_text, f'{origin}: attribute "endpoints"', has_certificate=bool(given)
    )
    if given and not is_tls:
        logger.warning(
            "%s: %s have no effect on plaintext endpoints; write https:// before them",
            path,
            ", ".join(given),
        )
    authority = _text(attributes, "override_authority", origin)
    if authority and not _AUTHORITY.fullmatch(authority):
        raise ConfigError(
            f'{origin}: attribute "override_authority" is {masked(authority)!r}; '
            "allowed: a name as it stands in the certificates of the members"
        )
    user, password = _credentials(attributes, origin)
    return EtcdTarget(
        endpoints=endpoints,
        root_prefix=_text(attributes, "root_prefix", origin),
        user=user,
        password=password,
        tls=_tls(attributes, path, read) if is_tls else None,
        authority=authority,
    )


def _credentials(attributes: Mapping[str, object], origin: str) -> tuple[str, str]:
    user = _text(attributes, "userid", origin)
    password = _text(attributes, "password", origin)
    if bool(user) != bool(password):
        missing = "password" if user else "userid"
        raise ConfigError(
            f'{origin}: attribute "{missing}" is missing; allowed: userid and password, or neither'
        )
    return user, password


def _tls(attributes: Mapping[str, object], path: Path, read: Read) -> EtcdTls:
    """Read keys and certificates; tells all that is wrong with them at once."""
    complaints: list[str] = []
    found: dict[str, tuple[str, bytes]] = {}
    for name in (_ROOTS, _CHAIN, _KEY):
        try:
            found[name] = _pem(attributes, name, path, read)
        except ConfigError as exc:
            complaints += exc.complaints
    for name in (_ROOTS, _CHAIN):
        where, pem = found.get(name, ("", b""))
        if pem and (fault := certificates_fault(pem, is_chain=name == _CHAIN)):
            complaints.append(f"{where}: {fault}")
            found.pop(name)
    if _CHAIN in found and _KEY in found:
        (_, chain), (where, key) = found[_CHAIN], found[_KEY]
        if bool(chain) != bool(key):
            missing = _KEY if chain else _CHAIN
            complaints.append(
                f'{_VARIABLE}=etcd:{path}: attribute "{missing}" (or "{missing}_file") is missing; '
                "allowed: a client certificate and its key, or neither"
            )
        elif key and (fault := key_fault(key, chain)):
            complaints.append(f"{where}: {fault}")
    if complaints:
        raise ConfigError(*complaints)
    roots, key, chain = (found[name][1] for name in (_ROOTS, _KEY, _CHAIN))
    return EtcdTls(roots or system_roots(), key, chain)


def _pem(attributes: Mapping[str, object], name: str, path: Path, read: Read) -> tuple[str, bytes]:
    """Answer where a key or certificate stands, and what it is: of its file, else inline."""
    origin = f"{_VARIABLE}=etcd:{path}"
    inline = _text(attributes, name, origin)
    file_name = _text(attributes, f"{name}_file", origin)
    if not file_name:
        return f'{origin}: attribute "{name}"', inline.encode()
    file = path.parent / file_name
    where = f'{origin}: attribute "{name}_file"={file}'
    try:
        return where, read(file)
    except (OSError, ValueError) as exc:
        reason = (getattr(exc, "strerror", None) or str(exc)).lower()
        if inline:
            logger.warning('%s: %s; attribute "%s" holds instead', where, reason, name)
            return f'{origin}: attribute "{name}"', inline.encode()
        # The controller copies no other file of its secret into a user's namespace.
        raise ConfigError(
            f"{where}: {reason}; allowed: a file in PEM form beside the JSON file, an absolute"
            f' path, or PEM as text in attribute "{name}"'
        ) from None


def _read_object(path: Path, origin: str, read: Read) -> Mapping[str, object]:
    try:
        decoded = json.loads(read(path))
    except OSError as exc:
        raise ConfigError(f"{origin}: the file cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:
        # The parser's text quotes positions, never content, so no secret reaches the log.
        raise ConfigError(
            f"{origin}: the file is not JSON: {exc}; allowed: one JSON object"
        ) from exc
    if not isinstance(decoded, dict):
        found = type(decoded).__name__
        raise ConfigError(f"{origin}: the file holds a {found}; allowed: one JSON object")
    return decoded


def _text(attributes: Mapping[str, object], name: str, origin: str) -> str:
    value = attributes.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        found = type(value).__name__
        raise ConfigError(f'{origin}: attribute "{name}" is of type {found}; allowed: text')
    return value


def _endpoints(
    text: str, origin: str, *, has_certificate: bool
) -> tuple[tuple[Endpoint, ...], bool]:
    """Answer the endpoints without repetitions, and whether TLS is spoken to them.

    The rule of the Java mesh: the first one decides; without a scheme a certificate means TLS. The
    others may not contradict it.
    """
    parts = [_endpoint(part.strip(), origin) for part in text.split(",")]
    first_scheme = parts[0][1]
    is_tls = first_scheme == "https" or (first_scheme is None and has_certificate)
    for endpoint, scheme in parts:
        if scheme == ("http" if is_tls else "https"):
            raise ConfigError(
                f"{origin}: {scheme}://{endpoint} contradicts the first endpoint, which decides "
                f"for all; allowed: https:// before each, or before none"
            )
    return tuple(dict.fromkeys(endpoint for endpoint, _ in parts)), is_tls


def _endpoint(text: str, origin: str) -> tuple[Endpoint, str | None]:
    match = _ENDPOINT.fullmatch(text)
    allowed = "allowed: [http://|https://]host[:port], port 1 to 65535"
    if match is None:
        raise ConfigError(f"{origin}: {masked(text)!r} is not an endpoint; {allowed}")
    port = int(match["port"]) if match["port"] is not None else DEFAULT_PORT
    if not 1 <= port <= 65535:
        raise ConfigError(f"{origin}: port {port} of {text!r} does not exist; {allowed}")
    return Endpoint(match["host"].strip("[]"), port), match["scheme"]


def masked(text: str) -> str:
    """Blank out user and password where somebody wrote them into the address, or behind it."""
    return _PARAMETER.sub(r"\1***", _USERINFO.sub("***@", text))
