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
            lambda c: c.logs.each_invoke,
            "One log line for each call to the runtime.",
        ),
        setting(
            "MM_LOG_REQUEST_HEADERS",
            lambda c: ", ".join(f"{header} as {key}" for header, key in c.logs.request_headers),
            "Headers of a call that every line says that is logged while it is served"
            " ([how](operating.md#logs)).",
            "none",
            'JSON, `{"x-user": "user"}`',
        ),
        setting(
            "MM_LOG_FORMAT",
            lambda c: "json" if c.logs.is_json else "text",
            "Lines for people, or one JSON object a line ([fields](operating.md#logs)).",
        ),
        setting(
            "MM_LOG_LEVEL",
            lambda c: c.logs.level,
            "What is logged, also [while it runs](operating.md#settings-in-etcd).",
        ),
    ),
)
