"""What a scenario prints: figures beside their targets.

Owns the values and the lines they become. Where they are printed is the program's affair.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure; ``is_met`` None says that it stands there to be compared with."""

    text: str
    target: str
    reached: str
    is_met: bool | None

    @property
    def verdict(self) -> str:
        """Answer one word; a miss must catch the eye."""
        return {True: "met", False: "MISSED", None: ""}[self.is_met]


@dataclass(frozen=True, slots=True)
class ScenarioReport:
    """All figures of one scenario."""

    name: str
    figures: tuple[Figure, ...]

    @property
    def is_met(self) -> bool:
        """Answer whether no target was missed."""
        return all(figure.is_met is not False for figure in self.figures)

    def lines(self) -> list[str]:
        """Answer the table to print, one figure a line."""
        rows = [(self.name, "target", "reached", "")]
        rows += [(each.text, each.target, each.reached, each.verdict) for each in self.figures]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
