"""The instances of a cluster at one moment: what a decision about placement is made from.

Frozen values. Who keeps them up to date is ``mm.core.cluster_state``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mm.core.ids import NEVER_MS, InstanceId
from mm.core.label_groups import LabelGroups
from mm.core.records import InstanceRecord


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance as this one sees it.

    ``sent_units`` and ``sent_count`` are loads that this instance sent there and that the record,
    which may be seconds old, cannot know of yet: without them a burst of misses all lands on the
    same instance.
    """

    instance_id: InstanceId
    record: InstanceRecord
    #: It has an address, and connections to it do not fail at present. Always True for oneself.
    reachable: bool = True
    sent_units: int = 0
    sent_count: int = 0
    #: Number of its labels in the view's ``label_groups``.
    label_group: int = 0
    #: Part of its id that its replica set has in common; empty for none.
    replica_set: str = ""
    #: Space for another model without evicting. This and what follows is drawn from the above, once
    #: for each event: decisions are many, and look at every instance.
    remaining_units: int = field(init=False, compare=False, repr=False)
    #: Last use of its oldest model; one that says nothing is not taken for an ancient one.
    lru_time_ms: int = field(init=False, compare=False, repr=False)
    #: Loads there that have not ended, as far as anybody here knows.
    load_count: int = field(init=False, compare=False, repr=False)
    #: How many rounds of its loading threads are taken already.
    load_rounds: float = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        record, put = self.record, object.__setattr__
        put(self, "remaining_units", max(0, record.remaining_units - self.sent_units))
        put(self, "lru_time_ms", record.lru_time_ms if record.lru_time_ms > 0 else NEVER_MS)
        put(self, "load_count", record.loads_in_progress + self.sent_count)
        put(self, "load_rounds", self.load_count / max(1, record.loading_threads))

    def with_sent(self, units: int, count: int) -> InstanceView:
        """Answer it after other loads were sent there; ``replace`` takes twice as long."""
        return InstanceView(
            self.instance_id,
            self.record,
            self.reachable,
            units,
            count,
            self.label_group,
            self.replica_set,
        )


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All instances at one moment, ourselves among them with a fresh record."""

    instances: tuple[InstanceView, ...]
    self_id: InstanceId
    now_ms: int
    #: Less than this remaining means "full", at instances that do not say so themselves (spec core
    #: 3.1).
    min_space_units: int = 0
    #: A full instance whose oldest model was used more recently than this is saturated: what is
    #: loaded there now would push out what is in use. 0: never.
    saturated_age_ms: int = 0
    label_groups: LabelGroups = field(default_factory=LabelGroups)
    #: Replica sets, as (labels, name), that are likely being replaced by newer ones.
    replaced: frozenset[tuple[tuple[str, ...], str]] = frozenset()

    def find(self, instance_id: InstanceId) -> InstanceView | None:
        """Answer one instance; walks through all."""
        return next((each for each in self.instances if each.instance_id == instance_id), None)
