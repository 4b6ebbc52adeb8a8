"""What the variables are for by which one sees what an instance does: payloads and logs.

A part of ``mm.settings_reference``.
"""

from __future__ import annotations

from typing import Final

from mm.setting import Setting, setting

OBSERVING: Final[tuple[str, tuple[Setting, ...]]] = (
    "Payloads and logs",
    (
        setting(
            "MM_PAYLOAD_PROCESSORS",
            lambda c: " ".join(map(str, c.payloads.sinks)),
            "Who is shown requests and answers ([how](operating.md#seeing-requests-and-answers)).",
            "none",
            "`logger:///`, `http://…` and `https://…`, with `?model` and `#method`",
        ),
        setting(
            "MM_PAYLOAD_PROCESSORS_CAPACITY",
            lambda c: c.payloads.queue_length_max,
            "Requests and answers that wait for one observer; what comes then is dropped.",
        ),
        setting(
            "MM_PAYLOAD_PROCESSORS_THREADS",
            lambda c: c.payloads.threads,
            "Requests and answers on their way to one observer at a time.",
        ),
        setting(
            "MM_PAYLOAD_PROCESSORS_TRUST_CERT_PATH",
            lambda c: c.payloads.trust_path,
            "Whose certificates observers over https may have; read for each connection.",
            "whom the system trusts",
            "a file that exists, in PEM form",
        ),
        setting(
            "MM_LOG_EACH_INVOKE",
            lambda c: c.log_each_invoke,
            "One log line for each call to the runtime.",
        ),
        setting(
            "MM_LOG_LEVEL",
            lambda c: c.log_level,
            "What is logged, also [while it runs](operating.md#settings-in-etcd).",
        ),
    ),
)
