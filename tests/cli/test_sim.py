"""`mm sim`: what it prints, and how it ends."""

from __future__ import annotations

import importlib.util

import anyio
import pytest
from typer.testing import CliRunner

from mm.cli import main
from mm.testing import scenarios
from mm.testing.scenarios import Figure, ScenarioReport
from mm.testing.scheduling import run_in_virtual_time


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, ["sim", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_runs_are_counted() -> None:
    code, out, err = run("--seeds", "2", "--instances", "2", "--models", "5", "--seconds", "5")
    assert (code, err) == (0, "")
    assert out.startswith("2 of 2 runs, 0 failed: ")
    assert out.count("\n") == 1


def test_a_failure_tells_its_story_and_how_to_have_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mm.testing.invariants.CALL_S_MAX", 1e-3)
    monkeypatch.setattr("mm.testing.workload.CALL_S_MAX", 1e-3)
    monkeypatch.setattr("mm.testing.workload.PATIENCES_S", (1e-3,))
    code, out, _ = run("--seeds", "1", "--first-seed", "7", "--instances", "3")
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("seed 7 failed after ")
    assert lines[1].startswith("nothing is stuck: a call for ")
    assert "again: mm sim --first-seed 7 --seeds 1 --instances 3" in lines
    assert 3 < lines.index("again: mm sim --first-seed 7 --seeds 1 --instances 3") < 35
    assert lines[-1] == "failed seeds: 7"


@pytest.mark.parametrize(("is_met", "code"), [(True, 0), (False, 1), (None, 0)])
def test_a_scenario_prints_its_figures(
    is_met: bool | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scenario(seed: int) -> ScenarioReport:
        return ScenarioReport("fast", (Figure("loads", "<= 2", str(seed), is_met),))

    monkeypatch.setattr(scenarios, "SCENARIOS", {"fast": scenario})
    found, out, _ = run("fast", "--first-seed", "3")
    assert found == code
    assert out.splitlines()[1].split()[:4] == ["loads", "<=", "2", "3"]


def test_an_unknown_scenario_is_misuse() -> None:
    code, out, err = run("nonsense")
    assert (code, out) == (2, "")
    assert err.startswith("mm: there is no scenario 'nonsense': it is one of cold-burst, ")


def test_without_trio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run() == (1, "", "mm: `mm sim` needs trio: pip install 'mm[sim]'\n")


def test_ctrl_c_in_a_run_is_no_failure_of_it() -> None:
    """It is raised in whichever task runs, deep in the task groups."""

    async def interrupted() -> None:
        async with anyio.create_task_group(), anyio.create_task_group():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_virtual_time(interrupted, "seed")


def test_a_bug_in_a_run_comes_out_as_it_is() -> None:
    async def wrong() -> None:
        async with anyio.create_task_group():
            raise KeyError("bug")

    with pytest.raises(ExceptionGroup) as caught:
        run_in_virtual_time(wrong, "seed")
    assert caught.group_contains(KeyError)
