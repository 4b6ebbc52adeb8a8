"""TLS between a command and the instance that it asks: whom it trusts, and who it says it is.

Owns the variables, and what is wrong with their files. Commands in an instance's own pod go by its
settings: ``mm.cli.secure``.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Final

from mm.cli.errors import MISUSED, CommandError
from mm.cli.secure import context_of

CA: Final = "MM_ADDRESS_CA_PATH"
CERTIFICATE: Final = "MM_ADDRESS_CERT_PATH"
KEY: Final = "MM_ADDRESS_KEY_PATH"
NAME: Final = "MM_ADDRESS_NAME"

#: What may be wrong where a connection ends before anything came of it.
SPEAKS_TLS: Final = "does it speak TLS? Then say https://"
ASKS_FOR_CERTIFICATE: Final = f"does it ask for a certificate? {CERTIFICATE} and {KEY} name one"


def split_scheme(address: str) -> tuple[bool | None, str]:
    """Answer whether an address means TLS, None if it does not say so, and the rest of it."""
    scheme, mark, rest = address.strip().partition("://")
    if mark and scheme.lower() in ("http", "https"):
        return scheme.lower() == "https", rest.removesuffix("/")
    return None, address


def context_for(wants_tls: bool | None, variables: Mapping[str, str]) -> ssl.SSLContext | None:
    """Answer how to call, None for plain text: as the address says, else our variables, else those
    of the instance in whose pod this runs. Raises ``CommandError`` or ``ConfigError``.
    """
    if wants_tls is False:
        return None
    if variables.get(CA) or variables.get(CERTIFICATE):
        return client_context(variables)
    return context_of(variables) or (client_context(variables) if wants_tls else None)


def client_context(variables: Mapping[str, str]) -> ssl.SSLContext:
    """Answer what the variables say. Raises ``CommandError``."""
    authorities, certificate, key = (variables.get(name) or None for name in (CA, CERTIFICATE, KEY))
    if key and not certificate:
        raise CommandError(f"{KEY} is set, and {CERTIFICATE} is not", exit_code=MISUSED)
    path = authorities
    try:
        context = ssl.create_default_context(cafile=authorities)
        path = certificate
        if certificate:
            # No passphrase: OpenSSL would ask the terminal for one.
            context.load_cert_chain(certificate, key, password="")
    except OSError as exc:
        name = f"{CERTIFICATE} and {KEY}" if path is certificate and key else CERTIFICATE
        name = CA if path is authorities else name
        reason = exc.reason if isinstance(exc, ssl.SSLError) else exc.strerror
        text = (reason or str(exc)).replace("_", " ").lower()
        raise CommandError(
            f"{name}: {path!r} cannot be used: {text}; allowed: files in PEM form, the key without"
            " a passphrase",
            exit_code=MISUSED,
        ) from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context


def tls_failure(error: ssl.SSLError) -> str:
    """Answer what kept a connection from being made."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted: {error.verify_message}; {CA} says which authorities"
            f" are, {NAME} by what name it is known"
        )
    reason = (error.reason or str(error)).replace("_", " ").lower()
    return f"no TLS: {reason} (does it speak TLS? http:// is plain text)"
