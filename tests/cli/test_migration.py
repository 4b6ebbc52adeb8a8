"""What the migration guide tells people to type exists: commands, options, settings, metrics."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sysconfig
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


def test_values_of_a_pod_stay_whole(tmp_path: Path) -> None:
    """As `env -0` prints them: with blanks, quotes and lines."""
    (block,) = (each for each in BLOCKS if "mesh.env" in each)
    config = '{"rpcConfigs": {"a.B/c": {}},\n "allowOtherRpcs": true}'
    pod = ["KV_STORE=memory", f"MM_DATAPLANE_CONFIG={config}", "MM_LABELS=it's,a  b", "HOME=/x y"]
    (tmp_path / "mesh.env").write_text("".join(f"{each}\0" for each in pod))
    done = subprocess.run(
        [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            re.sub(r"^ *kubectl.*", "", block).rstrip() + " -o json",
        ],
        cwd=tmp_path,
        env={"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {each["variable"]: each for each in json.loads(done.stdout)}
    assert found["MM_DATAPLANE_CONFIG"]["value"] == "methods: 1"
    assert found["MM_LABELS"]["value"] == "a  b,it's"
