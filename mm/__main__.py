"""``python -m mm``: the same program as the ``mm`` command."""

from __future__ import annotations

from mm.cli.main import app

# Guarded, because worker processes import the main module of their parent.
if __name__ == "__main__":
    app()
