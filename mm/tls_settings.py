"""TLS and mTLS of the two listeners: the settings that ask for it (around 3.5, 13).

Owns what is asked for, and what makes no sense together: whoever asks for TLS and cannot have it
is told so at the start, and never gets plain text instead. What stands in the files is
``mm.edge.tls_files``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mm.environment import Environment, wrong
from mm.errors import ConfigError

KEY: Final = "MM_TLS_PRIVATE_KEY_PATH"
CERTIFICATE: Final = "MM_TLS_KEY_CERT_PATH"
PASSPHRASE: Final = "MM_TLS_PRIVATE_KEY_PASSPHRASE"
CLIENT_AUTH: Final = "MM_TLS_CLIENT_AUTH"
TRUST: Final = "MM_TLS_TRUST_CERT_PATH"
PEERS: Final = "MM_ENABLE_SSL"
PEERS_AUTH: Final = "MM_INTRACLUSTER_CLIENTAUTH"
PEERS_TRUST: Final = "MM_INTERNAL_TRUST_CERTS"

#: By the name that counts first: the older ones of the Java mesh.
NAMES: Final = {
    KEY: (KEY, "MM_SVC_GRPC_PRIVATE_KEY_PATH", "TAS_SVC_GRPC_PRIVATE_KEY_PATH"),
    # The old names speak of a CA; what they ever named is the certificate itself.
    CERTIFICATE: (CERTIFICATE, "MM_SVC_GRPC_CA_CERT_PATH", "TAS_SVC_GRPC_CA_CERT_PATH"),
    PASSPHRASE: (PASSPHRASE, "MM_SVC_GRPC_PRIVATE_KEY_PASSPHRASE"),
    CLIENT_AUTH: (CLIENT_AUTH,),
    TRUST: (TRUST,),
    PEERS: (PEERS,),
    PEERS_AUTH: (PEERS_AUTH,),
    PEERS_TRUST: (PEERS_TRUST, "MM_TRUST_CERTS"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """What was asked for. Without a ``key_path`` everything is plain text."""

    key_path: str = ""
    #: The certificate, then those that lead to its authority.
    certificate_path: str = ""
    passphrase: str = field(default="", repr=False)
    #: What clients are asked for: "none", "optional" (a certificate that is shown has to be good)
    #: or "require".
    client_auth: str = "none"
    #: Files and directories; none: the authorities that the system trusts.
    trust_paths: tuple[str, ...] = ()
    #: Instances speak TLS with each other,
    peers: bool = False
    #: and show each other certificates.
    peers_auth: bool = True
    #: Beside their own certificate, which they always accept.
    peers_trust_paths: tuple[str, ...] = ()


PLAIN_TEXT: Final = TlsSettings()


def tls_settings(env: Environment) -> tuple[TlsSettings, tuple[str, ...]]:
    """Answer what is asked for, and what is odd about it."""
    key_path = _file(env, KEY)
    certificate_path = _file(env, CERTIFICATE)
    passphrase = env.find(*NAMES[PASSPHRASE])
    client_auth = env.choice(CLIENT_AUTH, default="none", allowed=("none", "optional", "require"))
    # Not the same as false: whoever says true wants TLS.
    asks_for_peers = env.boolean(PEERS, default=False)
    peers = env.boolean(PEERS, default=True)
    peers_auth = env.boolean(PEERS_AUTH, default=True)
    found = TlsSettings(
        key_path=key_path,
        certificate_path=certificate_path,
        passphrase=passphrase[1] if passphrase else "",
        client_auth=client_auth,
        trust_paths=_paths(env, TRUST),
        peers=peers and bool(key_path),
        peers_auth=peers_auth,
        peers_trust_paths=_paths(env, PEERS_TRUST),
    )
    if _is_set(env, KEY):
        if not _is_set(env, CERTIFICATE):
            env.refuse(
                ConfigError(f"{_name(env, KEY)} is set, but {CERTIFICATE} is not; set both for TLS")
            )
        return found, _oddities(env, found)
    asked = {
        CERTIFICATE: _is_set(env, CERTIFICATE),
        PASSPHRASE: bool(found.passphrase),
        CLIENT_AUTH: client_auth != "none",
        TRUST: _is_set(env, TRUST),
        PEERS: asks_for_peers,
        PEERS_AUTH: peers_auth and env.is_set(PEERS_AUTH),
        PEERS_TRUST: _is_set(env, PEERS_TRUST),
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        env.refuse(
            ConfigError(
                f"{_name(env, name)} asks for TLS, but {KEY} is not set;"
                f" set it and {CERTIFICATE}, or unset all of them to serve plain text"
            )
        )
    return PLAIN_TEXT, ()


def _oddities(env: Environment, found: TlsSettings) -> tuple[str, ...]:
    odd = []
    if found.client_auth == "none" and found.trust_paths:
        odd.append(f"{TRUST} is set, but with {CLIENT_AUTH}=none no client is asked who it is")
    if found.client_auth != "none" and not found.trust_paths:
        odd.append(
            f"{CLIENT_AUTH}={found.client_auth} without {TRUST}: a certificate of any authority"
            " that this system trusts is accepted"
        )
    if not found.peers:
        odd.append(f"{PEERS}=false: instances call each other in plain text")
        if found.peers_trust_paths:
            odd.append(f"{_name(env, PEERS_TRUST)} is ignored because of {PEERS}=false")
    elif not found.peers_auth:
        odd.append(f"{PEERS_AUTH}=false: anybody may call at the port of the other instances")
    return tuple(odd)


def _is_set(env: Environment, name: str) -> bool:
    return env.find(*NAMES[name]) is not None


def _name(env: Environment, name: str) -> str:
    """Answer under which of its names a setting is set."""
    found = env.find(*NAMES[name])
    return name if found is None else found[0]


def _file(env: Environment, name: str) -> str:
    path = env.text(*NAMES[name]) or ""
    if path and not Path(path).is_file():
        directory = ", not a directory" if Path(path).is_dir() else ""
        env.refuse(wrong(_name(env, name), path, f"a file that exists{directory}"))
    return path


def _paths(env: Environment, name: str) -> tuple[str, ...]:
    text = env.text(*NAMES[name])
    if not text:
        return ()
    paths = tuple(path for each in text.split(",") if (path := each.strip()))
    allowed = "files and directories that exist, separated by commas"
    if not paths or not all(Path(each).exists() for each in paths):
        env.refuse(wrong(_name(env, name), text, allowed))
    return paths
