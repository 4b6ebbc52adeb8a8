"""Who may do what: the setting that names the file (docs/security.md).

What stands in the file is ``mm.core.access``'s. Here is what makes it worth less than it looks.
"""

from __future__ import annotations

from typing import Final

from mm import json_settings
from mm.environment import Environment
from mm.tls_settings import TlsSettings

ACCESS: Final = "MM_ACCESS_CONFIG_PATH"


def access_settings(env: Environment, tls: TlsSettings) -> tuple[str, tuple[str, ...]]:
    """Answer the path of the file, empty: anybody may do anything; and what is odd about it."""
    path = json_settings.existing_file(env, ACCESS)
    if not path:
        return "", ()
    odd = []
    if not tls.key_path:
        odd.append(f"{ACCESS} is set without TLS: whoever reads along has the tokens")
    if not (tls.peers and tls.peers_auth):
        odd.append(
            f"{ACCESS} does not hold for MM_PEER_PORT, and without certificates of instances"
            " whoever reaches that port may do anything: see that only instances do"
        )
    return path, tuple(odd)
