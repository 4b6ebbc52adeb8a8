"""The scenarios that print figures: ``mm sim NAME``, the same numbers every time for a seed.

Owns their names. Each scenario is a file here, a callable from a seed to its report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from mm.testing.scenarios import (
    big_load,
    cold_burst,
    crash,
    day,
    drain,
    fleet_hit_ratio,
    hot,
    join,
    lost_victim,
    rolling,
    store_outage,
    sweep,
    tail,
)
from mm.testing.scenarios.report import Figure, ScenarioReport

__all__ = ["SCENARIOS", "Figure", "Scenario", "ScenarioReport"]

Scenario = Callable[[int], ScenarioReport]

SCENARIOS: Final[Mapping[str, Scenario]] = {
    "cold-burst": cold_burst.run,
    "big-load": big_load.run,
    "tail": tail.run,
    "fleet-hit-ratio": fleet_hit_ratio.run,
    "sweep": sweep.run,
    "lost-victim": lost_victim.run,
    "rolling": rolling.run,
    "day": day.run,
    "drain": drain.run,
    "crash": crash.run,
    "join": join.run_join,
    "flap": join.run_flap,
    "store-outage": store_outage.run,
    "hot": hot.run,
}
