"""What the wire's threads count, in the order of ``_wire_counters.pxd``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WireStatistics:
    """Since the start, all threads together; those ``_open`` are of this moment."""

    connections: int
    connections_open: int
    calls: int
    calls_open: int
    #: Sent to the runtime here, and to other instances, from the table alone.
    calls_here: int
    calls_there: int
    #: Passed on to tier 2: for a model, and for the mesh's own services; after an attempt here.
    spliced_model: int
    spliced_own: int
    replayed: int
    deadlines: int
    cancelled: int
    connect_failures: int
    resets_refused: int
    #: Times that no connection was taken for a moment, for want of file descriptors.
    accept_pauses: int
    #: Connections to others that were closed because nobody needed them.
    upstreams_idle: int
    #: Calls of peers that ``take_reports`` tells nothing of: too many peers and models at once.
    reports_dropped: int
    #: Attempts made from the table alone that are under way.
    hits_open: int
    #: Of TLS, at either end; of those that failed, those that took too long; and clients whose turn
    #: to go on with theirs has not come.
    handshakes: int
    handshakes_failed: int
    handshakes_late: int
    handshakes_waiting: int
    #: Read of clients and not looked at yet, for it is more than a turn has time for.
    rests_bytes: int
    #: Why calls for models were passed on: their headers, their method (that may not be called, or
    #: that somebody watches), the message that has the id, no copy that is ready, one where nobody
    #: could be reached a moment ago, no slot or connection that is free.
    left_headers: int
    left_method: int
    left_message: int
    left_no_copy: int
    left_away: int
    left_busy: int
    #: Why after an attempt: there was no answer, or it may mean more than it says.
    again_fault: int
    again_answer: int
    #: Connections refused because there were too many: of clients, of one address of them, of
    #: peers.
    crowded: int
    crowded_address: int
    crowded_peers: int
    #: Attempts that failed and whose calls cannot be sent again, of which ``take_failures`` tells;
    #: and those that it had no room for.
    failures_told: int
    failures_untold: int
    #: Clients and peers that were cut off for what they sent.
    floods_refused: int
    #: Calls and connections ended because their clients took nothing: for `client_unread_s`, or for
    #: the longest while too many bytes of answers waited.
    slow_given_up: int
    #: What calls and their requests take, and calls that there was no memory for.
    buffer_bytes: int
    buffers_full: int
    #: Calls of clients refused: by nobody who is known, and by those without the role.
    unauthenticated: int
    denied: int
    #: Connections of clients that were closed: without SETTINGS in time, too old, without calls.
    prefaces_late: int
    aged: int
    idle: int
    #: Calls whose first message was not whole in time.
    messages_late: int
    #: Calls that wait for a connection to be made; those for which too many waited already.
    connect_waiting: int
    connect_waiting_refused: int
    #: What is packed for clients and peers whose sockets are full.
    unwritten_bytes: int
    #: Read and written, by who is at the other end: bytes of other instances' connections to here
    #: and of ours to them; of the runtime; and of the Python data plane, to which calls are passed.
    bytes_in_client: int
    bytes_in_peer: int
    bytes_in_runtime: int
    bytes_in_tier2: int
    bytes_out_client: int
    bytes_out_peer: int
    bytes_out_runtime: int
    bytes_out_tier2: int
    #: Connections of ours.
    upstreams_open_peer: int
    upstreams_open_runtime: int
    upstreams_open_tier2: int
