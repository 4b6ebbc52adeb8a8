"""The demand for the models that this instance decides about, from its own calls and what others
tell it (spec core 5.2-5.3, 10.9 item 8; decision 12).

Owns the looks at the table, who decides about a model, and what holders tell each other. How many
copies follow from it is ``scaler``'s. A call costs nothing here: the table counts it anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import anyio
from anyio.abc import TaskGroup

from mm.core.demand import Demand
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.core.scaling import ScalingRules
from mm.limits import Limits
from mm.mesh.copies import Copies
from mm.mesh.members import Members
from mm.mesh.ports import PeerCallError, Peers
from mm.mesh.registry import Registry

logger = logging.getLogger(__name__)

#: Of what one copy bears, what a copy must have to be worth a word. Below, so many copies together
#: are worth one; they are too many then, and with each that goes the others have more.
TOLD_PART: Final = 1 / 8
#: What was told is believed for so many looks.
BELIEVED_LOOKS: Final = 4


@dataclass(slots=True)
class _Told:
    """What another holder said last."""

    calls: int
    in_flight: int
    at_s: float


class Demands:
    """Who decides about a model: of the instances with a ready copy the one that has it longest. So
    the role changes hands only when that one goes, and never because of a copy that it had made.
    """

    def __init__(
        self,
        *,
        me: InstanceId,
        rules: ScalingRules,
        limits: Limits,
        registry: Registry,
        members: Members,
        copies: Copies,
        peers: Peers,
    ) -> None:
        self._me = me
        self.rules = rules
        self._limits = limits
        self._registry = registry
        self._members = members
        self._copies = copies
        self._peers = peers
        self._table = copies.table
        #: Models with a copy here and one elsewhere.
        self.shared: set[ModelId] = set()
        #: Models called here since somebody emptied it.
        self.used: set[ModelId] = set()
        #: What is in demand, of models that this instance decides about.
        self.hot: dict[ModelId, Demand] = {}
        self._told: dict[ModelId, dict[InstanceId, _Told]] = {}
        #: None before the first look: the clock has no beginning that means anything.
        self._looked_s: float | None = None
        #: Peers that are being told, and those that do not listen, until when.
        self._under_way: set[InstanceId] = set()
        self._resting: dict[InstanceId, float] = {}
        registry.listen(self._record_changed)

    def decider(self, record: ModelRecord, now_ms: int) -> InstanceId | None:
        """Answer who decides about a model; None while nobody has a ready copy."""
        ready = self._members.holders(record, now_ms).deciding
        return min(ready, key=lambda each: (record.copies[each], each), default=None)

    def hear(self, sender: InstanceId, demands: Mapping[ModelId, tuple[int, int]]) -> None:
        """Take in the calls, and calls in flight, of another holder's copies since it told last."""
        now_s = anyio.current_time()
        for model_id, (calls, in_flight) in demands.items():
            if model_id not in self.shared:
                continue  # what is not here is not ours to decide
            told = self._told.setdefault(model_id, {})
            known = told.get(sender)
            told[sender] = _Told(calls + (known.calls if known else 0), in_flight, now_s)

    def look(self, group: TaskGroup) -> None:
        """Look at all copies here, and tell the others of theirs."""
        now_s = anyio.current_time()
        looked_s = self._looked_s
        elapsed_s = self._limits.demand_interval_s if looked_s is None else now_s - looked_s
        self._looked_s = now_s
        now_ms = self._copies.clock.now_ms()
        calls_min = self._calls_min(elapsed_s)
        news: dict[InstanceId, dict[ModelId, tuple[int, int]]] = {}
        looked: dict[ModelId, tuple[int, int]] = {}
        for name, calls, in_flight in self._table.take_busy():
            model_id = ModelId(name)
            if calls:
                self.used.add(model_id)
            if calls < calls_min and not in_flight and model_id not in self.hot:
                continue
            decider = self._decider_of(model_id, now_ms)
            if decider == self._me:
                looked[model_id] = calls, in_flight
            elif decider is not None:
                news.setdefault(decider, {})[model_id] = calls, in_flight
        for model_id in self._told:
            if self._decider_of(model_id, now_ms) == self._me:
                looked.setdefault(model_id, (0, 0))
        for model_id in looked:
            if model_id not in self.hot:
                self.hot[model_id] = Demand()
        for model_id, demand in list(self.hot.items()):
            calls, in_flight = looked.get(model_id, (0, 0))
            calls, in_flight = self._with_told(model_id, calls, in_flight, now_s)
            demand.look(calls, in_flight, self._slots(model_id, now_ms), elapsed_s)
            if demand.is_idle or self._copies.get(model_id) is None:
                del self.hot[model_id]
        self._tell(group, news, now_s)

    def _calls_min(self, elapsed_s: float) -> float:
        if self.rules.limits_concurrency:
            return 1
        return TOLD_PART * self.rules.rpm_threshold / 60 * min(elapsed_s, 60.0)

    def _decider_of(self, model_id: ModelId, now_ms: int) -> InstanceId | None:
        if model_id not in self.shared:
            return self._me
        record = self._registry.get(model_id)
        return None if record is None else self.decider(record, now_ms)

    def _slots(self, model_id: ModelId, now_ms: int) -> int:
        """Answer the calls that all copies together take at a time; 0 if nobody says."""
        slots = self._table.concurrency_max(model_id)
        if not slots or model_id not in self.shared:
            return slots
        record = self._registry.get(model_id)
        if record is None:
            return slots
        return slots * max(1, len(self._members.holders(record, now_ms).ready))

    def _with_told(
        self, model_id: ModelId, calls: int, in_flight: int, now_s: float
    ) -> tuple[int, int]:
        told = self._told.get(model_id)
        if told is None:
            return calls, in_flight
        for sender, each in list(told.items()):
            calls += each.calls
            in_flight += each.in_flight
            each.calls = 0
            if now_s - each.at_s > BELIEVED_LOOKS * self._limits.demand_interval_s:
                del told[sender]
        if not told:
            del self._told[model_id]
        return calls, in_flight

    # --- telling ------------------------------------------------------------------------------

    def _tell(
        self,
        group: TaskGroup,
        news: Mapping[InstanceId, dict[ModelId, tuple[int, int]]],
        now_s: float,
    ) -> None:
        """One message to each decider that does not listen to an earlier one still."""
        for decider, demands in news.items():
            address = self._members.address_or_none(decider)
            is_resting = self._resting.get(decider, 0.0) > now_s
            if address is None or is_resting or decider in self._under_way:
                continue
            models_max = self._limits.demand_models_told_max
            if len(demands) > models_max:
                most = sorted(demands.items(), key=lambda each: each[1], reverse=True)
                demands = dict(most[:models_max])
            self._under_way.add(decider)
            group.start_soon(self._send, decider, address, demands)

    async def _send(
        self, decider: InstanceId, address: str, demands: Mapping[ModelId, tuple[int, int]]
    ) -> None:
        try:
            await self._peers.tell_demand(
                address, self._me, demands, timeout_s=self._limits.demand_timeout_s
            )
            self._copies.counters.demands_told += 1
        except PeerCallError as exc:
            logger.debug("instance %s is not told of demand: %s", decider, exc.message)
            now_s = anyio.current_time()
            self._resting = {who: s for who, s in self._resting.items() if s > now_s}
            self._resting[decider] = now_s + self._limits.demand_rest_s
        finally:
            self._under_way.discard(decider)

    # --- what is shared -----------------------------------------------------------------------

    def _record_changed(self, model_id: ModelId, record: ModelRecord | None) -> None:
        if record is not None and len(record.copies) > 1 and self._me in record.copies:
            self.shared.add(model_id)
        else:
            self.shared.discard(model_id)
            self._told.pop(model_id, None)
