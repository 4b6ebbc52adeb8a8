"""What one side of a connection grants to the other: every limit of the transport, in one value."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Limits and time limits of connections, one value for each kind of listener or channel.

    Memory is bounded by: streams × ``stream_window_bytes`` for bodies, capped a connection by
    ``connection_window_bytes``; ``header_list_bytes_max`` a stream for headers.
    """

    #: A message, as its 5-byte prefix announces it; checked before any of it is kept.
    message_bytes_max: int = 16 * 2**20
    #: A request's or response's header list, answered on its stream when above.
    header_list_bytes_max: int = 8192
    #: Streams that the other side may have open on one connection.
    streams_max: int = 1000
    #: Bytes of one stream that may wait here to be passed on.
    stream_window_bytes: int = 256 * 1024
    #: Bytes of all streams of a connection that may wait here.
    connection_window_bytes: int = 64 * 2**20
    #: Connections that a server accepts.
    connections_max: int = 10_000
    #: Of these, of one IPv4 address or IPv6 /64; 0: as many as there are.
    per_address_max: int = 0
    #: A client's time for the preface and SETTINGS, once TLS is done (``Limits.tls_handshake_s``).
    greeting_s: float = 10.0
    #: Connections that a channel opens to one address, each when those before it are full.
    channel_connections_max: int = 16
    #: Calls that wait for room when all of those are full, and as many while one is being made:
    #: what the design promises to bear. The runtime decides how many calls a connection takes, so
    #: many may come to that.
    room_waiters_max: int = 10_000
    #: How long each does: above any usual deadline of a client, who hears of that first, but a call
    #: without a deadline is not left for ever.
    room_wait_s: float = 60.0
    #: TCP (or Unix) connect, until the other side's SETTINGS are here.
    connect_timeout_s: float = 6.0
    #: After a failed connect, further calls fail at once for this long.
    connect_pause_s: float = 0.05
    #: How often a connection is asked for a sign of life; 0: never.
    ping_interval_s: float = 0.0
    #: Time for that sign.
    ping_timeout_s: float = 10.0
    #: A connection with calls that says nothing for so long is asked for a sign of life; 0: never.
    quiet_s: float = 0.0
    #: And is given up so long after that, with those calls.
    quiet_answer_s: float = 240.0
    #: Resets that a client may send before the rate counts, and how many a second come back. A
    #: client that resets what it just asked for makes us work for nothing (CVE-2023-44487).
    resets_burst: int = 1000
    resets_per_s: float = 200.0
    #: Bytes of requests that a server holds in all, beside the windows of its streams: to send a
    #: call again, to look into its first message, to read a message whole.
    held_bytes_max: int = 256 * 2**20
    #: A client's connection that is so old, a tenth more or less, is ended, and its calls have so
    #: long then; 0: never, and any time.
    age_s: int = 0
    age_grace_s: int = 0
    #: Bytes of answers to control frames that may pile up towards a client that does not read.
    unread_control_bytes_max: int = 4 * 2**20

    @property
    def header_block_bytes_max(self) -> int:
        """What HPACK may expand to before the connection is given up.

        Above the advertised limit, so that a header list somewhat too long can be answered on its
        own stream with the compression state intact.
        """
        return max(4 * self.header_list_bytes_max, 64 * 1024)


#: Clients on the external port (design section 5).
EXTERNAL_LIMITS = TransportLimits(streams_max=1000, ping_interval_s=300.0, ping_timeout_s=20.0)
#: Other instances of the mesh, as server and as client.
PEER_LIMITS = TransportLimits(
    streams_max=20_000,
    header_list_bytes_max=64 * 1024,
    channel_connections_max=4,
    # What is under way to an instance that is gone without a word goes on elsewhere after this and
    # the next; longer than any pause of a process that lives.
    ping_interval_s=2.5,
    ping_timeout_s=5.0,
    # A peer passes on the cancellations of all its clients: as many times a client's as on the wire
    # (PEER_RESETS in mm/wire/_wire_guards.pxi).
    resets_burst=500_000,
    resets_per_s=100_000.0,
)
#: The runtime beside this instance: no pings, which gRPC servers punish when they come often.
RUNTIME_LIMITS = TransportLimits(header_list_bytes_max=64 * 1024)
#: The same for inferences: without a deadline they would wait for ever for a runtime that is
#: stopped. One that loads may be silent for minutes, too.
SERVING_LIMITS = replace(RUNTIME_LIMITS, quiet_s=60.0)


def wire_limits(limits: TransportLimits) -> TransportLimits:
    """Answer the limits of a connection on which the wire passes on the calls of many clients.

    The wire holds each client to its own; here only what is kept, and who waits, is bounded.
    """
    return replace(
        limits,
        streams_max=2**31 - 1,
        connection_window_bytes=2**31 - 1,
        ping_interval_s=0.0,
        age_s=0,
        resets_per_s=1e9,
        resets_burst=10**9,
    )
