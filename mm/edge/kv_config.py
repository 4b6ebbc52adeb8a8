"""The grammar of ``KV_STORE``: what a person writes, and which store it means (spec around 4.1).

Owns the parsing of the variable and of the JSON file it may name. Nothing here touches
the network.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mm.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_PORT: Final = 2379

_VARIABLE: Final = "KV_STORE"
_ALLOWED: Final = (
    "allowed: etcd:<host[:port][,host[:port]...][;rootPrefix=<prefix>]>, "
    "etcd:<path of a JSON file>, embedded, memory"
)
_TLS_LATER: Final = "TLS to etcd comes with a later release; use http:// endpoints until then"

_ENDPOINT: Final = re.compile(
    r"(?:(?P<scheme>https?)://)?"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9.])?)"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)
_USERINFO: Final = re.compile(r"[^,;]*@")
#: Whatever somebody thinks up to hand over a password: of parameters only ours is shown.
_PARAMETER: Final = re.compile(r"(;(?!rootPrefix=)[^;=]*=)[^;]*")

_CERTIFICATE_ATTRIBUTES: Final = frozenset({"certificate", "certificate_file"})
_TLS_ATTRIBUTES: Final = _CERTIFICATE_ATTRIBUTES | {
    "client_key",
    "client_key_file",
    "client_certificate",
    "client_certificate_file",
    "override_authority",
}
_PLAIN_ATTRIBUTES: Final = frozenset({"endpoints", "userid", "password", "root_prefix"})


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

    def __str__(self) -> str:
        return "etcd at " + ", ".join(map(str, self.endpoints))


@dataclass(frozen=True, slots=True)
class Embedded:
    """An etcd of its own for this one instance; its data goes when the process goes."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The store of one process, gone with it."""


StoreTarget = EtcdTarget | Embedded | Memory


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
    path = Path(rest)
    if _is_file(path):
        return _from_file(path)
    return _from_inline(rest)


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
    endpoints, secure = _endpoints(endpoints_text, origin)
    if secure:
        raise ConfigError(f"{origin}: {_TLS_LATER}")
    return EtcdTarget(endpoints=endpoints, root_prefix=root_prefix)


def _from_file(path: Path) -> EtcdTarget:
    origin = f"{_VARIABLE}=etcd:{path}"
    attributes = _read_object(path, origin)
    unknown = sorted(attributes.keys() - _PLAIN_ATTRIBUTES - _TLS_ATTRIBUTES)
    if unknown:
        logger.warning("%s: attributes not understood, and ignored: %s", path, ", ".join(unknown))

    endpoints_text = _text(attributes, "endpoints", origin)
    if not endpoints_text:
        raise ConfigError(
            f'{origin}: attribute "endpoints" is missing; '
            "allowed: comma-separated host[:port] or http://host[:port]"
        )
    endpoints, secure = _endpoints(endpoints_text, f'{origin}: attribute "endpoints"')
    certificates = sorted(_TLS_ATTRIBUTES & attributes.keys())
    has_scheme = endpoints_text.lstrip().startswith("http://")
    if secure or (_CERTIFICATE_ATTRIBUTES & attributes.keys() and not has_scheme):
        # The rule of the Java mesh: https, or no scheme and a certificate, means TLS.
        names = f" (attributes {', '.join(certificates)})" if certificates else ""
        raise ConfigError(f"{origin}: {_TLS_LATER}{names}")
    if certificates:
        logger.warning(
            "%s: %s have no effect on plaintext endpoints", path, ", ".join(certificates)
        )

    user = _text(attributes, "userid", origin)
    password = _text(attributes, "password", origin)
    if bool(user) != bool(password):
        missing = "password" if user else "userid"
        raise ConfigError(
            f'{origin}: attribute "{missing}" is missing; allowed: userid and password, or neither'
        )
    return EtcdTarget(
        endpoints=endpoints,
        root_prefix=_text(attributes, "root_prefix", origin),
        user=user,
        password=password,
    )


def _read_object(path: Path, origin: str) -> Mapping[str, object]:
    try:
        decoded = json.loads(path.read_bytes())
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


def _endpoints(text: str, origin: str) -> tuple[tuple[Endpoint, ...], bool]:
    """Answer the endpoints without repetitions, and whether the first one asks for TLS."""
    found: dict[Endpoint, None] = {}
    first_scheme: str | None = None
    for index, part in enumerate(text.split(",")):
        endpoint, scheme = _endpoint(part.strip(), origin)
        if index == 0:
            first_scheme = scheme
        elif scheme == "https" and first_scheme != "https":
            raise ConfigError(f"{origin}: {_TLS_LATER}")
        found[endpoint] = None
    return tuple(found), first_scheme == "https"


def _endpoint(text: str, origin: str) -> tuple[Endpoint, str | None]:
    match = _ENDPOINT.fullmatch(text)
    allowed = "allowed: [http://]host[:port], port 1 to 65535"
    if match is None:
        raise ConfigError(f"{origin}: {masked(text)!r} is not an endpoint; {allowed}")
    port = int(match["port"]) if match["port"] is not None else DEFAULT_PORT
    if not 1 <= port <= 65535:
        raise ConfigError(f"{origin}: port {port} of {text!r} does not exist; {allowed}")
    return Endpoint(match["host"].strip("[]"), port), match["scheme"]


def masked(text: str) -> str:
    """Blank out user and password where somebody wrote them into the address, or behind it."""
    return _PARAMETER.sub(r"\1***", _USERINFO.sub("***@", text))
