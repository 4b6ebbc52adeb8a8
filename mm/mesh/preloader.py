"""One more copy of a model that no call waits for: asked of the instance where it costs the least.

Owns the request, to ourselves or to a peer, and how many are under way. Why a copy is wanted, and
what becomes of its load, is the affair of whoever asks. Where it goes, ``placer`` knows.
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from typing import Final

import anyio

from mm.config import Config
from mm.core.calls import REFUSALS_MAX, Call, Hop, Outcome, PeerRoute
from mm.core.ids import InstanceId, ModelId
from mm.core.records import ModelRecord
from mm.errors import MeshError
from mm.mesh.copies import Copies
from mm.mesh.loader import Loader
from mm.mesh.members import Members
from mm.mesh.placer import Placer
from mm.mesh.ports import PeerCallError, Peers
from mm.mesh.registry import Registry
from mm.mesh.retries import Retries

logger = logging.getLogger(__name__)

#: Instances asked for one copy. Each refusal makes our picture of the cluster truer; who is
#: refused this often finds no place today.
TRIES_MAX: Final = REFUSALS_MAX + 1


class PreloadReason(enum.Enum):
    """Why a copy is wanted, for the log."""

    SCALE_UP = "it is called more than its copies bear"
    SECOND_COPY = "it is in recurring use"
    DRAIN = "its instance stops"
    LOST = "its copies are gone"
    ROOM = "there is room for it"
    TRANSITION = "it takes over from a model with more copies"
    POLICY = "its policy asks for it"

    @property
    def is_for_want(self) -> bool:
        """Whether it is for want of any copy, so that one which is begun elsewhere will do."""
        return self in (PreloadReason.LOST, PreloadReason.ROOM)


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of asking for a copy: where its load was accepted, None if nowhere.

    ``is_open``: some instance could not be asked, or did not answer; it might have taken it.
    """

    taken: InstanceId | None
    is_open: bool = False


class Preloader:
    """Has models loaded of which nobody waits, so that nobody will have to."""

    def __init__(
        self,
        *,
        config: Config,
        registry: Registry,
        members: Members,
        copies: Copies,
        loader: Loader,
        placer: Placer,
        peers: Peers,
    ) -> None:
        self._me = config.instance_id
        self._timeout_s = config.ensure_loaded_timeout_s
        self._registry = registry
        self._members = members
        self._copies = copies
        self._loader = loader
        self._placer = placer
        self._peers = peers
        self._counters = copies.counters
        self._retries = Retries(self._me, members, copies.counters)
        self._slots = anyio.Semaphore(config.preloads_asked_at_once_max)

    async def request(
        self,
        model_id: ModelId,
        *,
        last_used_ms: int,
        exclude: frozenset[InstanceId],
        reason: PreloadReason,
    ) -> InstanceId | None:
        """Have one more copy loaded at the best instance that has none and is not in ``exclude``.

        Answers where its load was accepted, or None: there is no such instance, or nothing there
        that was used longer ago than ``last_used_ms`` and could make room. Waits for the answer of
        the instance, never for the load.
        """
        asked = await self.ask(model_id, last_used_ms=last_used_ms, exclude=exclude, reason=reason)
        return asked.taken

    async def ask(
        self,
        model_id: ModelId,
        *,
        last_used_ms: int,
        exclude: frozenset[InstanceId],
        reason: PreloadReason,
    ) -> Asked:
        """Answer as ``request``, and whether a None is all that there is to hear."""
        async with self._slots:
            record = self._registry.get(model_id)
            asked = Asked(None)
            if record is not None:
                twins = frozenset(record.copies)
                if not reason.is_for_want:
                    twins |= exclude
                asked = await self._ask_best(model_id, record, last_used_ms, exclude, twins)
        taken = asked.taken
        if taken is None:
            self._counters.preloads_refused += 1
        else:
            self._counters.preloads += 1
        logger.debug(
            "model %s: %s, so one more copy %s",
            model_id,
            reason.value,
            f"is loaded at {taken}" if taken is not None else "is wanted, but has no place",
        )
        return asked

    async def _ask_best(
        self,
        model_id: ModelId,
        record: ModelRecord,
        last_used_ms: int,
        exclude: frozenset[InstanceId],
        twins: frozenset[InstanceId],
    ) -> Asked:
        call = Call(
            model_id,
            excludes=set(exclude) | set(record.copies),
            known_size_units=record.size_units,
            last_used_ms=last_used_ms,
        )
        is_open = False
        for _ in range(TRIES_MAX):
            is_open = is_open or self._members.next_reachable_ms() is not None
            try:
                chosen = self._placer.choose_spare(call, record, self._copies.clock.now_ms())
            except MeshError as exc:
                logger.debug("model %s: no further copy: %s", model_id, exc.message)
                break
            if chosen is None:
                break
            if chosen == self._me:
                took: bool | None = await self._load_here(call, record, twins)
            else:
                took = await self._ask(call, chosen, twins)
            if took:
                return Asked(chosen)
            is_open = is_open or took is None
        return Asked(None, is_open)

    async def _load_here(
        self, call: Call, record: ModelRecord, twins: frozenset[InstanceId]
    ) -> bool:
        try:
            copy = self._loader.ensure(
                call.model_id,
                record,
                last_used_ms=call.last_used_ms,
                known_size_units=call.known_size_units,
                awaited=False,
                twins=twins,
            )
        except MeshError as exc:
            logger.debug("model %s is not loaded here: %s", call.model_id, exc.message)
            return False
        with anyio.move_on_after(self._timeout_s):
            await copy.started.wait()
        return copy.serves or not copy.settled.is_set()

    async def _ask(
        self, call: Call, chosen: InstanceId, twins: frozenset[InstanceId]
    ) -> bool | None:
        """Ask a peer; None: it said nothing. It may not pass the model on: what it would find is
        what we have already. So all that ``excludes`` tells it is beside whose copies it loads.
        """
        route = PeerRoute(
            call.model_id,
            chosen,
            self._members.address(chosen),
            Hop.LOAD_LOCAL,
            excludes=twins - {chosen},
            hops_left=0,
            known_size_units=call.known_size_units,
            may_refuse=call.refusals_count < REFUSALS_MAX,
            sender=self._me,
        )
        outcome, message = Outcome.ABANDONED, ""
        answered = True
        try:
            status = await self._peers.ensure_loaded(
                route, sync=False, last_used_ms=call.last_used_ms, timeout_s=self._timeout_s
            )
        except PeerCallError as exc:
            outcome, message, answered = exc.outcome, exc.message, exc.answered
            if exc.hop_state is not None:
                self._placer.refused(call, route, exc.hop_state)
        except MeshError as exc:
            outcome, message = Outcome.LOAD_FAILED, exc.message
        else:
            # A load that fails at once is told as a status.
            took = status.status in ("LOADING", "LOADED")
            outcome = Outcome.ANSWERED if took else Outcome.LOAD_FAILED
        finally:
            self._placer.load_ended(call, route, outcome)
        if outcome is Outcome.ANSWERED:
            self._members.mark_reachable(chosen)
            return True
        self._retries.failed_there(call, route, outcome, message)
        return False if answered else None
