"""What the benchmarks are to reach, and the table with which most of them end.

Owns what a goal is, and what becomes of the exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table."""

    what: str
    figure: float
    #: ">=" or "<=".
    sign: str
    target: float
    unit: str = "x"
    #: Else it was measured at less than what the goal is for, and tells nothing of it.
    is_full_size: bool = True

    @property
    def is_met(self) -> bool:
        """Compare."""
        return self.figure >= self.target if self.sign == ">=" else self.figure <= self.target

    @property
    def is_missed(self) -> bool:
        """Tell whether it has to be reported as a failure."""
        return self.is_full_size and not self.is_met

    @property
    def verdict(self) -> str:
        """One word of the table, or a few."""
        if not self.is_full_size:
            return "not judged: smaller than the goal's size"
        return "met" if self.is_met else "MISSED"


def judge(goals: Sequence[Goal]) -> int:
    """Print the table; answers what the shell gets: 1 if a goal is missed."""
    print(f"\n{'':48}{'target':>20}{'reached':>20}")
    for goal in goals:
        unit = "" if goal.unit == "x" else f" {goal.unit}"
        target = f"{goal.sign} {goal.target:.2f}{unit}"
        print(f"{goal.what:48}{target:>20}{f'{goal.figure:.2f}{unit}':>20}  {goal.verdict}")
    judged = [goal for goal in goals if goal.is_full_size]
    print(f"{sum(goal.is_met for goal in judged)} of {len(judged)} targets met", end="")
    print(f", {len(goals) - len(judged)} not judged" if len(judged) < len(goals) else "")
    return int(any(goal.is_missed for goal in goals))
