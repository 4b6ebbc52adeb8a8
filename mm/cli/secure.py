"""TLS of `mm model` and `mm vmodel`: as the instance beside speaks it (around 13.1, interop 1.5).

In a pod of the mesh the settings of its instance are in the environment. So commands there show
that instance's certificate and take it, as the controller of modelmesh-serving does.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping

from mm.environment import Environment
from mm.errors import ConfigError
from mm.tls_settings import tls_settings


def context_of(variables: Mapping[str, str]) -> ssl.SSLContext | None:
    """Answer how to call, None for plain text. Raises ``ConfigError`` for files that are no use."""
    settings, _ = tls_settings(Environment(variables))
    if not settings.key_path:
        return None
    # Takes a tenth of a second to import, which plain text has no use for.
    from mm.edge.tls_files import read_files

    files = read_files(settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    # Any instance may be asked, by any of its addresses; they all show the same certificate.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # The ssl module reads from files alone.
    memory = os.memfd_create("tls", os.MFD_CLOEXEC)
    with os.fdopen(memory, "wb") as file:
        path = f"/proc/self/fd/{memory}"
        file.write(files.peers_trust)
        file.flush()
        context.load_verify_locations(path)
        file.seek(0)
        file.truncate()
        file.write(files.chain + files.key)
        file.flush()
        try:
            context.load_cert_chain(path)
        except ssl.SSLError as error:
            raise ConfigError(f"the key and certificate of TLS are no use: {error}") from error
    return context
