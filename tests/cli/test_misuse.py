"""What may be wrong around a command: its values, its texts, its address, and where it prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from typer.testing import CliRunner

from mm.cli import main
from mm.pb import mmesh
from tests.cli.fake_mesh import FakeMesh, run_command

V1 = mmesh.ListedVModel(vmodel_id="v1", active_model_id="m")


def run(mesh: FakeMesh, *args: str) -> tuple[int, str, str]:
    return run_command(mesh, "vmodel", *args)


def run_process(
    mesh: FakeMesh, *args: str | bytes, stdout: int | None = subprocess.PIPE, **env: str
) -> tuple[int, bytes, bytes]:
    """Answer as ``run`` does, of a process with streams of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "mm", "vmodel", *args],
        env={**os.environ, "MM_ADDRESS": f"127.0.0.1:{mesh.port}", **env},
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", ["list", "watch"])
def test_an_output_that_cannot_be_written(mesh: FakeMesh, command: str) -> None:
    mesh.answers["listVModels"] = mmesh.ListVModelsResponse(vmodels=[V1])
    mesh.answers["watchVModels"] = [V1]
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        code, _out, err = run_process(mesh, command, "-o", "json", stdout=full)
    finally:
        os.close(full)
    assert (code, err) == (8, b"mm: cannot write to standard output: no space left on device\n")


def test_what_the_terminal_cannot_show(mesh: FakeMesh) -> None:
    mesh.answer = mmesh.ListVModelsResponse(
        vmodels=[mmesh.ListedVModel(vmodel_id="v\u20ac", active_model_id="m")]
    )
    code, out, err = run_process(mesh, "list", PYTHONIOENCODING="latin-1")
    assert (code, err) == (0, b"")
    assert out.splitlines()[1].startswith(b"v\\u20ac ")


def test_an_id_that_is_not_utf_8(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["set", "bad\udcffutf", "m"], ["list", "--owner", "bad\udcffutf"]):
        with pytest.raises(SystemExit) as ended:
            main.app(["vmodel", *args])
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert err == "mm: 'bad\\xffutf' cannot be said to a mesh; allowed: UTF-8\n"
    assert not mesh.requests


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--timeout", "inf", "0.001 to 99999999 s"),
        ("--timeout", "nan", "0.001 to 99999999 s"),
        ("--timeout", "1e300", "0.001 to 99999999 s"),
        ("--timeout", "abc", "0.001 to 99999999 s"),
        ("--limit", "-1", "0 to 2147483647"),
        ("-o", "xml", "table, json, yaml"),
    ],
)
def test_values_that_are_none(mesh: FakeMesh, option: str, value: str, allowed: str) -> None:
    code, out, err = run(mesh, "list", option, value)
    assert (code, out) == (2, "")
    assert f"'{value}' is no " in err
    assert f"; allowed: {allowed} (see `mm vmodel list --help`)" in err


@pytest.mark.parametrize("option", ["--port", "--host"])
def test_a_runtime_listens_at_one_place(option: str) -> None:
    result = CliRunner().invoke(
        main.app, ["runtime", "sklearn", "--root", "/none", "--unix-socket", "/x", option, "0"]
    )
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"mm: give --unix-socket or {option}, not both\n"


def test_an_option_without_a_value_names_the_help_of_its_command(mesh: FakeMesh) -> None:
    assert "(see `mm vmodel list --help`)" in run(mesh, "list", "-o")[2]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (Status.UNIMPLEMENTED, "Method not found"),
        (Status.INVALID_ARGUMENT, "must include mm-model-id header"),
    ],
)
def test_an_address_where_no_mesh_answers(mesh: FakeMesh, status: Status, message: str) -> None:
    mesh.answer = GRPCError(status, message)
    code, out, err = run(mesh, "list")
    assert (code, out) == (2, "")
    assert err.startswith(f"mm: 127.0.0.1:{mesh.port} is not the client port of an mm instance")
    assert err.endswith(f"{status.name}: {message}\n")
