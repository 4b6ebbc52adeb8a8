"""The metrics that the Java mesh does not have, all of them ``mm_...`` (naming as of today).

Owns their names, which come from the names of the statistics: counters end in ``_total``, units are
seconds and bytes. Also what every process has (``process_...``), as other servers show it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final

from mm.core.ids import UNIT_BYTES
from mm.core.metric_families import Family, Kind, Sample
from mm.mesh.statistics import Counters, InstanceStatistics

PREFIX: Final = "mm_"

#: What the statistics of an instance say. Text first because a series without is a riddle.
GAUGES: Final = {
    "uptime_ms": "Time since the start",
    "models_loaded": "Copies that serve",
    "models_loading": "Copies on their way",
    "capacity_units": "Memory for models, that for unloads included",
    "used_units": "Memory that copies take, or will when they are loaded",
    "unloading_units": "Memory of copies that are being unloaded",
    "calls_in_flight": "Calls under way to the runtime or to peers",
    "waiting_calls": "Calls that wait for a load",
    "waiting_bytes": "Request bytes of calls that wait for a load",
    "loads_running": "Loads in the runtime",
    "loads_queued": "Loads on their way to the runtime",
    "store_connected": "1 if the store can be reached",
    "store_out_of_space": "1 if the store takes no writes because it is full",
    "registered_models": "Models registered in the cluster",
    "registry_writes_owed": "Records of models that the store has still to be told of",
    "corrupt_records": "Records in the store that cannot be read",
    "records_unconfirmed": "Records known from a store that is no more",
    "transitions": "Vmodels in transition",
    "transitions_blocked": "Vmodels in transition that cannot go on; at the leader",
    "instances": "Instances of the cluster",
    "instances_silent": "Instances that take calls and do not answer",
    "instances_foreign": "Instances of the Java mesh, which are not called",
    "runtime_away": "1 if the runtime is gone, and not READY again",
    "version": "The build as the instance's record has it",
    "first_loads_failed": "Models whose first load failed, while that keeps the instance unready",
    "policies": "Models of which the mesh keeps copies",
    "policies_unmet": "Of these, those with too few copies; at the leader",
    "pinned_units": "Memory of pinned copies",
    "pins_unmet": "Copies that should be pinned, and would be too much",
}
#: The same, but they only rise.
STATISTICS_COUNTERS: Final = {
    "eviction_saved_s": "Load time that eviction by cost saved against LRU",
    "eviction_lost_s": "Load time that eviction by cost lost against LRU",
    "look_ups": "Reads of ids that are not known here",
    "look_ups_refused": "Such reads that were refused because they were too many",
}
COUNTERS: Final = {
    "calls": "Attempts sent to the runtime here",
    "forwards": "Attempts sent to peers",
    "calls_by_wire": "Of both, those that the wire made from the table alone",
    "redirects": "Attempts that a busy copy at a peer sent back",
    "loads_pushed": "Messages to peers that tell how busy copies here are",
    "demands_told": "Messages to peers that tell how much copies are in demand",
    "copies_added": "Copies asked for because of demand",
    "second_copies_added": "Copies asked for because of recurring use",
    "copies_dropped": "Copies given up because there were more than needed",
    "loads_refused": "Loads that a peer asked for and others could do better",
    "loads_sent_back": "Loads of ours that a peer refused",
    "hits": "Calls of the runtime here that found the copy ready",
    "misses": "Calls of the runtime here that waited for a load",
    "calls_overloaded": "Calls refused because one copy had too many",
    "calls_crowded": "Calls refused because all connections to where they were to go were full",
    "failures": "Calls that ended in an error of the mesh",
    "loads": "Loads that succeeded",
    "load_failures": "Loads that failed",
    "preloads": "Copies that nobody waited for, and that found a place",
    "preloads_refused": "Copies that nobody waited for, and that found none",
    "loads_churned": "Loads that the churn guard refused",
    "probations_failed": "Times that too many of the first loads failed",
    "evictions": "Copies evicted",
    "pins_evicted": "Pinned copies evicted",
    "unloads": "Unloads that succeeded",
    "unload_failures": "Unloads given up",
    "runtime_losses": "Times that the runtime went away, and its copies with it",
    "records_restored": "Records written back to a store that had lost them",
    "vmodel_changes": "Changes of vmodels written",
    "vmodel_conflicts": "Changes of vmodels that lost to somebody else's",
    "vmodel_changes_late": "Changes of vmodels that were given up for taking too long",
    "vmodel_confirmations": "Reads of the store for answers about vmodels",
    "transitions_completed": "Transitions of vmodels that ended",
    "transitions_failed": "Transitions of vmodels that were said to have failed",
    "references_repaired": "Numbers of references that were wrong",
    "vmodel_loads_refused": "Loads that setVModel did not ask for, too many being begun",
    "vmodel_waits_refused": "Sets of vmodels refused because too many waited for switches",
    "watches_begun": "Watches of models and vmodels begun",
    "watches_ended": "Watches of models and vmodels ended",
    "watches_refused": "Watches that were one too many",
    "watches_behind": "Watches ended because their clients read too slowly",
    "health_watches_begun": "Watches of health begun",
    "health_watches_ended": "Watches of health ended",
    "health_watches_refused": "Watches of health that were one too many",
    "waiting_refused": "Calls refused because too many waited for loads",
    "payloads_delivered": "Payloads that observers have",
    "payloads_failed": "Payloads that did not reach their observers",
    "payloads_dropped": "Payloads that there was no room for before their observers",
    "loading_s": "Time that loads held loading slots",
}
#: Of the wire, where it moves the bytes (``mm.wire.WireStatistics``).
WIRE_GAUGES: Final = {
    "connections_open": "Connections of clients and peers",
    "calls_open": "Calls under way",
    "buffer_bytes": "Memory of calls under way, with their requests",
    "unwritten_bytes": "Bytes packed for clients and peers whose sockets are full",
    "connect_waiting": "Calls that wait for a connection to be made",
    "handshakes_waiting": "Connections whose TLS handshakes wait for their turn",
    "rests_bytes": "Bytes of clients that sent more frames than a turn has time for",
    "hits_open": "Attempts under way that were made from the table alone",
}
WIRE_COUNTERS: Final = {
    "connections": "Connections accepted",
    "calls": "Calls begun",
    "calls_here": "Calls sent to the runtime here from the table alone",
    "calls_there": "Calls sent to peers from the table alone",
    "spliced_model": "Calls of models left to the Python data plane",
    "spliced_own": "Calls of the mesh's own services left to Python",
    "replayed": "Calls left to the Python data plane after an attempt",
    "left_headers": "Of those of models: what their headers say is for Python to read",
    "left_method": "Their method may not be called, or somebody watches its calls",
    "left_message": "The id is to be read from, or put into, a message that Python has to read",
    "left_no_copy": "No copy was ready",
    "left_away": "Where the copy is, nobody could be reached a moment ago",
    "left_busy": "All slots of the copy, or all connections, were taken",
    "again_fault": "Of those after an attempt: there was no answer",
    "again_answer": "The answer may have meant more than it said",
    "failures_told": "Attempts that failed and whose calls could not be sent again",
    "failures_untold": "Those that Python was not told of, for want of room",
    "slow_given_up": "Calls and connections ended because their clients took nothing for too long",
    "deadlines": "Calls whose deadline passed",
    "cancelled": "Calls that their clients cancelled",
    "connect_failures": "Connections to the runtime or to peers that could not be opened",
    "connect_waiting_refused": "Calls that found too many waiting for a connection",
    "upstreams_idle": "Connections to others closed because nobody needed them",
    "accept_pauses": "Times that there was no room for a connection",
    "crowded": "Connections refused because clients had as many as they may",
    "crowded_address": "Connections refused because one address had as many as it may",
    "crowded_peers": "Connections refused because peers had as many as they may",
    "floods_refused": "Connections cut off for what clients or peers sent",
    "buffers_full": "Calls refused because those of their connection took too much memory",
    "prefaces_late": "Connections closed because nothing, or not enough, came from clients",
    "aged": "Connections of clients that were ended for their age",
    "idle": "Connections of clients that were ended because nobody called on them",
    "messages_late": "Calls ended because their first message took too long",
    "resets_refused": "Connections dropped because they reset calls too fast",
    "reports_dropped": "Calls of peers that hear by replies alone how busy copies are",
}
#: By who is at the other end, which is the last part of a statistic's name; ``tier2`` is the Python
#: data plane of this process, which the same bytes may pass once more.
WIRE_SIDED: Final[tuple[tuple[str, Kind, str, tuple[str, ...]], ...]] = (
    ("bytes_in", "counter", "Bytes read", ("client", "peer", "runtime", "tier2")),
    ("bytes_out", "counter", "Bytes written", ("client", "peer", "runtime", "tier2")),
    ("upstreams_open", "gauge", "Connections made here", ("peer", "runtime", "tier2")),
)
#: Of TLS, where there is any (``mm.edge.tls.TlsStatistics``).
TLS_GAUGES: Final = {
    "files_refused": "1 if the files on disk cannot be used, and older ones hold",
    "certificate_expiry_s": "When the certificate ends, in Unix time",
}
TLS_COUNTERS: Final = {
    "handshakes": "Handshakes that were completed",
    "handshakes_failed": "Handshakes that failed",
    "handshakes_late": "Of these, those that took too long",
    "exchanges": "Times that new files came into use",
}
#: Of who may do what, where that is asked (``mm.edge.access.AccessStatistics``).
ACCESS_COUNTERS: Final = {
    "unauthenticated": "Calls refused because nobody is known by what they show",
    "denied": "Calls refused because their callers have not the role",
}
#: Told in labels of ``mm_instance_info``, or by type, which has no bound.
NO_SERIES: Final = frozenset({"instance_id", "unready_because", "partitions", "counters"})

#: How a unit is called here, how in a series, and what the one is divided by to get the other.
_UNITS: Final = (
    ("_units", "_bytes", 1 / UNIT_BYTES),
    ("_ms", "_seconds", 1000),
    ("_s", "_seconds", 1),
)


def own_families(
    now: InstanceStatistics,
    wire: object | None = None,
    tls: object | None = None,
    access: object | None = None,
) -> Iterator[Family]:
    """Answer all, as of now; with the statistics of the wire, TLS and access, if there are any."""
    labels = (("instance", now.instance_id), ("unready", now.unready_because))
    yield Family(
        PREFIX + "instance_info",
        "gauge",
        "Always 1; what keeps clients away is in a label",
        (Sample(1, labels),),
    )
    yield from statistics_families(PREFIX, now, GAUGES, "gauge")
    yield from statistics_families(PREFIX, now, STATISTICS_COUNTERS, "counter")
    yield from statistics_families(PREFIX, now.counters, COUNTERS, "counter")
    if wire is not None:
        yield from statistics_families(PREFIX + "wire_", wire, WIRE_GAUGES, "gauge")
        yield from statistics_families(PREFIX + "wire_", wire, WIRE_COUNTERS, "counter")
        yield from _sided_families(PREFIX + "wire_", wire)
    if tls is not None:
        yield from statistics_families(PREFIX + "tls_", tls, TLS_GAUGES, "gauge")
        yield from statistics_families(PREFIX + "tls_", tls, TLS_COUNTERS, "counter")
    if access is not None:
        yield from statistics_families(PREFIX + "access_", access, ACCESS_COUNTERS, "counter")
    yield from _process()


def statistics_families(
    prefix: str, statistics: Any, texts: dict[str, str], kind: Kind
) -> Iterator[Family]:
    """Answer the attributes of an object that ``texts`` names."""
    for attribute, text in texts.items():
        name, divisor = series_name(prefix, attribute, kind)
        value = getattr(statistics, attribute) / divisor
        yield Family(name, kind, text, (Sample(value),))


def _sided_families(prefix: str, statistics: object) -> Iterator[Family]:
    for attribute, kind, text, sides in WIRE_SIDED:
        name, divisor = series_name(prefix, attribute, kind)
        samples = (
            Sample(getattr(statistics, f"{attribute}_{side}") / divisor, (("side", side),))
            for side in sides
        )
        yield Family(name, kind, text, tuple(samples))


def series_name(prefix: str, attribute: str, kind: Kind) -> tuple[str, float]:
    """Answer the name of a statistic's series, and what its value is divided by."""
    divisor: float = 1
    for ours, theirs, each in _UNITS:
        if attribute.endswith(ours):
            attribute, divisor = attribute.removesuffix(ours) + theirs, each
            break
    return prefix + attribute + ("_total" if kind == "counter" else ""), divisor


def untold() -> set[str]:
    """Answer the statistics that have no series; a test wants none."""
    told = {*GAUGES, *STATISTICS_COUNTERS, *COUNTERS, *NO_SERIES}
    return {field.name for of in (Counters, InstanceStatistics) for field in fields(of)} - told


def _process() -> Iterator[Family]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", "rb") as statm:
        resident_pages = int(statm.read().split()[1])
    values: tuple[tuple[str, Kind, str, float], ...] = (
        ("cpu_seconds_total", "counter", "Processor time", used.ru_utime + used.ru_stime),
        ("resident_memory_bytes", "gauge", "Memory", resident_pages * resource.getpagesize()),
        ("open_fds", "gauge", "Open files and sockets", len(os.listdir("/proc/self/fd"))),
        ("max_fds", "gauge", "As many may be", resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    )
    for name, kind, text, value in values:
        yield Family("process_" + name, kind, text, (Sample(value),))
