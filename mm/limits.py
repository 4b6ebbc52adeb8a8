"""The limits that are the same for every deployment, each with the story of its value.

``Config`` inherits them, so a test may replace one; no environment variable sets them. What an
operator may set is in ``mm.config``. Most values are those of the Java mesh (spec core 9.3), where
years of production stand behind them; the others say what they are drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every wait has a deadline here, and everything that can grow has a bound."""

    # --- one call -----------------------------------------------------------------------------

    #: Passes of the routing loop for one call. A pass fails because the view was stale, and each
    #: failure refreshes it: eight is far beyond what a healthy cluster needs, and ends a livelock.
    retry_iterations_max: int = 8
    #: Copies tried for one call. A model with five broken copies is broken, not its instances.
    copies_tried_max: int = 5
    #: Recent load failures after which no further instance is asked to load the model: it is the
    #: model that is at fault then, and trying on would evict good models everywhere.
    load_failures_max: int = 3
    #: After a load that failed for a passing reason, an instance is spared this long, then twice as
    #: long, up to `load_failure_expiry_ms`. A download that broke or a runtime that restarts is
    #: mended within seconds; a quarter of an hour for everything, as in Java, is no answer to it.
    load_pause_first_s: float = 10.0
    #: A call waits for a load at most this many load time limits: one for the load itself, the
    #: others for loads queued before it and for room.
    load_wait_factor: int = 5
    #: Calls that wait for loads, here or passed on to a peer, all together. Twice what
    #: the design promises to bear (10,000) without hits noticing; each takes some 10 KB, so this is
    #: 200 MB at worst. More would find their deadline before their turn.
    waiting_calls_max: int = 20_000
    #: Bytes of their requests, a budget of their own, so that waiting never takes from hits: room
    #: for five hundred that fill their stream's window (256 KiB), and no limit for usual ones.
    waiting_bytes_max: int = 128 * MIB
    #: Of those whose model is there now, this many are under way at a time; the next go on when
    #: they are answered. Enough to keep a quick runtime busy, few enough for a hit to stand behind.
    released_calls_max: int = 8
    #: Those that take longer than this are left to the runtime, which may well run many at a time:
    #: at the worst four hundred are let go in a second, whatever an inference takes.
    release_pause_s: float = 0.02
    #: Request bytes kept so that a call can be sent again. Covers nearly all unary calls; past it
    #: a call gets one attempt (design section 5).
    retry_buffer_bytes_max: int = MIB
    #: How busy a copy is, is pushed to the peers that call it, this often at most: below 5 ms news
    #: cost more than they are worth to anybody (design section 4),
    load_push_interval_min_s: float = 0.005
    #: and with so many messages a second in all. Up to 40 peers hear of everything in 5 ms, 64 of
    #: them in 8 ms, which is what it takes: with 2,000 (32 ms) their p99 was 1.37 times that of
    #: the shortest queue, with 5,000 up to 1.17 (`mm sim tail`, target 1.15). A message takes 36 us
    #: of a processor at either end, so the worst is 29 % of one to send, and as much to hear if
    #: all peers send that much. Only news go out, and only to who called in the last second.
    load_pushes_per_s_max: int = 8_000
    #: Copies whose callers are kept in mind. Of others only replies tell, as it was before.
    load_push_copies_max: int = 4_096
    #: A push is a few bytes on a connection that is there; the next one corrects it.
    load_push_timeout_s: float = 1.0
    #: A peer that does not take pushes (an older version, or gone) is spared them this long.
    load_push_rest_s: float = 60.0
    #: The runtime's NOT_FOUND is believed, and the model loaded again, this often in this time, and
    #: never twice without an answer in between: one that outlives a reload is the model's own word
    #: and goes to the client (design section 5). Two, because a runtime may well restart twice.
    losses_believed_max: int = 2
    lost_again_s: float = 60.0

    #: From a connection to the end of its TLS handshake and to SETTINGS, at all listeners: a client
    #: on the other side of the world takes a second, one that says nothing holds a place among
    #: those allowed.
    tls_handshake_s: float = 10.0

    # --- a load, and the memory that it takes -------------------------------------------------

    #: Waiting for evicted models to be unloaded. Unloads take seconds; three minutes mean that the
    #: runtime lost the memory, and another instance should have its turn.
    space_wait_s: float = 180.0
    #: The size of a model that has not been loaded is a guess: not worth a longer wait.
    predict_size_timeout_s: float = 0.5
    #: Measuring a loaded model may walk the whole of it.
    model_size_timeout_s: float = 30.0
    #: Unloading releases memory that others wait for; a runtime that needs more is retried.
    unload_timeout_s: float = 30.0
    #: Tries to unload, one each `unload_retry_s`: a quarter of an hour. After that the runtime is
    #: taken at its word that the memory cannot be had back, and the capacity shrinks by it.
    unload_retries_max: int = 90
    #: Unloads asked of the runtime at a time. A large load evicts hundreds of small models: all at
    #: once they would time each other out. More than this a runtime does not do side by side.
    unloads_at_once_max: int = 64
    unload_retry_s: float = 10.0
    #: Calls in flight hold back an unload this long: 0.5 + 1 + 2 + ... + 64 s of the Java mesh.
    in_flight_wait_s: float = 127.5
    #: Loads waiting for a turn at this instance. Beyond it a caller is better served by an error
    #: that says so than by a wait that outlives its deadline.
    load_queue_length_max: int = 10_000

    # --- the runtime beside this instance -----------------------------------------------------

    #: Until READY. Large runtimes (CUDA, JVM) take a minute or two to start.
    runtime_start_timeout_s: float = 180.0
    runtime_poll_s: float = 2.0
    #: Answering a status question needs no work; a runtime that does not is asked again.
    runtime_status_timeout_s: float = 10.0

    # --- copies by load -----------------------------------------------------------------------

    #: Between two looks at the calls of all copies here. Two of them must agree, so a rise is
    #: acted on after 0.8 s at the latest; a look at 10,000 copies takes about a millisecond.
    demand_interval_s: float = 0.4
    #: Telling another holder is worth while the news are fresh; the next look tells again.
    demand_timeout_s: float = 1.0
    #: One that does not listen (an older version, or gone) is spared it this long.
    demand_rest_s: float = 10.0
    #: Models in one such message, those called most: some 50 KB.
    demand_models_told_max: int = 1_000
    #: How often copies too many, and models in recurring use, are looked for; sooner where the
    #: window of recurring use is shorter than usual. Java's interval for both is this or longer.
    surplus_interval_s: float = 10.0
    #: Asking another holder to give up its copy: one write to the store, and the way there.
    withdraw_timeout_s: float = 5.0
    #: Copies asked for because of demand, of models that this instance decides about, at a time.
    scale_ups_at_once_max: int = 16
    #: Calls in flight that a copy bears, all the time, if its runtime does not say how many it
    #: takes: what a small machine computes side by side. Beyond that calls wait for each other.
    scaleup_in_flight_max: int = 4
    #: A copy made because of demand stays this long; Java's value. A rise that comes each quarter
    #: of an hour finds it there.
    scaledown_settled_s: float = 1_800.0
    #: Between two copies of one model that go; Java's value: those that stay show what they bear.
    scaledown_gap_s: float = 80.0

    # --- what is registered -------------------------------------------------------------------

    #: An id is part of a key of the store, and stands in the headers of every call (8 KiB by
    #: default); those of Kubernetes objects end at 253 bytes.
    id_bytes_max: int = 4096
    #: What else is registered, so that a record stays far below etcd's 1.5 MiB for a request, even
    #: if every byte is escaped, and with hundreds of copies in it. Types are few and short; paths
    #: are paths; keys may hold credentials and parameters of a storage.
    type_bytes_max: int = 4096
    path_bytes_max: int = 64 * 1024
    key_bytes_max: int = 128 * 1024
    #: Models with a policy. Each is looked at whenever an instance comes or goes: a tenth of a
    #: second for all of these.
    policies_max: int = 10_000

    # --- the store ----------------------------------------------------------------------------

    #: One read or write. etcd elects a new leader in about a second; a write that has not come
    #: through in 3.5 s is told to the client, who can retry.
    store_timeout_s: float = 3.5
    #: Look-ups of ids that are not known here, begun in a second (each id is looked up once in that
    #: time): an etcd answers some ten thousand such reads a second, for all instances together.
    look_ups_per_s_max: int = 1000
    #: Of them under way at a time, and waiting for that: a second's worth, a store that is slower
    #: should not be asked for more.
    look_ups_in_flight_max: int = 64
    look_ups_waiting_max: int = 1000
    #: Changes of vmodels under way at a time, each a transaction of a few records, and in line for
    #: that: a storm of thousands is worked off in seconds; who comes later had better try again.
    vmodel_changes_at_once_max: int = 64
    vmodel_changes_waiting_max: int = 10_000
    #: The leader's own, besides: when thousands of transitions end at a time, they wait for each
    #: other and not clients for them.
    vmodel_switches_at_once_max: int = 16
    #: Loads that setVModel asked for and that did not begin yet, each a task and perhaps a question
    #: to another instance: a storm's worth of a second.
    vmodel_loads_begun_max: int = 1_000
    #: A change that is not made by then fails, with or without ``sync``: after as long as a silent
    #: connection to the store is kept. It takes two or three requests of ``store_timeout_s`` at
    #: the worst, unless many wait or others are quicker again and again.
    vmodel_change_s: float = 10.0
    #: setVModel with ``sync`` waits so long for the switch, if the call has no deadline; Java's
    #: value (spec core 6.2).
    vmodel_wait_s: float = 240.0
    #: So many of these wait at an instance: each holds its stream and some ten kilobytes.
    vmodel_switches_waited_for_max: int = 5_000
    #: And without ``sync`` it waits for a load to begin until so long after it came: one usually
    #: has by then, and an answer that says where is worth more than one that is told at once. What
    #: the store took counts, so that all in all it is 100 ms at most.
    vmodel_answer_s: float = 0.08
    #: getVModelStatus answers what is mirrored if the store has said nothing for so long: it is
    #: asked again and again, and controllers wait a second for an answer.
    vmodel_status_wait_s: float = 0.5
    #: Transitions for which loads are waited for at a time: enough for the loading slots of some
    #: thirty instances, and few beside the calls that may wait.
    transitions_at_once_max: int = 256
    #: A target that serves takes over after this, however many copies it lacks of the active
    #: model's: as long as a load that somebody waits for may take.
    transition_scale_max_s: float = 600.0
    #: At start, until the store has answered once. Then the process exits and says so.
    store_start_timeout_s: float = 20.0
    #: The same if every address refuses us: nobody listens there, or our credentials are no good,
    #: and whoever started us should hear of it soon. Long enough for an etcd that is started
    #: together with us.
    store_refused_timeout_s: float = 2.5
    #: Reading the three tables at start; 5 minutes cover a million models over a slow network.
    store_mirror_timeout_s: float = 300.0
    #: No sign of life from the store in this time: the channel is thrown away for a new one.
    #: Half the lease, so that a new channel can still save it (design section 6).
    store_silence_max_s: float = 10.0
    #: Records that a store has lost are written back by one instance, so many at a time: two
    #: transactions of etcd, one being written while the answer to the other is read.
    restore_writes_max: int = 240
    #: The others look whether that goes on so much later, one after the other: the first may be
    #: gone, and together they would be a storm. In so long all have noticed the loss.
    restore_wait_s: float = 2.0
    #: And nothing is unregistered so long after an instance has noticed that records were lost:
    #: those that notice later would take it for lost, too. Silent connections are given up after
    #: `store_silence_max_s`; a second try to connect comes a second later.
    restore_grace_s: float = 15.0
    #: How long the cluster believes in an instance that it does not hear of.
    lease_ttl_s: int = 20

    # --- an upgrade ---------------------------------------------------------------------------

    #: An instance whose first loads failed tries one again each so often: an operator who mends the
    #: runtime's trouble sees it ready within a minute, and a runtime that is broken is asked for
    #: little.
    probation_retry_s: float = 30.0
    #: A new instance is not ready while others move their models, but no longer than this:
    #: Kubernetes gives up a rollout of which nothing became ready in 600 s, and an instance that
    #: says for minutes that it is shutting down hangs.
    others_stop_wait_s: float = 300.0

    # --- this instance among the others -------------------------------------------------------

    #: Does the holder of our id answer? Long enough for a slow machine, and a start can spare it.
    identity_timeout_s: float = 5.0
    #: The instance record is looked at this often, written if it changed much (spec core 5.1),
    publish_interval_s: float = 40.0
    #: and never sooner after the last write than this.
    publish_gap_s: float = 2.0
    #: How often vanished instances are looked for when none was seen to vanish.
    reaper_interval_s: float = 420.0
    #: How often all copies here are compared with their records, should an event have been missed.
    janitor_interval_s: float = 360.0
    #: Copies of a vanished instance are kept in the registry this long: a restart of a node, or an
    #: outage of the store, must not make the cluster forget what is loaded.
    gone_after_s: float = 600.0
    #: Asking a peer to load without waiting for it, and with waiting (spec core 9.3).
    ensure_loaded_timeout_s: float = 3.0
    ensure_loaded_sync_timeout_s: float = 600.0
    #: Instances asked at a time for copies that nobody waits for. They answer in milliseconds, when
    #: the load is registered; sixteen are some thousand models a second, and leave the store room.
    preloads_asked_at_once_max: int = 16

    #: An instance that has calls of ours and answered none between two looks is asked who it is.
    #: Models that take longer to answer are usual, so it must cost little: two small calls a second
    #: for each instance at worst.
    peer_look_s: float = 0.5
    #: Without an answer in this time calls go elsewhere. Saying who one is takes a millisecond, but
    #: an instance that reads a large registry, or has no processor for a moment, is no reason.
    peer_answer_timeout_s: float = 2.0
    #: It is asked on until it answers, more and more seldom up to this.
    peer_ask_pause_max_s: float = 4.0

    # --- listeners ----------------------------------------------------------------------------

    #: Streams at once on one connection of a client. 100, grpclib's own value, stalls a busy
    #: client; the settings are told to the client, who waits or opens another connection.
    external_streams_max: int = 1_000
    #: Connections at once from instances: four from each thread of 500 others, and as many again
    #: while they are upgraded.
    peer_connections_max: int = 10_000
    #: Clients get no more than this part of the files that the process may open: instances, the
    #: runtime and the store have to be reached whatever clients do.
    connections_of_files: float = 0.75
    #: Of that, those at a port for management (MM_MANAGEMENT_PORT) get no more than this: a few
    #: controllers and people ask there, and whoever else finds it must take nothing from others.
    management_connections_max: int = 1_000
    management_connections_of_files: float = 0.05
    #: From the first byte of a list of headers, or of another frame that is of no body, to its
    #: last: they come together.
    client_headers_s: float = 10.0
    #: From a call to the end of its first message, unless it is us who do not take it: 16 MiB at
    #: half a megabit a second. Streams of many messages may rest for hours between them.
    client_message_s: float = 300.0
    #: An answer of which the client takes nothing for so long is given up: as long as proxies wait.
    client_unread_s: float = 300.0
    #: Resets of calls less than a second old on one connection of a client, at once and so many
    #: more each second; what makes us reset counts as well. A load balancer whose clients give up
    #: all of its thousand streams at a time does no more. Of an instance 500 times as many.
    client_resets_burst: int = 1_000
    client_resets_per_s: int = 200
    #: Pings, settings, priorities, window updates, empty and unknown frames, besides those that
    #: go with the calls and answers on the connection (four for each piece). Clients send a ping
    #: each 10 s, and a few of the others; so much takes a thread a millisecond a second. Of an
    #: instance 20 times as many.
    client_frames_burst: int = 10_000
    client_frames_per_s: int = 1_000
    #: Streams at once on one connection of a peer, which carries the calls of many clients.
    peer_streams_max: int = 20_000
    #: Models used in this time are moved elsewhere before an instance stops, as in Java; who comes
    #: back to others will find them loaded in the time of one load.
    drain_used_within_s: float = 3600.0
    #: Moves under way at a time: enough for the loading slots of some thirty others. The order in
    #: which they come is that of their last use.
    drain_moves_at_once_max: int = 256
    #: New connections are taken for so long after clients were told to go elsewhere: load balancers
    #: hear of it in a second or so, and what they still send here would find nobody. As in Java.
    stop_listens_s: float = 2.0
    #: Calls in flight get this long when the process stops (spec core 7.4).
    drain_timeout_s: float = 15.0
    #: Closing a connection, a channel, a file that should close at once.
    close_timeout_s: float = 5.0
    #: Concurrent sub-requests of a multi-model call are set by `multi_parallelism`; this bounds the
    #: ids that one call may name, so that one header list cannot ask for the whole registry.
    multi_model_ids_max: int = 1_000

    # --- probes and hooks over HTTP -----------------------------------------------------------

    #: Connections at once to each of the two ports: kubelet has one for a probe, and one for each
    #: container that waits at `/prestop`. Whoever else finds the ports gets the rest.
    probe_connections_max: int = 128
    #: The head of a request; kubelet's has some 150 bytes, and headers that an operator adds.
    probe_head_bytes_max: int = 8192
    #: For the head to come. Kubelet gives up a probe after 1 s (readiness) or 5 s (liveness).
    probe_request_s: float = 5.0
    #: Of what comes after the head, this much is read and thrown away.
    probe_surplus_bytes_max: int = 64 * 1024
    #: After the answer, for the client to close the connection.
    probe_linger_s: float = 1.0

    # --- metrics ------------------------------------------------------------------------------

    #: Methods that have series of their own; calls of others are counted together. A runtime has
    #: some ten, but whoever may call may make names up, and each would stay for good.
    metric_methods_max: int = 256
    #: Models that have series of their own where that is asked for (`per_model_metrics`), each some
    #: 30 KB of every scrape. Of one more, those called or loaded the longest ago are dropped.
    metric_models_max: int = 1000
    #: A page of metrics to be taken by whoever asked for it; Prometheus gives up after 10 s.
    metric_page_s: float = 10.0

    # --- observers of payloads ----------------------------------------------------------------

    #: Of all payloads that wait for observers or are on their way: 64 of the longest messages would
    #: be a GiB for each observer.
    payload_bytes_max: int = 64 * MIB
    #: For an observer to take a connection, and then each step of an answer. Whoever takes longer
    #: gets few payloads, and the rest is dropped.
    payload_timeout_s: float = 5.0
