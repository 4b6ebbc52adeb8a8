"""What each variable of TLS and access is for; ``mm.settings_reference`` has all others."""

from __future__ import annotations

from typing import Final

from mm.setting import Setting
from mm.setting import setting as _setting
from mm.tls_settings import KEY, NAMES

TLS_AND_ACCESS: Final[tuple[str, tuple[Setting, ...]]] = (
    "TLS and access",
    (
        _setting(
            " ".join(NAMES[KEY]),
            lambda c: c.tls.key_path,
            "Switches TLS on at both ports ([more](security.md#tls)). The key, in PEM.",
            "none: plain text",
            "a file that exists",
        ),
        _setting(
            "MM_TLS_KEY_CERT_PATH MM_SVC_GRPC_CA_CERT_PATH TAS_SVC_GRPC_CA_CERT_PATH",
            lambda c: c.tls.certificate_path,
            "Its certificate, then those that lead to its authority, in PEM.",
            "required with a key",
            "a file that exists",
        ),
        _setting(
            "MM_TLS_PRIVATE_KEY_PASSPHRASE MM_SVC_GRPC_PRIVATE_KEY_PASSPHRASE",
            lambda c: "(hidden)" if c.tls.passphrase else "",
            "Opens the key if it is encrypted. Never shown.",
            "none",
        ),
        _setting(
            "MM_TLS_CLIENT_AUTH",
            lambda c: c.tls.client_auth,
            "Whether clients show certificates; `optional`: those that are shown are good.",
        ),
        _setting(
            "MM_TLS_TRUST_CERT_PATH",
            lambda c: c.tls.trust_paths,
            "By what clients are accepted: certificates, or authorities.",
            "what the system trusts",
            "files and directories (their `.pem` and `.crt`), separated by commas",
        ),
        _setting(
            "MM_ACCESS_CONFIG_PATH",
            lambda c: c.access_path,
            "Who may read, infer and manage: a file, read again when it changes"
            " ([how to write it](security.md#who-may-do-what)).",
            "none: anybody may do anything",
            "a file that exists",
        ),
        _setting("MM_ENABLE_SSL", lambda c: c.tls.peers, "TLS for peers, too.", "with a key: true"),
        _setting(
            "MM_INTRACLUSTER_CLIENTAUTH",
            lambda c: c.tls.peers_auth,
            "`false`: their port asks nobody for a certificate.",
        ),
        _setting(
            "MM_INTERNAL_TRUST_CERTS MM_TRUST_CERTS",
            lambda c: c.tls.peers_trust_paths,
            "Whom instances accept as one of them, beside their own certificate.",
            "none",
            "files and directories, as above",
        ),
    ),
)
