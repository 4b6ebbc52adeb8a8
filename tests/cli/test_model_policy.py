"""`mm model policy`, and the policy that `mm model register` says."""

from __future__ import annotations

import json

import pytest

from mm.pb.mmesh import ModelPolicyInfo, SetModelPolicyRequest
from tests.cli.fake_mesh import FakeMesh, run_command


def run(mesh: FakeMesh, *args: str) -> tuple[int, str, str]:
    return run_command(mesh, "model", *args)


def test_register_says_a_policy(mesh: FakeMesh) -> None:
    assert run(mesh, "register", "iris", "--min-copies", "2", "--pinned")[0] == 0
    request = mesh.requests[0]
    assert (request.min_copies, request.pinned) == (2, True)


@pytest.mark.parametrize(
    ("args", "min_copies", "pinned"),
    [
        ([], None, None),
        (["--min-copies", "0"], 0, None),
        (["--unpinned"], None, False),
        (["--min-copies", "3", "--pinned"], 3, True),
    ],
)
def test_policy_sends_what_it_was_told_and_nothing_else(
    mesh: FakeMesh, args: list[str], min_copies: int | None, pinned: bool | None
) -> None:
    mesh.answer = ModelPolicyInfo()
    assert run(mesh, "policy", "iris", *args) == (0, "iris: no policy; 0 copies ready\n", "")
    assert mesh.request == SetModelPolicyRequest("iris", min_copies=min_copies, pinned=pinned)


def test_policy_shows_what_holds_and_what_is_not_met(mesh: FakeMesh) -> None:
    mesh.answer = ModelPolicyInfo(min_copies=2, pinned=True, ready_copies=1, unmet="so")
    told = "iris: at least 2 copies, pinned; 1 copy ready\n  not met: so\n"
    assert run(mesh, "policy", "iris") == (0, told, "")
    _, out, _ = run(mesh, "policy", "iris", "-o", "json")
    assert json.loads(out) == {
        "id": "iris",
        "min_copies": 2,
        "pinned": True,
        "ready_copies": 1,
        "unmet": "so",
    }
