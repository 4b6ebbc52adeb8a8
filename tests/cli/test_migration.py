"""What the migration guide tells people to type exists: commands, options, settings, metrics."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mm.cli.main import app
from mm.edge.own_series import COUNTERS, GAUGES

GUIDE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
BLOCKS = re.findall(r"^ *```\n(.*?)^ *```$", GUIDE, re.M | re.S)
COMMANDS = sorted(set(re.findall(r"\bmm [a-z].*$", "\n".join(BLOCKS), re.M)))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist(line: str) -> None:
    words = shlex.split(line)[1:]
    options = [word for word in words if word.startswith("--")]
    commands = words[: words.index(options[0])] if options else words
    answer = CliRunner().invoke(app, [*commands, "--help"])
    assert answer.exit_code == 0, answer.output
    assert set(options) <= set(re.findall(r"--[a-z-]+", answer.output))


def test_the_guide_has_commands_and_metrics_that_exist() -> None:
    assert len(COMMANDS) >= 3
    known = {f"mm_{name}" for name in (*COUNTERS, *GAUGES)}
    assert set(re.findall(r"`(mm_[a-z_]+)`", GUIDE)) <= known
