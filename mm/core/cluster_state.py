"""What this instance knows of all instances, kept up to date event by event (spec core 1.11).

Owns the cluster view and the statistics of its partitions. Each event costs the same however many
instances and models there are; only labels never seen before, and new constraints, cost a walk
through the groups. Does not own addresses and connections: ``mm.mesh.members`` tells it of them.
"""

from __future__ import annotations

from collections.abc import Set

from mm.core.cluster_statistics import ClusterStatistics, Tally
from mm.core.cluster_view import ClusterView, InstanceView
from mm.core.constraints import NO_CONSTRAINTS, TypeConstraints
from mm.core.hop_state import HopState
from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.label_groups import LabelGroups
from mm.core.records import InstanceRecord
from mm.core.replica_sets import ReplicaSets, replica_set_of
from mm.core.sent_loads import SentLoads


class ClusterState:
    """The instances that are there and not shutting down.

    Invariants: 1. an instance is counted in exactly one tally, with the record in ``_records``.
    2. ``_views`` has every other instance, built from its record, or from newer facts that it sent
    with a refusal. 3. ``_others`` is None or the values of ``_views``.
    """

    def __init__(
        self,
        me: InstanceId,
        labels: tuple[str, ...] = (),
        *,
        min_space_units: int = 0,
        saturated_age_ms: int = 0,
        constraints: TypeConstraints = NO_CONSTRAINTS,
    ) -> None:
        self._me = me
        self._min_space_units = min_space_units
        self._saturated_age_ms = saturated_age_ms
        self._constraints = constraints
        self._records: dict[InstanceId, InstanceRecord] = {}
        self._views: dict[InstanceId, InstanceView] = {}
        self._others: tuple[InstanceView, ...] | None = None
        #: Who cannot be reached, until when.
        self._away: dict[InstanceId, float] = {}
        self._sent = SentLoads()
        self._replica_sets = ReplicaSets()
        #: labels -> number, and how many instances have them. Our own stay for ever.
        self._group_numbers: dict[tuple[str, ...], int] = {}
        self._group_sizes: dict[tuple[str, ...], int] = {}
        self._groups_made = 0
        self._label_groups = LabelGroups(constraints)
        self._tallies: dict[frozenset[str], Tally] = {}
        self._enter_group(labels)
        self._own_group = self._group_numbers[labels]
        self._own_replica_set = replica_set_of(me)

    # --- events -------------------------------------------------------------------------------

    def put(
        self, instance_id: InstanceId, record: InstanceRecord, *, now_ms: int, now_s: float
    ) -> None:
        """An instance appeared, or its record changed."""
        if record.shutting_down:
            self.remove(instance_id, now_ms=now_ms)
            return
        known = self._records.get(instance_id)
        if known is None:
            self._enter(instance_id, record)
        elif (known.labels, known.start_time_ms) != (record.labels, record.start_time_ms):
            self._leave(instance_id, known, now_ms=now_ms)
            self._enter(instance_id, record)
        else:
            tally = self._tally(record)
            tally.remove(instance_id, known)
            tally.add(instance_id, record)
        self._records[instance_id] = record
        self._sent.observed(instance_id, now_s)
        self._refresh(instance_id)

    def remove(self, instance_id: InstanceId, *, now_ms: int) -> None:
        """An instance is gone, or shutting down, which is the same to whoever looks for a place."""
        record = self._records.pop(instance_id, None)
        if record is None:
            return
        self._leave(instance_id, record, now_ms=now_ms)
        self._sent.forget(instance_id)
        self._away.pop(instance_id, None)
        self._views.pop(instance_id, None)
        self._others = None

    def set_away(self, instance_id: InstanceId, until_s: float) -> None:
        """Connections to it fail: it is not chosen before then."""
        if instance_id in self._views:
            self._away[instance_id] = until_s
            self._refresh(instance_id)

    def set_back(self, instance_id: InstanceId) -> None:
        """It answers again."""
        if self._away.pop(instance_id, None) is not None:
            self._refresh(instance_id)

    def learn(
        self,
        instance_id: InstanceId,
        state: HopState,
        *,
        now_s: float,
        refused: ModelId | None = None,
    ) -> None:
        """It told its state with a refusal: that counts until its next record. ``refused``: the
        model whose load was sent there.
        """
        view = self._views.get(instance_id)
        if view is not None:
            self._sent.observed(instance_id, now_s)
            if refused is not None:
                self._sent.told(instance_id, refused)
            self._refresh(instance_id, state.update(view.record))

    def set_constraints(self, constraints: TypeConstraints) -> None:
        """Other constraints hold from now on: everybody is counted anew."""
        self._constraints = constraints
        self._regroup()
        self._tallies.clear()
        for instance_id, record in self._records.items():
            self._tally(record).add(instance_id, record)

    # --- loads of ours ------------------------------------------------------------------------

    def load_sent(
        self, instance_id: InstanceId, model_id: ModelId, size_units: int, *, now_s: float
    ) -> None:
        """A call goes there to have a model loaded."""
        if instance_id in self._views:
            self._sent.sent(instance_id, model_id, size_units, now_s)
            self._recount(instance_id)

    def load_ended(
        self, instance_id: InstanceId, model_id: ModelId, *, took: bool, is_loading: bool
    ) -> None:
        """The call came back; see ``SentLoads.ended``."""
        self._sent.ended(instance_id, model_id, took=took, is_loading=is_loading)
        self._recount(instance_id)

    def load_target(self, model_id: ModelId) -> InstanceId | None:
        """Answer where a load of the model was sent that its record cannot tell of yet."""
        return self._sent.target(model_id)

    # --- questions ----------------------------------------------------------------------------

    @property
    def constraints(self) -> TypeConstraints:
        """The constraints that hold now."""
        return self._constraints

    def view(self, own: InstanceRecord, *, now_ms: int, now_s: float) -> ClusterView:
        """Answer the frozen view for one decision, with our own record as of now."""
        for instance_id in self._sent.expire(now_s):
            self._recount(instance_id)
        if self._away:
            for instance_id, until_s in list(self._away.items()):
                if until_s <= now_s:
                    self.set_back(instance_id)
        if self._others is None:
            self._others = tuple(self._views.values())
        ourselves = InstanceView(
            self._me,
            own,
            label_group=self._own_group,
            replica_set=self._own_replica_set,
        )
        return ClusterView(
            instances=(*self._others, ourselves),
            self_id=self._me,
            now_ms=now_ms,
            min_space_units=self._min_space_units,
            saturated_age_ms=self._saturated_age_ms,
            label_groups=self._label_groups,
            replaced=self._replica_sets.replaced(now_ms),
        )

    def partitions(self) -> dict[frozenset[str], ClusterStatistics]:
        """Answer the sums of each partition, by the types that its instances must not host."""
        return {prohibited: tally.statistics() for prohibited, tally in self._tallies.items()}

    def newcomers(self, after_ms: int) -> frozenset[InstanceId]:
        """Answer who started after a moment; looks at everybody."""
        return frozenset(i for i, each in self._records.items() if each.start_time_ms > after_ms)

    def statistics_of(
        self, model_type: str, without: Set[InstanceId] = frozenset()
    ) -> ClusterStatistics:
        """Answer the sums of all instances that may host a type, but some that are few."""
        key = self._constraints.key(model_type)
        sums = [
            tally.statistics()
            for prohibited, tally in self._tallies.items()
            if key not in prohibited
        ]
        left_out = [self._records[each] for each in without if each in self._records]
        left_out = [each for each in left_out if key not in self._partition(each)]
        free_units = sum(each.free_units for each in sums)
        capacity_units = sum(each.capacity_units for each in sums)
        return ClusterStatistics(
            instance_count=sum(each.instance_count for each in sums) - len(left_out),
            capacity_units=capacity_units - sum(each.capacity_units for each in left_out),
            free_units=free_units - sum(self._tally(each).free_units(each) for each in left_out),
            copy_count=sum(each.copy_count for each in sums) - sum(each.count for each in left_out),
            # Theirs may be the oldest copy: such a model is no younger for being there.
            lru_time_ms=min((each.lru_time_ms for each in sums), default=NEVER_MS),
        )

    def hosts(self, model_type: str) -> dict[InstanceId, InstanceRecord]:
        """Answer all instances that may host a type; walks through them."""
        key = self._constraints.key(model_type)
        return {
            instance_id: record
            for instance_id, record in self._records.items()
            if key not in self._partition(record)
        }

    # --- inside -------------------------------------------------------------------------------

    def _enter(self, instance_id: InstanceId, record: InstanceRecord) -> None:
        self._enter_group(record.labels)
        self._replica_sets.add(instance_id, record.labels, record.start_time_ms)
        self._tally(record).add(instance_id, record)

    def _leave(self, instance_id: InstanceId, record: InstanceRecord, *, now_ms: int) -> None:
        key = self._partition(record)
        self._tallies[key].remove(instance_id, record)
        if not self._tallies[key]:
            del self._tallies[key]
        self._replica_sets.remove(instance_id, record.labels, record.start_time_ms, now_ms)
        self._leave_group(record.labels)

    def _partition(self, record: InstanceRecord) -> frozenset[str]:
        return self._label_groups.prohibited(self._group_numbers[record.labels])

    def _tally(self, record: InstanceRecord) -> Tally:
        key = self._partition(record)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally(self._min_space_units)
        return tally

    def _enter_group(self, labels: tuple[str, ...]) -> None:
        size = self._group_sizes.get(labels, 0)
        self._group_sizes[labels] = size + 1
        if size == 0:
            self._group_numbers[labels] = self._groups_made
            self._groups_made += 1
            self._regroup()

    def _leave_group(self, labels: tuple[str, ...]) -> None:
        self._group_sizes[labels] -= 1
        if self._group_sizes[labels] == 0:
            del self._group_sizes[labels]
            del self._group_numbers[labels]
            self._regroup()

    def _regroup(self) -> None:
        self._label_groups = LabelGroups(
            self._constraints,
            {number: frozenset(labels) for labels, number in self._group_numbers.items()},
        )

    def _refresh(self, instance_id: InstanceId, record: InstanceRecord | None = None) -> None:
        """Build the view of an instance anew, from its record or from something newer."""
        if instance_id == self._me:
            return
        record = record or self._records[instance_id]
        sent_units, sent_count = self._sent.sums(instance_id)
        self._views[instance_id] = InstanceView(
            instance_id,
            record,
            reachable=bool(record.address) and instance_id not in self._away,
            sent_units=sent_units,
            sent_count=sent_count,
            label_group=self._group_numbers[record.labels],
            replica_set=replica_set_of(instance_id),
        )
        self._others = None

    def _recount(self, instance_id: InstanceId) -> None:
        view = self._views.get(instance_id)
        if view is not None:
            units, count = self._sent.sums(instance_id)
            if (units, count) != (view.sent_units, view.sent_count):
                self._views[instance_id] = view.with_sent(units, count)
                self._others = None
