"""The soak's own arithmetic, and a short form of it: ``bench/soak.py`` by hand takes an hour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]
BENCH = Path(__file__).parents[2] / "bench"


def test_a_short_soak_holds() -> None:
    command = [sys.executable, str(BENCH / "soak.py"), "--calls", "3000", "--minutes", "0.15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all holds")


def test_what_does_not_add_up_is_told() -> None:
    script = (
        "import soak\n"
        # Answered by nobody; refused with INTERNAL; came, and never begun; well.
        "told, wrong = soak.account(bytes([1, 113, 0, 1]), bytes([0, 0, 1, 0, 1, 1, 1, 1]))\n"
        "print(sorted(wrong))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=BENCH, capture_output=True, text=True, check=True
    ).stdout
    for each in ("have an answer that no runtime gave", "status 13", "were never begun"):
        assert each in told
