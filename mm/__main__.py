"""``python -m mm``: the same program as the ``mm`` command."""

from __future__ import annotations

from mm.cli.main import app

app()
