"""``python -m mm``: the same program as the ``mm`` command."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command; Ctrl-C while it is imported ends it as it does later."""
    if sys.argv[1:2] == ["serve"]:
        # Imports take a while, and process 1 of a container ignores what it has no handler for.
        # There is nothing to end in order yet: the instance has handlers of its own before that.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))
    try:
        from mm.cli.streams import open_streams, settle

        open_streams()
        from mm.cli.main import app
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        app()
    finally:
        settle()


# Guarded, because worker processes import the main module of their parent.
if __name__ == "__main__":
    main()
