"""The `mm` command: what its parts are, and how it ends.

Each command lives in a module of its own that is imported when it is called, so that `mm serve`
carries nothing of the demo and no numpy. An expected error is one line on stderr, with an exit
code of ``mm.cli.errors``. A traceback means a bug.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final, cast

import typer
import typer.core
import typer.main

from mm.cli.errors import FAILED, INTERRUPTED, MISUSED, CommandError, expected_error
from mm.cli.output import remark, show_anything
from mm.cli.values import check_utf8
from mm.errors import ConfigError

#: Name -> (module with a `typer.Typer` named `app`, line in the list of commands).
COMMANDS: Final = {
    "serve": ("mm.cli.serve", "Serve models: one instance of the mesh, beside a model runtime."),
    "config": ("mm.cli.config", "Show what the settings of `mm serve` come to, or explain them."),
    "model": ("mm.cli.model", "Register, unregister, load and look at models of a mesh."),
    "vmodel": ("mm.cli.vmodel", "Give models a name that stays when the model is exchanged."),
    "runtime": ("mm.cli.runtime", "Run a ready-made model runtime."),
    "demo": ("mm.cli.demo", "See it work: three instances, real models, checked answers."),
    "sim": ("mm.cli.sim", "Prove the mesh in simulated clusters; print figures of scenarios."),
}

#: Commands whose arguments a mesh is told.
_TELLING: Final = ("model", "vmodel")

#: What typer raises for a wrong call; its base has no public name in every version.
_UsageError: Final[Any] = typer.BadParameter.__base__


class MainGroup(typer.core.TyperGroup):
    """Imports a command when it is called and turns errors into lines and exit codes."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put the real command in the place of its stub, then resolve as usual."""
        if args and args[0] in COMMANDS:
            name = args[0]
            command = typer.main.get_command(importlib.import_module(COMMANDS[name][0]).app)
            command.name = name
            # A command group of its own would offer to install completion: only `mm` could.
            command.params = [p for p in command.params if "completion" not in (p.name or "")]
            self.add_command(command, name)
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run, print an expected error as one line, and exit with the code of the outcome."""
        extra |= {"prog_name": "mm", "standalone_mode": False}
        args = sys.argv[1:] if args is None else list(args)
        show_anything()
        try:
            if args and args[0] in _TELLING:
                check_utf8(args)
            code = super().main(args, *rest, **extra)
        except typer.Abort:
            code = INTERRUPTED
        except _UsageError as exc:
            code = exc.exit_code
            message = exc.format_message()
            if message.startswith("Usage:"):  # called with nothing at all: here is the help
                remark(message)
            else:
                complain(f"{_one_line(message)} (see `{self._path(args)} --help`)")
        except Exception as exc:
            error = expected_error(exc)
            if error is None:
                raise
            for line in error.complaints if isinstance(error, ConfigError) else (str(error),):
                if line:  # that nobody reads any more is told to nobody
                    complain(_one_line(line))
            if isinstance(error, CommandError) and error.details:
                remark(error.details)
            code = _exit_code(error)
        sys.exit(code if isinstance(code, int) else 0)

    def _path(self, args: Sequence[str]) -> str:
        """Answer the name of the command that was meant; errors of the parser do not tell it."""
        names, command = ["mm"], cast(Any, self)
        for arg in args:
            command = getattr(command, "commands", {}).get(arg)
            if command is None:
                break
            names.append(arg)
        return " ".join(names)


def _exit_code(error: Exception) -> int:
    if isinstance(error, CommandError):
        return error.exit_code
    return MISUSED if isinstance(error, ConfigError) else FAILED


def complain(message: str) -> None:
    """Print an error the way every command does."""
    remark(f"mm: {message}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


app = typer.Typer(
    name="mm",
    cls=MainGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mm import __version__

        typer.echo(f"mm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """A distributed LRU cache for serving machine learning models, over gRPC and etcd.

    \b
    Examples:
      mm demo                                       see it work, in about a minute
      mm runtime sklearn --capacity 64MiB           a runtime for scikit-learn models
      KV_STORE=embedded mm serve                    an instance of the mesh beside it
      mm model register iris --path iris.joblib     a model for both
    """


def _stub(name: str, line: str) -> None:
    def stub() -> None:
        raise AssertionError(f"the stub of `{name}` was called")

    app.command(name, help=line)(stub)


for _name, (_module, _line) in COMMANDS.items():
    _stub(_name, _line)
