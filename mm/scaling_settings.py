"""What operators say of how many copies a model has (core 9.2), as a part of ``Config``.

The limits that nobody needs to set are in ``mm.limits``; what both come to, ``mm.core.scaling``
knows.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm.core.scaling import ScalingRules
from mm.environment import Environment
from mm.errors import ConfigError
from mm.limits import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSettings:
    """Each is one environment variable."""

    #: MM_SCALEUP_RPM_THRESHOLD: calls a minute that one copy bears; with more, copies are added.
    #: Without effect where the runtime asks for `limitModelConcurrency`.
    rpm_threshold: int = 2000
    #: MM_CONC_SCALEUP_BANDWIDTH_PCT: the part of the calls that a copy takes at a time which it is
    #: to have in flight; with more, copies are added.
    bandwidth_pct: int = 90
    #: MM_MIN_SECOND_COPY_AGE_SECS, MM_MAX_SECOND_COPY_AGE_SECS: a model that is used, and was so
    #: long ago, gets a second copy if there is room.
    second_copy_age_min_s: int = 420
    second_copy_age_max_s: int = 2400

    def rules(self, limits: Limits, *, limits_concurrency: bool) -> ScalingRules:
        """Answer the rules; the runtime says whether it limits its concurrency."""
        return ScalingRules(
            rpm_threshold=self.rpm_threshold,
            in_flight_max=limits.scaleup_in_flight_max,
            limits_concurrency=limits_concurrency,
            bandwidth=self.bandwidth_pct / 100,
            second_age_min_ms=1000 * self.second_copy_age_min_s,
            second_age_max_ms=1000 * self.second_copy_age_max_s,
            settled_ms=round(1000 * limits.scaledown_settled_s),
            drop_gap_ms=round(1000 * limits.scaledown_gap_s),
        )


def scaling_settings(env: Environment) -> ScalingSettings:
    """Read them."""
    names = "MM_MIN_SECOND_COPY_AGE_SECS", "MM_MAX_SECOND_COPY_AGE_SECS"
    ages_s = [
        env.integer(name, default=default_s, minimum=1, maximum=2**31 - 1, meaning="seconds")
        for name, default_s in zip(names, (420, 2400), strict=True)
    ]
    if ages_s[0] > ages_s[1]:
        env.refuse(
            ConfigError(f"{names[0]} is {ages_s[0]}, which is more than {names[1]}, {ages_s[1]}")
        )
    return ScalingSettings(
        rpm_threshold=env.integer(
            "MM_SCALEUP_RPM_THRESHOLD",
            default=2000,
            minimum=1,
            maximum=2**31 - 1,
            meaning="calls a minute",
        ),
        bandwidth_pct=env.integer(
            "MM_CONC_SCALEUP_BANDWIDTH_PCT",
            default=90,
            minimum=10,
            maximum=200,
            meaning="per cent",
        ),
        second_copy_age_min_s=ages_s[0],
        second_copy_age_max_s=ages_s[1],
    )


def copy_calls_max(env: Environment) -> int:
    """Read how many calls a copy has and keeps waiting, where the runtime limits them."""
    return env.integer(
        "MM_MAX_INFLIGHT_PER_MODEL_COPY",
        default=0,
        minimum=-(2**31),
        maximum=2**31 - 1,
        meaning="calls",
    )
