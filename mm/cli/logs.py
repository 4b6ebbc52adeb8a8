"""How a process logs: one line a record on stderr, time first, in UTC."""

from __future__ import annotations

import logging
import sys
import time
from typing import Final

LINE: Final = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
TIME: Final = "%Y-%m-%dT%H:%M:%S"


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
        return super().formatMessage(record).translate(_CONTROLS)


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
