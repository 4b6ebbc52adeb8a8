"""The `mm` command as a whole: help, exit codes, one line for each expected error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from mm import __version__
from mm.cli import main
from mm.cli.errors import CommandError, expected_error
from mm.errors import ConfigError, ModelNotFoundError, StartupError


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, args)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_version() -> None:
    assert run("--version") == (0, f"mm {__version__}\n", "")


def test_help_lists_every_command_without_importing_one() -> None:
    code = (
        "import sys; from mm.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as exc: assert exc.code == 0, exc.code\n"
        "heavy = {'numpy', 'sklearn', 'grpclib', 'rich', 'betterproto2', 'aetcd', 'mm.pb'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode == 0
    for name in main.COMMANDS:
        assert f"  {name} " in done.stdout


def test_no_arguments_print_the_help_and_count_as_misuse() -> None:
    code, out, err = run()
    assert code == 2
    assert "Commands:" in out + err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["modl"],
            "mm: No such command 'modl'. Did you mean 'model', 'vmodel'? (see `mm --help`)\n",
        ),
        (["--nonsense"], "mm: No such option: --nonsense (see `mm --help`)\n"),
        (["model", "status"], "mm: Missing argument 'ID'. (see `mm model status --help`)\n"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(args: list[str], message: str) -> None:
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert err == message


def _run_raising(error: BaseException) -> tuple[int, str, str]:
    app = typer.Typer(
        cls=main.MainGroup,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.command()
    def fail() -> None:
        raise error

    @app.command()
    def other() -> None:
        """Make it a group."""

    result = CliRunner().invoke(app, ["fail"], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("A=1: b"), 2, "mm: A=1: b\n"),
        (StartupError("no\netcd"), 1, "mm: no etcd\n"),
        (ModelNotFoundError(), 1, "mm: model not found\n"),
        (CommandError("wrong", exit_code=2), 2, "mm: wrong\n"),
        (ExceptionGroup("g", [StartupError("inside")]), 1, "mm: inside\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(7), 7, ""),
    ],
)
def test_an_expected_error_is_one_line(error: BaseException, code: int, message: str) -> None:
    assert _run_raising(error) == (code, "", message)


@pytest.mark.parametrize(
    "bug", [KeyError("x"), ExceptionGroup("g", [StartupError("s"), KeyError("x")])]
)
def test_a_bug_is_not_hidden(bug: Exception) -> None:
    assert expected_error(bug) is None
    with pytest.raises(type(bug)):
        _run_raising(bug)
