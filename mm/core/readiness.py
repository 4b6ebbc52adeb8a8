"""Whether clients should be sent to an instance: the gate of a rolling upgrade (spec core 7.1, 7.5,
around 20).

Owns the decision. The facts are ``mm.mesh.readiness``'s, who shows it is ``edge``'s. Not being
ready refuses nothing: peers and whoever calls all the same are served.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Unready(enum.Enum):
    """Why an instance is not ready, for people."""

    STARTING = "it is starting"
    STOPPING = "it is shutting down"
    LOADS_FAIL = "its first loads failed, and others can take the calls"
    OTHERS_STOP = "others that shut down still move their models"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class ReadinessFacts:
    """What readiness depends on, at one moment."""

    #: Runtime, store, mirrors and the own record are there (spec core 7.1).
    has_started: bool = False
    is_stopping: bool = False
    #: It was ready before: what others do no longer matters.
    has_been_ready: bool = False
    #: The probation of spec core 7.3.
    loads_fail: bool = False
    #: Others that could take calls: neither shutting down, nor do their first loads fail.
    able_count: int = 0
    #: Others that are shutting down.
    stopping_count: int = 0
    #: Of the time that one waits for those, nothing is left.
    has_waited_enough: bool = False


def unready_because(facts: ReadinessFacts) -> Unready | None:
    """Answer what keeps an instance from being ready; None: it is.

    A rollout goes on when a new instance is ready, by stopping an old one. So a new one waits until
    all that stop are gone: then only one at a time moves its models. Whether the first loads fail
    matters only while somebody else is there, for else nobody would serve at all.
    """
    if not facts.has_started:
        return Unready.STARTING
    if facts.is_stopping:
        return Unready.STOPPING
    if facts.loads_fail and facts.able_count:
        return Unready.LOADS_FAIL
    if facts.stopping_count and not facts.has_been_ready and not facts.has_waited_enough:
        return Unready.OTHERS_STOP
    return None
