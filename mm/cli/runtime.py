"""``mm runtime``: model runtimes as processes.

The commands live beside the runtimes; heavy imports wait until a command runs.
"""

from __future__ import annotations

import typer

from mm.testing import example_runtime

app = typer.Typer(no_args_is_help=True, help="Run a model runtime.")

app.command("example")(example_runtime.main)


@app.callback()
def _runtime() -> None:
    """Run a model runtime."""
