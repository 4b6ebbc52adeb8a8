"""`mm model` and `mm vmodel` where the mesh asks who calls: the token, from a file alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.cli.client_token import TOKEN
from mm.cli.errors import MISUSED
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
            run_command(mesh, "model", "list")[0],
        ]
        shown = [metadata.get("authorization") for metadata in mesh.metadata]
    assert codes == [0, 0, 0]
    assert shown == ["Bearer my-token", "Bearer my-token", None]


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
