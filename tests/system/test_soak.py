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


SCRIPT = """
from dataclasses import replace
import soak, _soak_judge
from _soak_judge import Fault, Refusal

# Answered by nobody; refused with INTERNAL; came, and never begun; well.
_, wrong = soak.account(bytes([1, 113, 0, 1]), bytes([0, 0, 1, 0, 1, 1, 1, 1]))
print(wrong)

# One fault is over, one under way. Soon after; during; when its time is up.
faults = [Fault(100.0, 101.0), Fault(900.0)]
late = Refusal.read("refused 5 8033 4 0 deadline exceeded")
refusals = [Refusal(at_s, 14, False, "gone") for at_s in (110, 950)]
refusals.append(replace(late, at_s=140.0))
print(_soak_judge.weigh_refusals(refusals, faults)[1])
print(_soak_judge.weigh_refusals([Refusal(140, 14, True, "gone")], faults)[1])

def growth(kib, pid=7):
    return _soak_judge.growth_of([(pid, each, kib(each)) for each in range(100)])

flat = growth(lambda at: 100_000 + 300_000 * (at % 10 == 3) + at)
leak = growth(lambda at: 100_000 + 30 * at)
print(flat.is_flat, leak.is_flat, leak.more_kib, leak.trend_kib)
print(_soak_judge.growth_of([(7, 0.0, 1), (8, 1.0, 1)]))
"""


def test_what_does_not_hold_is_told() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=False)
    sums, near, far, sizes, restarted = done.stdout.splitlines() or [done.stderr] * 5
    for each in ("have an answer that no runtime gave", "status 13", "were never begun"):
        assert each in sums
    assert near == "[]"
    assert "1 calls refused while nothing failed: status 14 after its answer had begun" in far
    assert sizes.startswith("True False 24")
    assert restarted == "None"
