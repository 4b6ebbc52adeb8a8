"""`mm model` and `mm vmodel` where the mesh asks who calls: the token, from a file alone."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
from grpclib import GRPCError, Status

from mm.cli import model, vmodel
from mm.cli.client_token import TOKEN
from mm.cli.errors import MISUSED, REFUSED
from mm.pb import mmesh
from tests.cli.fake_mesh import fake_mesh, run_command


def test_a_token_is_shown_with_each_call(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("my-token\n")
    with fake_mesh() as mesh:
        mesh.answer = mmesh.ListModelsResponse()
        codes = [
            run_command(mesh, "model", "--token-file", str(path), "list")[0],
            run_command(mesh, "model", "list", **{TOKEN: str(path)})[0],
            run_command(mesh, "model", "list", "--token-file", str(path))[0],
            run_command(mesh, "model", "list")[0],
        ]
        shown = [metadata.get("authorization") for metadata in mesh.metadata]
    assert codes == [0, 0, 0, 0]
    assert shown == [*3 * ["Bearer my-token"], None]


def test_each_command_has_it_where_the_address_is() -> None:
    commands = [
        each.callback for app in (model.app, vmodel.app) for each in app.registered_commands
    ]
    assert len(commands) == 13
    for command in commands:
        assert command is not None
        names = list(signature(command).parameters)
        assert names[names.index("address") + 1] == "token_file"


@pytest.mark.parametrize(
    "command", [("model", "unregister", "m"), ("vmodel", "set", "v", "m"), ("model", "list")]
)
def test_who_is_not_known_is_told_how_to_be(tmp_path: Path, command: tuple[str, ...]) -> None:
    path = tmp_path / "token"
    path.write_text("other")
    with fake_mesh() as mesh:
        mesh.answer = GRPCError(Status.UNAUTHENTICATED, "no credentials")
        nothing = run_command(mesh, *command)
        other = run_command(mesh, *command, "--token-file", str(path))
        mesh.answer = GRPCError(Status.PERMISSION_DENIED, "may not")
        denied = run_command(mesh, *command)
    assert nothing[::2] == (
        REFUSED,
        "mm: UNAUTHENTICATED: no credentials; --token-file or MM_ADDRESS_TOKEN_PATH names a file"
        " with a bearer token\n",
    )
    assert other[0] == REFUSED
    assert other[2].endswith(f"; the token is that of '{path}' (--token-file or {TOKEN})\n")
    assert denied[::2] == (REFUSED, "mm: PERMISSION_DENIED: may not\n")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: no such file or directory"),
        (b"", "has no bearer token; allowed: one line of"),
        (b"two tokens", "has no bearer token"),
        ("t\u00f6ken".encode(), "has no bearer token"),
        (5000 * b"a", "has no bearer token"),
    ],
)
def test_a_file_without_a_token(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with fake_mesh() as mesh:
        code, _, said = run_command(mesh, "model", "--token-file", str(path), "list")
    assert code == MISUSED
    assert complaint in said
    assert "two tokens" not in said
    assert mesh.metadata == []
