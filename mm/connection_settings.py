"""What operators say of clients' connections (around 3), as a part of ``Config``.

The limits that nobody needs to set are in ``mm.limits``. What happens beyond each is told in
docs/security.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm.environment import Environment


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """Each is one environment variable."""

    #: MM_SVC_GRPC_MAX_CONNECTIONS: of clients, at a time; those of instances have a limit of their
    #: own (`peer_connections_max`), so that clients cannot lock them out.
    connections_max: int = 20_000
    #: MM_SVC_GRPC_MAX_CONNECTIONS_PER_ADDRESS: the same of one IPv4 address or IPv6 /64.
    per_address_max: int = 15_000


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
    return ConnectionSettings(connections_max=connections_max, per_address_max=per_address_max)
