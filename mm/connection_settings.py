"""What operators say of clients' connections (around 3), as a part of ``Config``.

The limits that nobody needs to set are in ``mm.limits``. What happens beyond each is told in
docs/security.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mm.environment import Environment
from mm.limits import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """Each is one environment variable."""

    #: MM_SVC_GRPC_MAX_CONNECTIONS: of clients, at a time; those of instances have a limit of their
    #: own (`peer_connections_max`), so that clients cannot lock them out.
    connections_max: int = 20_000
    #: MM_SVC_GRPC_MAX_CONNECTIONS_PER_ADDRESS: the same of one IPv4 address or IPv6 /64.
    per_address_max: int = 15_000
    #: MM_SVC_GRPC_MAX_CONNECTION_IDLE_SECS: without a call for so long a client is sent away. 0:
    #: never, as with other gRPC servers; clients keep connections for when they need them.
    idle_s: int = 0
    #: MM_SVC_GRPC_MAX_CONNECTION_AGE_SECS, a tenth more or less: so that clients spread anew over
    #: instances. 0: never.
    age_s: int = 0
    #: MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS: for the calls that run then. 0: any time.
    age_grace_s: int = 0
    #: MM_WIRE_BUFFER_BYTES_MAX: what the calls of a thread of the wire take. A connection has half
    #: of it at most: that is all its thousand streams with a window (256 KiB) waiting each. A
    #: quarter is for requests that are kept to be sent again.
    buffer_bytes_max: int = 512 * MIB
    #: What was odd about the settings.
    warnings: tuple[str, ...] = field(default=(), repr=False)


def connection_settings(env: Environment) -> ConnectionSettings:
    """Read them."""
    connections_max = env.integer(
        "MM_SVC_GRPC_MAX_CONNECTIONS", default=20_000, minimum=1, maximum=10**6
    )
    # Load balancers show one address for all their clients, so that it is not much less: enough
    # that no single one can take every place.
    per_address_max = env.integer(
        "MM_SVC_GRPC_MAX_CONNECTIONS_PER_ADDRESS",
        default=max(1, connections_max * 3 // 4),
        minimum=1,
        maximum=10**6,
    )
    buffer_bytes_max = env.integer(
        "MM_WIRE_BUFFER_BYTES_MAX",
        default=512 * MIB,
        minimum=16 * MIB,
        maximum=2**53,
        meaning="bytes",
    )
    age_s = _seconds(env, "MM_SVC_GRPC_MAX_CONNECTION_AGE_SECS")
    age_grace_s = _seconds(env, "MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS")
    warnings = []
    if age_grace_s and not age_s:
        warnings.append(
            f"MM_SVC_GRPC_MAX_CONNECTION_AGE_GRACE_SECS ({age_grace_s}) is ignored:"
            " connections may grow as old as they like without MM_SVC_GRPC_MAX_CONNECTION_AGE_SECS"
        )
    if per_address_max > connections_max:
        warnings.append(
            f"MM_SVC_GRPC_MAX_CONNECTIONS_PER_ADDRESS ({per_address_max}) is more than"
            f" MM_SVC_GRPC_MAX_CONNECTIONS ({connections_max}): one address can take all of them"
        )
    return ConnectionSettings(
        connections_max=connections_max,
        per_address_max=per_address_max,
        idle_s=_seconds(env, "MM_SVC_GRPC_MAX_CONNECTION_IDLE_SECS"),
        age_s=age_s,
        age_grace_s=age_grace_s,
        buffer_bytes_max=buffer_bytes_max,
        warnings=tuple(warnings),
    )


def _seconds(env: Environment, name: str) -> int:
    return env.integer(name, default=0, minimum=0, maximum=4_000_000, meaning="seconds")
