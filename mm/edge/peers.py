"""Other instances: asking them (``mesh.ports.Peers``), and answering them (``mm.peer.Peer``).

Inferences to peers are the proxy's. docs/peer-protocol.md tells what is on the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, TypeVar

import betterproto2

import mm
from mm.core.calls import Outcome, PeerRoute
from mm.core.cluster_statistics import ClusterStatistics
from mm.core.headers import read_status
from mm.core.hop_headers import HOP_VERSION, write_hop_request
from mm.core.ids import NEVER_MS, InstanceId, ModelId
from mm.core.load_report_wire import encode_report
from mm.edge.h2 import ChannelPool, IncomingCall, UnreachableError
from mm.edge.load_stream import LoadStream, LoadStreamEnd
from mm.edge.management import SERVICE, status_of
from mm.edge.protobuf import encode
from mm.edge.unary import (
    CallError,
    ServiceTable,
    call_unary,
    send_reply,
)
from mm.errors import MeshError
from mm.mesh.hop_errors import peer_error
from mm.mesh.node import Node
from mm.mesh.ports import ModelStatus, PeerCallError, PeerIdentity, Peers
from mm.mesh.statistics import InstanceStatistics
from mm.pb import mmesh
from mm.pb.mm import peer

PEER_SERVICE: Final = "/mm.peer.Peer/"
#: A push stream without news for so long is closed when the next one is opened.
LOAD_STREAM_IDLE_S: Final = 60.0
Reply = TypeVar("Reply", bound=betterproto2.Message)


class GrpcPeers(Peers):
    """Asks other instances over a pool of channels to their peer ports."""

    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels
        #: By address.
        self._load_streams: dict[str, LoadStream] = {}

    async def identify(self, address: str, timeout_s: float) -> PeerIdentity | None:
        """Answer who is there, None if nobody who speaks our protocol answers in time."""
        try:
            identity = await call_unary(
                self._channels.get(address),
                PEER_SERVICE + "identify",
                peer.IdentifyRequest(),
                peer.Identity,
                timeout_s=timeout_s,
            )
        except MeshError:
            return None
        return PeerIdentity(InstanceId(identity.instance_id), identity.start_time_ms)

    async def ensure_loaded(
        self, route: PeerRoute, *, sync: bool, last_used_ms: int, timeout_s: float
    ) -> ModelStatus:
        """Forward an ensure-loaded; raises ``PeerCallError``, or the peer's answer if an error."""
        request = mmesh.EnsureLoadedRequest(
            model_id=route.model_id, last_used_time=last_used_ms, sync=sync
        )
        return await self._ask(route, "ensureLoaded", request, timeout_s)

    async def model_status(self, route: PeerRoute, timeout_s: float) -> ModelStatus:
        """Forward a get-status; raises ``PeerCallError``."""
        request = mmesh.GetStatusRequest(model_id=route.model_id)
        return await self._ask(route, "getModelStatus", request, timeout_s)

    async def push_loads(
        self, address: str, me: InstanceId, loads: Mapping[ModelId, int], timeout_s: float
    ) -> None:
        """Tell a peer how busy copies here are, on a stream that stays open.

        Raises ``PeerCallError``; what an older version answers is known at the next push.
        """
        now_s = asyncio.get_running_loop().time()
        stream = self._load_streams.get(address)
        if stream is None:
            self._close_idle_streams(now_s)
            stream = LoadStream(PEER_SERVICE + "pushLoads")
            try:
                async with asyncio.timeout(timeout_s):
                    await stream.open(self._channels.get(address))
            except (UnreachableError, TimeoutError) as exc:
                raise PeerCallError(Outcome.UNREACHABLE, f"{address}: {exc}") from exc
            self._load_streams[address] = stream
        try:
            stream.send(encode_report(me, loads), now_s)
        except PeerCallError:
            self._load_streams.pop(address, None)
            stream.close()
            raise

    async def tell_demand(
        self,
        address: str,
        me: InstanceId,
        demands: Mapping[ModelId, tuple[int, int]],
        timeout_s: float,
    ) -> None:
        """Tell the instance that decides about models of the calls for them here."""
        models = [
            peer.ModelDemand(model_id=model_id, calls=calls, calls_in_flight=in_flight)
            for model_id, (calls, in_flight) in demands.items()
        ]
        report = peer.DemandReport(instance_id=me, models=models)
        await self._tell(address, "tellDemand", report, peer.DemandTaken, timeout_s)

    async def withdraw_copy(self, address: str, model_id: ModelId, timeout_s: float) -> bool:
        """Ask a peer to give up its copy."""
        request = peer.WithdrawCopyRequest(model_id=model_id)
        reply = await self._tell(
            address, "withdrawCopy", request, peer.WithdrawCopyReply, timeout_s
        )
        return reply.withdrawn

    async def _tell(
        self,
        address: str,
        method: str,
        request: betterproto2.Message,
        reply: type[Reply],
        timeout_s: float,
    ) -> Reply:
        try:
            return await call_unary(
                self._channels.get(address),
                PEER_SERVICE + method,
                request,
                reply,
                timeout_s=timeout_s,
            )
        except MeshError as exc:
            # Older versions do not know the method; there is nothing to do about it.
            raise PeerCallError(Outcome.UNREACHABLE, exc.message) from exc

    def _close_idle_streams(self, now_s: float) -> None:
        """A stream would keep the connection to an instance that we have nothing to tell."""
        for address, stream in list(self._load_streams.items()):
            if stream.failure is not None or now_s - stream.used_s > LOAD_STREAM_IDLE_S:
                del self._load_streams[address]
                stream.close()

    async def _ask(
        self, route: PeerRoute, method: str, request: betterproto2.Message, timeout_s: float
    ) -> ModelStatus:
        try:
            message = await call_unary(
                self._channels.get(route.address, may_wait=True),
                SERVICE + method,
                request,
                mmesh.ModelStatusInfo,
                timeout_s=timeout_s,
                metadata=write_hop_request(route, is_kept=True),
            )
        except UnreachableError as exc:
            raise PeerCallError(Outcome.UNREACHABLE, exc.message) from exc
        except CallError as exc:
            status = read_status(exc.trailers)
            told = MeshError(exc.message, code=exc.code, retry_after_ms=status.retry_after_ms)
            told.hop_result, told.hop_state = status.hop_result, status.hop_state
            raise peer_error(told) from exc
        return status_of(message)


class PeerService:
    """Tells other instances, and people's tools, who this is and how it is."""

    def __init__(self, node: Node, instance_id: InstanceId) -> None:
        self._node = node
        self._instance_id = instance_id

    def add_identity(self, services: ServiceTable) -> None:
        """Serve what can be answered while the instance is still starting."""
        services.add_unary(PEER_SERVICE + "identify", peer.IdentifyRequest, self.identify)

    def add_statistics(self, services: ServiceTable) -> None:
        """Serve what there is to tell once it runs."""
        services.add_unary(PEER_SERVICE + "statistics", peer.StatisticsRequest, self.statistics)
        services.add(PEER_SERVICE + "pushLoads", self.push_loads)
        services.add_unary(PEER_SERVICE + "tellDemand", peer.DemandReport, self.tell_demand)
        services.add_unary(
            PEER_SERVICE + "withdrawCopy", peer.WithdrawCopyRequest, self.withdraw_copy
        )

    async def identify(self, _request: peer.IdentifyRequest, _call: IncomingCall) -> peer.Identity:
        """Answer from the first moment, also while the instance is still starting."""
        return peer.Identity(
            instance_id=self._instance_id,
            start_time_ms=self._node.start_time_ms,
            version=mm.__version__,
            protocol_version=HOP_VERSION,
            unready_because=str(self._node.unready or ""),
        )

    async def push_loads(self, call: IncomingCall) -> None:
        """Hear how busy the copies of a peer are, for as long as it has something to tell."""
        call.holds_stop = False
        await LoadStreamEnd(call, self._node.router.loads_pushed).done
        send_reply(call, encode(peer.LoadReportsTaken()))

    async def tell_demand(self, report: peer.DemandReport, _call: IncomingCall) -> peer.DemandTaken:
        """Hear of the calls for models about which this instance decides."""
        demands = {
            ModelId(each.model_id): (each.calls, each.calls_in_flight) for each in report.models
        }
        self._node.services.scaler.hear(InstanceId(report.instance_id), demands)
        return peer.DemandTaken()

    async def withdraw_copy(
        self, request: peer.WithdrawCopyRequest, _call: IncomingCall
    ) -> peer.WithdrawCopyReply:
        """Give up a copy, if others serve the model."""
        is_withdrawn = await self._node.services.scaler.give_up(ModelId(request.model_id))
        return peer.WithdrawCopyReply(withdrawn=is_withdrawn)

    async def statistics(
        self, _request: peer.StatisticsRequest, _call: IncomingCall
    ) -> peer.InstanceStatistics:
        """Answer a snapshot."""
        now = self._node.statistics()
        answer = peer.InstanceStatistics(
            instance_id=now.instance_id,
            uptime_ms=now.uptime_ms,
            models_loaded=now.models_loaded,
            models_loading=now.models_loading,
            capacity_units=now.capacity_units,
            used_units=now.used_units,
            unloading_units=now.unloading_units,
            loads=(counters := now.counters).loads,
            load_failures=counters.load_failures,
            evictions=counters.evictions,
            unloads=counters.unloads,
            calls=counters.calls,
            hits=counters.hits,
            misses=counters.misses,
            forwards=counters.forwards,
            calls_by_wire=counters.calls_by_wire,
            failures=counters.failures,
            calls_in_flight=now.calls_in_flight,
            waiting_calls=now.waiting_calls,
            waiting_bytes=now.waiting_bytes,
            waiting_refused=counters.waiting_refused,
            loads_refused=counters.loads_refused,
            loads_sent_back=counters.loads_sent_back,
            loads_running=now.loads_running,
            loads_queued=now.loads_queued,
            loading_ms=int(counters.loading_s * 1000),
            eviction_saved_ms=int(now.eviction_saved_s * 1000),
            eviction_lost_ms=int(now.eviction_lost_s * 1000),
            store_connected=now.store_connected,
            registered_models=now.registered_models,
            registry_writes_owed=now.registry_writes_owed,
            look_ups=now.look_ups,
            redirects=counters.redirects,
            loads_pushed=counters.loads_pushed,
            look_ups_refused=now.look_ups_refused,
            instances=now.instances,
            calls_overloaded=counters.calls_overloaded,
            calls_crowded=counters.calls_crowded,
            loads_churned=counters.loads_churned,
            unload_failures=counters.unload_failures,
            corrupt_records=now.corrupt_records,
            store_out_of_space=now.store_out_of_space,
            records_unconfirmed=now.records_unconfirmed,
            records_restored=counters.records_restored,
            preloads=counters.preloads,
            preloads_refused=counters.preloads_refused,
            version=now.version,
            unready_because=now.unready_because,
            probations_failed=counters.probations_failed,
            first_loads_failed=now.first_loads_failed,
            copies_added=counters.copies_added,
            second_copies_added=counters.second_copies_added,
            copies_dropped=counters.copies_dropped,
            demands_told=counters.demands_told,
            partitions=[_partition(*each) for each in now.partitions.items()],
        )
        _tell_vmodels(answer, now)
        _tell_policies(answer, now)
        _tell_surroundings(answer, now)
        return answer


def _tell_vmodels(answer: peer.InstanceStatistics, now: InstanceStatistics) -> None:
    answer.vmodel_changes = now.counters.vmodel_changes
    answer.vmodel_conflicts = now.counters.vmodel_conflicts
    answer.vmodel_changes_late = now.counters.vmodel_changes_late
    answer.vmodel_confirmations = now.counters.vmodel_confirmations
    answer.transitions_completed = now.counters.transitions_completed
    answer.transitions_failed = now.counters.transitions_failed
    answer.references_repaired = now.counters.references_repaired
    answer.transitions = now.transitions
    answer.transitions_blocked = now.transitions_blocked
    answer.vmodel_loads_refused = now.counters.vmodel_loads_refused
    answer.vmodel_waits_refused = now.counters.vmodel_waits_refused
    answer.watches_begun = now.counters.watches_begun
    answer.watches_ended = now.counters.watches_ended
    answer.watches_refused = now.counters.watches_refused
    answer.watches_behind = now.counters.watches_behind
    answer.health_watches_begun = now.counters.health_watches_begun
    answer.health_watches_ended = now.counters.health_watches_ended
    answer.health_watches_refused = now.counters.health_watches_refused


def _tell_policies(answer: peer.InstanceStatistics, now: InstanceStatistics) -> None:
    answer.policies = now.policies
    answer.policies_unmet = now.policies_unmet
    answer.pinned_units = now.pinned_units
    answer.pins_unmet = now.pins_unmet
    answer.pins_evicted = now.counters.pins_evicted


def _tell_surroundings(answer: peer.InstanceStatistics, now: InstanceStatistics) -> None:
    answer.instances_silent = now.instances_silent
    answer.instances_foreign = now.instances_foreign
    answer.runtime_away = now.runtime_away
    answer.runtime_losses = now.counters.runtime_losses
    answer.payloads_delivered = now.counters.payloads_delivered
    answer.payloads_failed = now.counters.payloads_failed
    answer.payloads_dropped = now.counters.payloads_dropped


def _partition(prohibited: frozenset[str], sums: ClusterStatistics) -> peer.Partition:
    return peer.Partition(
        prohibited_types=sorted(prohibited),
        instances=sums.instance_count,
        capacity_units=sums.capacity_units,
        free_units=sums.free_units,
        copies=sums.copy_count,
        lru_time_ms=0 if sums.lru_time_ms == NEVER_MS else sums.lru_time_ms,
    )
