"""How a process logs: one line a record on stderr, time first, in UTC."""

from __future__ import annotations

import logging
import sys
import time
from typing import Final

LINE: Final = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
TIME: Final = "%Y-%m-%dT%H:%M:%S"


class LineFormatter(logging.Formatter):
    """Keeps a record on one line, unless it carries a traceback: that is a bug, and readable."""

    converter = staticmethod(time.gmtime)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Render a record's line; line breaks in what it tells become visible."""
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


def log_to_stderr(level: str) -> None:
    """Send everything from ``level`` up to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(LINE, TIME))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    # These tell of every step at the level of ours; their words do not help an operator.
    for name in ("asyncio", "hpack", "h2", "grpclib", "aetcd", "grpc"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
