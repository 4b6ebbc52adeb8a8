"""How a process logs: one line a record on stderr, in UTC, as text or as JSON.

Owns the form. Which headers of a call its lines have is ``mm.edge.log_context``'s.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

from mm.edge.log_context import log_fields

LINE: Final = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
TIME: Final = "%Y-%m-%dT%H:%M:%S"

#: As log4j calls them.
_LEVELS: Final = {"WARNING": "WARN", "CRITICAL": "FATAL"}
#: Ends of a line to one reader or another, and what a terminal obeys: clients choose ids and texts.
_CONTROLS: Final = {
    **{n: f"\\x{n:02x}" for n in (*range(0x20), *range(0x7F, 0xA0)) if n != 0x09},
    **{n: f"\\u{n:04x}" for n in (0x2028, 0x2029)},
    0x0A: "\\n",
    0x0D: "\\r",
}


class LineFormatter(logging.Formatter):
    """Keeps a record on one line, unless it carries a traceback: that is a bug, and readable."""

    converter = staticmethod(time.gmtime)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Render a record's line; control characters in what it tells become visible."""
        line = super().formatMessage(record)
        if fields := log_fields():
            line += " {" + ", ".join(f"{key}={value}" for key, value in fields.items()) + "}"
        return line.translate(_CONTROLS)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the names and levels of the Java mesh's logs."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        told: dict[str, object] = {
            "timestamp": f"{self.formatTime(record, TIME)}.{int(record.msecs):03d}Z",
            "level": _LEVELS.get(record.levelname, record.levelname),
            "loggerName": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
            "contextMap": dict(log_fields()),
        }
        if record.exc_info:
            told["thrown"] = self.formatException(record.exc_info)
        return json.dumps(told)


def log_to_stderr(level: str, *, is_json: bool = False) -> None:
    """Send everything from ``level`` up to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if is_json else LineFormatter(LINE, TIME))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    # These tell of every step at the level of ours; their words do not help an operator.
    for name in ("asyncio", "hpack", "h2", "grpclib", "aetcd", "grpc"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
