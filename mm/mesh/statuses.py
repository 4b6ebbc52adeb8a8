"""Where a model is, as clients are told (spec core 2.10, around 5).

The record says how far each copy is, so most questions are answered from it. *A peer is asked only
where its answer can still differ in a way that matters*: a copy that is not said to be ready may
have become so since (a load is told a moment later, and Java and older versions tell nothing), and
a client that was told LOADED a moment ago must not hear LOADING now. A copy that is said to be
ready is not asked: its instance takes it out of the record as soon as it goes, and between that
and the answer no status is ever more than a snapshot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import anyio

from mm.config import Config
from mm.core.calls import Hop, PeerRoute
from mm.core.ids import InstanceId, ModelId
from mm.core.load_times import LoadTimes
from mm.core.records import ModelRecord
from mm.core.routing import is_ready
from mm.errors import MeshError
from mm.mesh.copies import Copies
from mm.mesh.members import Members
from mm.mesh.ports import Clock, CopyStatus, ModelStatus, PeerCallError, Peers

logger = logging.getLogger(__name__)

#: Copies asked for one status. Whatever the others would say, one that is ready tells it itself.
ASKED_MAX: Final = 5
#: What a copy that is there may be.
THERE: Final = ("LOADED", "LOADING")


class Statuses:
    """Answers of the record, of the copy here, and of those elsewhere that may know better."""

    def __init__(
        self,
        *,
        config: Config,
        members: Members,
        copies: Copies,
        peers: Peers,
        clock: Clock,
        load_times: LoadTimes,
    ) -> None:
        self._config = config
        self._me = config.instance_id
        self._members = members
        self._copies = copies
        self._peers = peers
        self._clock = clock
        self._load_times = load_times

    async def find(self, model_id: ModelId, record: ModelRecord) -> ModelStatus:
        """Answer a client; may ask peers, for ``ensure_loaded_timeout_s`` at most."""
        states = self._states(model_id, record)
        if "LOADED" not in states.values():
            states.update(await self._ask(model_id, record, states))
        return self._answer(record, states)

    def known(self, model_id: ModelId, record: ModelRecord) -> ModelStatus:
        """Answer what is known here, at once: no peer is asked."""
        return self._answer(record, self._states(model_id, record))

    def here(self, model_id: ModelId, record: ModelRecord) -> ModelStatus:
        """Answer a peer: the question is for the copy of this instance."""
        copy = self._copies.get(model_id)
        states = {} if copy is None else {self._me: "LOADED" if copy.serves else "LOADING"}
        return self._answer(record, states)

    def present(
        self, status: str, model_id: ModelId, record: ModelRecord, answer: ModelStatus | None = None
    ) -> ModelStatus:
        """Tell a status that is known; ``answer`` is of the peer whose copy it is."""
        states = self._states(model_id, record)
        for copy in answer.copies if answer is not None else ():
            if copy.status in THERE and copy.instance_id != self._me:
                states[copy.instance_id] = copy.status
        # Of a model that is there, an error that does not count any more would be told as news: the
        # controller shows the first one whatever the status is (interop 1.2).
        told = self._without_old_failures(record) if status in THERE else record
        return _status_of(status, told, states)

    # --- behind them ---

    def _answer(self, record: ModelRecord, states: Mapping[InstanceId, str]) -> ModelStatus:
        recent = self._without_old_failures(record)
        for status in THERE:
            if status in states.values():
                return _status_of(status, recent, states)
        return _status_of("LOADING_FAILED" if recent.failures else "NOT_LOADED", recent, states)

    def _states(self, model_id: ModelId, record: ModelRecord) -> dict[InstanceId, str]:
        """Answer what is known of each copy. UNKNOWN is that of an instance which is not there: the
        record keeps it for a while, in case it comes back.
        """
        now_ms = self._clock.now_ms()
        assumed_ms = self._load_times.assumed_ms(record.info.model_type)
        states = {}
        for instance_id in record.copies:
            states[instance_id] = "UNKNOWN"
            if instance_id != self._me and instance_id in self._members:
                ready = is_ready(record, instance_id, now_ms, assumed_ms)
                states[instance_id] = "LOADED" if ready else "LOADING"
        copy = self._copies.get(model_id)
        # A failure is written before its copy goes, whose end changes no record: who is told of
        # changes hears of it now or never.
        if copy is not None and record.failures.get(self._me, -1) < copy.enqueued_ms:
            states[self._me] = "LOADED" if copy.serves else "LOADING"
        return states

    async def _ask(
        self, model_id: ModelId, record: ModelRecord, states: Mapping[InstanceId, str]
    ) -> dict[InstanceId, str]:
        """Ask the copies that were on their way, the oldest first, until one is loaded; answers
        what was heard.
        """
        heard: dict[InstanceId, str] = {}
        coming = [i for i in record.copies if states[i] == "LOADING"]
        coming.sort(key=lambda i: record.copies[i])
        routes = [
            PeerRoute(model_id, instance_id, address, Hop.HIT_ONLY, hops_left=0)
            for instance_id in coming
            if (address := self._members.address_or_none(instance_id)) is not None
        ]
        async with anyio.create_task_group() as group:

            async def ask(route: PeerRoute) -> None:
                status = await self._ask_one(route)
                if status is not None:
                    heard[route.instance_id] = status
                if status == "LOADED":
                    group.cancel_scope.cancel()

            for route in routes[:ASKED_MAX]:
                group.start_soon(ask, route)
        return heard

    async def _ask_one(self, route: PeerRoute) -> str | None:
        """Answer what a copy is, UNKNOWN if it is not there; None if nobody answered."""
        timeout_s = self._config.ensure_loaded_timeout_s
        try:
            status = (await self._peers.model_status(route, timeout_s=timeout_s)).status
        except (PeerCallError, MeshError) as exc:
            logger.debug(
                "status of model %s at %s: %s", route.model_id, route.instance_id, exc.message
            )
            return None
        return status if status in THERE else "UNKNOWN"

    def _without_old_failures(self, record: ModelRecord) -> ModelRecord:
        """Answer the record with the failures that still count (spec core 3.11)."""
        oldest_ms = self._clock.now_ms() - self._config.load_failure_expiry_ms
        if all(failed_ms > oldest_ms for failed_ms in record.failures.values()):
            return record
        recent = {i: t for i, t in record.failures.items() if t > oldest_ms}
        return replace(record, failures=recent)


def _status_of(status: str, record: ModelRecord, states: Mapping[InstanceId, str]) -> ModelStatus:
    """Add what is known of copies and failures, newest first (around 5)."""
    failures = sorted(record.failures.items(), key=lambda entry: -entry[1])
    errors = tuple(record.failure_text(instance_id) for instance_id, _ in failures)
    if status in ("NOT_LOADED", "NOT_FOUND"):
        return ModelStatus(status, errors)
    infos = [CopyStatus(i, states.get(i, "UNKNOWN"), t) for i, t in record.copies.items()]
    infos += [CopyStatus(i, "LOADING_FAILED", t) for i, t in failures]
    infos.sort(key=lambda info: -info.time_ms)
    return ModelStatus(status, errors, tuple(infos))
