"""Has each model loaded in as many copies as it is called for (spec core 5.3, 5.5; decision 12).

Owns the carrying out: when to look, what is asked of whom. The demand is ``demands``', every
decision ``core.scaling``'s, where a copy goes ``preloader``'s, giving one up ``janitor``'s.

One instance decides about a model at a time (``Demands.decider``). What it asks for counts as a
copy from then on (``core.asked_copies``), so looking again a moment later asks for no more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.asked_copies import AskedCopies
from mm.core.cluster_state import ClusterState
from mm.core.cluster_view import ClusterView
from mm.core.demand import Capacity
from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.placement_bands import Ranking
from mm.core.records import InstanceRecord, ModelRecord
from mm.core.scaling import (
    BESIDE_JAVA_MAX,
    HEAVY,
    CopyCounts,
    CopyUse,
    DropBudget,
    Room,
    ScalingRules,
    Surplus,
    copies_to_add,
    has_room_for_second,
    is_unused_second,
)
from mm.mesh.copies import Copies
from mm.mesh.demands import Demands
from mm.mesh.janitor import Janitor
from mm.mesh.members import Members
from mm.mesh.ports import PeerCallError, Peers
from mm.mesh.preloader import Preloader, PreloadReason
from mm.mesh.registry import Registry

if TYPE_CHECKING:
    from mm.mesh.composition import Parts

logger = logging.getLogger(__name__)

#: Models looked at before others have their turn: a slice of a few milliseconds.
SLICE_COUNT: Final = 200


class Scaler:
    """Adds copies of what is in demand, and gives up those that are too many."""

    def __init__(
        self,
        *,
        config: Config,
        rules: ScalingRules,
        demands: Demands,
        registry: Registry,
        members: Members,
        cluster: ClusterState,
        copies: Copies,
        preloader: Preloader,
        janitor: Janitor,
        peers: Peers,
        own_record: Callable[[], InstanceRecord],
    ) -> None:
        self._me = config.instance_id
        self._config = config
        self._rules = rules
        self.demands = demands
        self._registry = registry
        self._members = members
        self._cluster = cluster
        self._copies = copies
        self._preloader = preloader
        self._janitor = janitor
        self._budget = DropBudget()
        self._peers = peers
        self._own_record = own_record
        self._asked: dict[ModelId, AskedCopies] = {}
        self._asking_count = 0
        self._is_looking_at_surplus = False
        self._uses: dict[ModelId, CopyUse] = {}
        self._surplus: dict[ModelId, Surplus] = {}
        #: When a copy of a model went because of us.
        self._dropped_ms: dict[ModelId, int] = {}

    def set_rpm_threshold(self, rpm_threshold: int) -> None:
        """Let a copy bear so many calls a minute from the next look on."""
        self._rules = self.demands.rules = replace(self._rules, rpm_threshold=rpm_threshold)

    def hear(self, sender: InstanceId, demands: Mapping[ModelId, tuple[int, int]]) -> None:
        """Take in what another holder tells of its copies."""
        self.demands.hear(sender, demands)

    async def give_up(self, model_id: ModelId) -> bool:
        """Give up the copy here, which a peer that decides, or we, find to be one too many; answers
        whether it goes. An instance gives up little at a time.
        """
        copy = self._copies.get(model_id)
        if copy is None or not copy.serves or self._copies.closed is not None:
            return False
        capacity_units = self._copies.table.capacity_units
        now_ms = self._copies.clock.now_ms()
        if not self._budget.has(copy.weight_units, capacity_units, now_ms):
            return False
        is_given_up = await self._janitor.give_up(model_id)
        if is_given_up:
            self._budget.take(copy.weight_units, now_ms)
            self._copies.counters.copies_dropped += 1
            logger.info("model %s: the copy here was one too many", model_id)
        return is_given_up

    async def run(self) -> None:
        """Look, until cancelled."""
        window_s = self._rules.second_age_min_ms / 1000
        surplus_s = min(self._config.surplus_interval_s, window_s / 8)
        surplus_due_s = anyio.current_time() + surplus_s
        async with anyio.create_task_group() as group:
            while True:
                await anyio.sleep(self._config.demand_interval_s)
                if self._copies.closed is not None:
                    continue  # this instance stops: others decide from now on
                self.demands.look(group)
                self._add_for_demand(group)
                if anyio.current_time() >= surplus_due_s:
                    self._forget_asked(anyio.current_time())
                    await self._look_at_uses(group)
                    # It waits for peers, and what is called more must not.
                    if not self._is_looking_at_surplus:
                        self._is_looking_at_surplus = True
                        group.start_soon(self._look_at_surplus)
                    surplus_due_s = anyio.current_time() + surplus_s

    # --- more ---------------------------------------------------------------------------------

    def _add_for_demand(self, group: TaskGroup) -> None:
        """Ask for copies of what is called more than its copies bear."""
        now_s, now_ms = anyio.current_time(), self._copies.clock.now_ms()
        for model_id, demand in self.demands.hot.items():
            needed = demand.copies_at_least(self._capacity(model_id))
            if needed <= 1:
                continue
            record = self._registry.get(model_id)
            if record is None or not self._may_ask(model_id, now_s):
                continue
            if self.demands.decider(record, now_ms) != self._me:
                continue
            counts = self._counts(model_id, record, now_ms)
            count = copies_to_add(needed, counts)
            if count > 0:
                logger.info(
                    "model %s is called for %.1f copies, of %d and %d on their way: %d more",
                    model_id,
                    needed,
                    counts.ready_count,
                    counts.coming_count,
                    count,
                )
                self._begin_asking(group, model_id, count, PreloadReason.SCALE_UP)

    def _may_ask(self, model_id: ModelId, now_s: float) -> bool:
        if self._asking_count >= self._config.scale_ups_at_once_max:
            return False
        asked = self._asked.get(model_id)
        return asked is None or asked.may_ask(now_s)

    def _begin_asking(
        self,
        group: TaskGroup,
        model_id: ModelId,
        count: int,
        reason: PreloadReason,
        exclude: frozenset[InstanceId] = frozenset(),
    ) -> None:
        self._asking_count += 1
        asked = self._asked.setdefault(model_id, AskedCopies())
        asked.begin()
        group.start_soon(self._ask, model_id, asked, count, reason, exclude | {self._me})

    async def _ask(
        self,
        model_id: ModelId,
        asked: AskedCopies,
        count: int,
        reason: PreloadReason,
        exclude: frozenset[InstanceId],
    ) -> None:
        """Ask for copies, one after the other: each excludes those before it."""
        counters = self._copies.counters
        try:
            for _ in range(count):
                taken = await self._preloader.request(
                    model_id,
                    last_used_ms=self._copies.clock.now_ms(),
                    exclude=asked.unseen | exclude,
                    reason=reason,
                )
                if taken is None:
                    asked.refused(anyio.current_time())
                    return
                asked.accepted(taken, anyio.current_time())
                if reason is PreloadReason.SCALE_UP:
                    counters.copies_added += 1
                else:
                    counters.second_copies_added += 1
        finally:
            asked.end()
            self._asking_count -= 1

    def _forget_asked(self, now_s: float) -> None:
        """Of models that are gone, or that nobody looks at any more, nothing is remembered."""
        now_ms = self._copies.clock.now_ms()
        for model_id, asked in list(self._asked.items()):
            record = self._registry.get(model_id)
            if record is not None:
                asked.look(record.copies, self._members.holders(record, now_ms).ready, now_s)
            if record is None or asked.is_stale(now_s):
                del self._asked[model_id]

    # --- what is in recurring use ---------------------------------------------------------------

    async def _look_at_uses(self, group: TaskGroup) -> None:
        """Ask for a second copy of what is used again and again, where there is room for it."""
        used, self.demands.used = self.demands.used, set()
        now_ms = self._copies.clock.now_ms()
        newcomers: frozenset[InstanceId] | None = None
        for number, model_id in enumerate(sorted(used)):
            if number % SLICE_COUNT == SLICE_COUNT - 1:
                await anyio.lowlevel.checkpoint()
            copy = self._copies.get(model_id)
            if copy is None or not copy.serves:
                continue
            use = self._uses.get(model_id)
            if use is None:
                self._uses[model_id] = CopyUse(now_ms)
            elif use.used(now_ms, self._rules):
                if newcomers is None:
                    newcomers = self._cluster.newcomers(now_ms - self._rules.second_age_min_ms)
                self._add_second(group, model_id, newcomers, now_ms)
        if len(self._uses) > 2 * len(self._copies) + SLICE_COUNT:
            here = {copy.model_id for copy in self._copies}
            self._uses = {each: use for each, use in self._uses.items() if each in here}

    def _add_second(
        self,
        group: TaskGroup,
        model_id: ModelId,
        newcomers: frozenset[InstanceId],
        now_ms: int,
    ) -> None:
        """Newcomers get none, and their room does not count: one that comes and goes would be given
        the same copies each time.
        """
        record = self._registry.get(model_id)
        if record is None or self._me not in record.copies:
            return
        if any(i != self._me and not self._members.is_foreign(i) for i in record.copies):
            return
        if not self._may_ask(model_id, anyio.current_time()):
            return
        counts = self._counts(model_id, record, now_ms)
        if counts.ready_count != 1 or counts.coming_count or not counts.hosts_left_count:
            return
        if has_room_for_second(self._room(record, now_ms, newcomers), self._rules):
            logger.info("model %s is in recurring use: a second copy", model_id)
            self._begin_asking(group, model_id, 1, PreloadReason.SECOND_COPY, newcomers)

    # --- fewer --------------------------------------------------------------------------------

    async def _look_at_surplus(self) -> None:
        """Have copies given up that are too many."""
        try:
            await self._give_up_surplus()
        finally:
            self._is_looking_at_surplus = False

    async def _give_up_surplus(self) -> None:
        shared = self.demands.shared
        #: Those that did not answer: one at a time is waited for, and each once.
        mute: set[InstanceId] = set()
        for model_id in [each for each in self._surplus if each not in shared]:
            del self._surplus[model_id]
            self._dropped_ms.pop(model_id, None)
        view: ClusterView | None = None
        for number, model_id in enumerate(sorted(shared)):
            if number % SLICE_COUNT == SLICE_COUNT - 1:
                await anyio.lowlevel.checkpoint()
            now_ms = self._copies.clock.now_ms()
            record, copy = self._registry.get(model_id), self._copies.get(model_id)
            if record is None or copy is None or not copy.serves:
                continue
            counts = self._counts(model_id, record, now_ms)
            room = self._room(record, now_ms)
            is_decider = self.demands.decider(record, now_ms) == self._me
            is_too_many = is_decider and self._is_too_many(model_id, counts, room, now_ms)
            if not is_too_many and not self._is_unused(model_id, counts, room, now_ms):
                continue
            if view is None:
                now_s = anyio.current_time()
                view = self._cluster.view(self._own_record(), now_ms=now_ms, now_s=now_s)
            serving = set(self._members.holders(record, now_ms).serving)
            if is_too_many:
                # Not ours: whoever decides next knows nothing of the time that was held.
                worst = _worst(view, serving - {self._me}, copy.weight_units)
                if worst is not None and worst not in mute:
                    self._dropped_ms[model_id] = now_ms
                    if not await self._ask_to_give_up(model_id, worst):
                        mute.add(worst)
            elif _worst(view, serving, copy.weight_units) == self._me:
                await self.give_up(model_id)

    def _is_too_many(self, model_id: ModelId, counts: CopyCounts, room: Room, now_ms: int) -> bool:
        surplus = self._surplus.get(model_id)
        if surplus is None:
            surplus = self._surplus[model_id] = Surplus(now_ms)
        demand = self.demands.hot.get(model_id)
        likely = 0.0 if demand is None else demand.copies_likely(self._capacity(model_id))
        if likely > HEAVY * counts.ready_count and model_id in self._uses:
            self._uses[model_id].heavy_ms = now_ms
        surplus.look(likely, counts.ready_count, now_ms)
        return surplus.is_one_too_many(counts, room, self._rules, now_ms)

    def _is_unused(self, model_id: ModelId, counts: CopyCounts, room: Room, now_ms: int) -> bool:
        """Answer whether ours is one of two copies, and nobody uses it."""
        last_used_ms = self._copies.table.last_used(model_id) or now_ms
        use = self._uses.get(model_id)
        heavy_ms = 0 if use is None else use.heavy_ms
        return is_unused_second(now_ms - last_used_ms, heavy_ms, counts, room, self._rules, now_ms)

    async def _ask_to_give_up(self, model_id: ModelId, instance_id: InstanceId) -> bool:
        """Answer whether it said anything."""
        address = self._members.address_or_none(instance_id)
        if address is None:
            return False
        try:
            is_given_up = await self._peers.withdraw_copy(
                address, model_id, timeout_s=self._config.withdraw_timeout_s
            )
        except PeerCallError as exc:
            logger.debug("instance %s keeps model %s: %s", instance_id, model_id, exc.message)
            return False
        logger.debug(
            "instance %s %s its copy of model %s, which is one too many",
            instance_id,
            "gives up" if is_given_up else "keeps",
            model_id,
        )
        return True

    # --- what decisions are made from -----------------------------------------------------------

    def _capacity(self, model_id: ModelId) -> Capacity:
        return self._rules.capacity(self._copies.table.concurrency_max(model_id))

    def _counts(self, model_id: ModelId, record: ModelRecord, now_ms: int) -> CopyCounts:
        holders = self._members.holders(record, now_ms)
        asked, unseen = self._asked.get(model_id), frozenset[InstanceId]()
        if asked is not None:
            asked.look(record.copies, holders.ready, anyio.current_time())
            unseen = asked.unseen
            if asked.is_forgettable:
                del self._asked[model_id]
        verdict = self._config.failure_rules.verdict(model_id, record, now_ms)
        hosts_left_count = 0
        if verdict.final is None:
            out = verdict.excluded | unseen | set(holders.ready) | set(holders.coming)
            hosts_count = self._cluster.statistics_of(record.info.model_type).instance_count
            hosts_left_count = max(0, hosts_count - len(out))
        present_count = len(holders.ready) + len(holders.coming) + len(unseen)
        if present_count + hosts_left_count > BESIDE_JAVA_MAX and self._members.foreign_count:
            hosts_left_count = max(0, BESIDE_JAVA_MAX - present_count)
        return CopyCounts(
            ready_count=len(holders.ready),
            coming_count=len(holders.coming) + len(unseen),
            hosts_left_count=hosts_left_count,
            copies_min=record.policy.copies_needed,
            newest_ms=max(record.copies.values(), default=0),
            dropped_ms=max(record.last_unload_ms, self._dropped_ms.get(model_id, 0)),
        )

    def _room(
        self, record: ModelRecord, now_ms: int, without: frozenset[InstanceId] = frozenset()
    ) -> Room:
        sums = self._cluster.statistics_of(record.info.model_type, without)
        if not sums.capacity_units:
            return Room(0.0, 0)
        age_ms = 0 if sums.lru_time_ms == NEVER_MS else max(0, now_ms - sums.lru_time_ms)
        return Room(sums.free_units / sums.capacity_units, age_ms)


def compose_scaler(
    config: Config, peers: Peers, parts: Parts, own_record: Callable[[], InstanceRecord]
) -> Scaler:
    """Put a scaler together with what it alone uses."""
    limits_concurrency = parts.parameters.limit_model_concurrency
    rules = config.scaling.rules(config, limits_concurrency=limits_concurrency)
    demands = Demands(
        me=config.instance_id,
        rules=rules,
        limits=config,
        registry=parts.registry,
        members=parts.members,
        copies=parts.copies,
        peers=peers,
    )
    return Scaler(
        config=config,
        rules=rules,
        demands=demands,
        registry=parts.registry,
        members=parts.members,
        cluster=parts.cluster,
        copies=parts.copies,
        preloader=parts.preloader,
        janitor=parts.janitor,
        peers=peers,
        own_record=own_record,
    )


def _worst(view: ClusterView, instances: Set[InstanceId], size_units: int) -> InstanceId | None:
    """Answer which of some instances is the worst place for a model."""
    ranking = Ranking(view, size_units)
    known = [each for each in view.instances if each.instance_id in instances]
    return max(known, key=ranking.key).instance_id if known else None
