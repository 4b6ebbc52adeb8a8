"""``python -m mm``: the same program as the ``mm`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; Ctrl-C while it is imported ends it as it does later."""
    try:
        from mm.cli.main import app
    except KeyboardInterrupt:
        sys.exit(130)
    app()


# Guarded, because worker processes import the main module of their parent.
if __name__ == "__main__":
    main()
