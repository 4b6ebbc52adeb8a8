"""Counters of one instance since its start; plain integers, read by whoever shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mm.core.cluster_statistics import ClusterStatistics


@dataclass(slots=True)
class Counters:
    """Each only rises."""

    #: Attempts sent to the local runtime, and to peers.
    calls: int = 0
    forwards: int = 0
    #: Of the forwards, those that a busy copy sent back.
    redirects: int = 0
    #: Of the attempts here and at peers, those that the wire made from the table alone.
    calls_by_wire: int = 0
    #: Messages to peers that tell how busy copies here are.
    loads_pushed: int = 0
    #: Messages to peers that tell how much our copies are in demand, copies asked for because of
    #: demand, of recurring use, and copies given up.
    demands_told: int = 0
    copies_added: int = 0
    second_copies_added: int = 0
    copies_dropped: int = 0
    #: Loads that a peer asked for and this instance refused, because others could do it better; and
    #: loads of ours that a peer refused.
    loads_refused: int = 0
    loads_sent_back: int = 0
    #: Of the calls to the local runtime, those that found the copy ready, and those that waited
    #: for its load: a call is counted where it is served, whichever way it came.
    hits: int = 0
    misses: int = 0
    #: Calls refused because too many had come for one copy (``limitModelConcurrency``).
    calls_overloaded: int = 0
    #: Calls refused because all connections to the runtime or peer that was to have them were full.
    calls_crowded: int = 0
    #: Calls that ended in an error of the mesh.
    failures: int = 0
    loads: int = 0
    load_failures: int = 0
    #: Copies that this instance wanted somewhere although no call waited, and got, or found no
    #: place for.
    preloads: int = 0
    preloads_refused: int = 0
    #: Loads that the churn guard refused.
    loads_churned: int = 0
    #: Times that too many of the first loads failed (``mm.core.probation``).
    probations_failed: int = 0
    evictions: int = 0
    #: Of these, pinned copies: more of the runtime's memory was lost than is left to others.
    pins_evicted: int = 0
    unloads: int = 0
    unload_failures: int = 0
    #: Times that the runtime went away and what it had loaded with it.
    runtime_losses: int = 0
    #: Records written back to a store that had lost them.
    records_restored: int = 0
    #: Changes of vmodels that were written, and tries that lost to somebody else's change.
    vmodel_changes: int = 0
    vmodel_conflicts: int = 0
    #: Changes that were told to have taken too long.
    vmodel_changes_late: int = 0
    #: Reads of the store for answers about vmodels that write nothing; many share one.
    vmodel_confirmations: int = 0
    #: Transitions that ended, and that were said to have failed, while this instance led.
    transitions_completed: int = 0
    transitions_failed: int = 0
    #: Numbers of references that somebody had written wrong.
    references_repaired: int = 0
    #: Loads that setVModel did not ask for, because too many were being begun.
    vmodel_loads_refused: int = 0
    #: Sets with ``sync`` that were refused because too many waited for switches.
    vmodel_waits_refused: int = 0
    #: Watches of models and vmodels, begun and ended; those that were one too many, and those that
    #: were ended because their clients read too slowly.
    watches_begun: int = 0
    watches_ended: int = 0
    watches_refused: int = 0
    watches_behind: int = 0
    #: Watches of health, begun and ended; those that were one too many.
    health_watches_begun: int = 0
    health_watches_ended: int = 0
    health_watches_refused: int = 0
    #: Calls that would have waited for a load, had there not been too many already.
    waiting_refused: int = 0
    #: Payloads that observers have, that did not reach them, and that there was no room for.
    payloads_delivered: int = 0
    payloads_failed: int = 0
    payloads_dropped: int = 0
    #: Time that loads held one of the runtime's loading slots, summed over the slots.
    loading_s: float = 0.0


@dataclass(frozen=True, slots=True)
class InstanceStatistics:
    """A snapshot for people and programs (``mm.peer.Peer/statistics``)."""

    instance_id: str
    uptime_ms: int
    models_loaded: int
    models_loading: int
    capacity_units: int
    used_units: int
    unloading_units: int
    calls_in_flight: int
    #: Calls that wait here for a load, and the bytes of their requests.
    waiting_calls: int
    waiting_bytes: int
    #: Loads in the runtime, and loads on their way there.
    loads_running: int
    loads_queued: int
    #: By MM_EVICTION=cost against LRU, since the start: time of loads that were not needed, because
    #: LRU would have evicted what was called; and of loads of what LRU would still have had.
    eviction_saved_s: float
    eviction_lost_s: float
    store_connected: bool
    #: The store refuses writes because it is full; calls to loaded models go on.
    store_out_of_space: bool
    registered_models: int
    #: Records that the store has still to be told of: 0 in good times within a moment.
    registry_writes_owed: int
    #: Reads of ids that are not known here, and those refused because they were too many.
    look_ups: int
    look_ups_refused: int
    #: Records of models in the store that cannot be read.
    corrupt_records: int
    #: Records that are known from a store that is no more: restored within seconds.
    records_unconfirmed: int
    #: Vmodels in transition, and of those that the leader works on the ones that cannot go on.
    transitions: int
    transitions_blocked: int
    instances: int
    #: Of these, those that take calls and do not answer: calls go elsewhere.
    instances_silent: int
    #: And those of the Java mesh, which cannot be called.
    instances_foreign: int
    #: The runtime is gone, and not READY again: nothing is loaded here.
    runtime_away: bool
    #: By the types that their instances must not host.
    partitions: Mapping[frozenset[str], ClusterStatistics]
    #: The build, as the instance's record tells.
    version: int
    #: What keeps clients from being sent here; empty: nothing does.
    unready_because: str
    #: Models whose first load failed, while that keeps this instance from being ready.
    first_loads_failed: int
    #: Models of which the mesh keeps copies, and of those, at the leader, the ones with too few.
    policies: int
    policies_unmet: int
    #: What pinned copies take here, and copies here for which that would be too much.
    pinned_units: int
    pins_unmet: int
    counters: Counters
