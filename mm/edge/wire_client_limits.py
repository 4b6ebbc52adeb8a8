"""What the wire holds clients to, from the configuration; who has no wire does not import it."""

from __future__ import annotations

from mm.config import Config
from mm.edge.client_limits import connections_max
from mm.wire.client_limits import ClientLimits


def client_limits(config: Config) -> ClientLimits:
    """Answer the limits of the wire's external listener."""
    connections = config.connections
    return ClientLimits(
        connections_max=connections_max(config),
        per_address_max=connections.per_address_max,
        headers_ms=round(1000 * config.client_headers_s),
        message_ms=round(1000 * config.client_message_s),
        unread_ms=round(1000 * config.client_unread_s),
        idle_ms=1000 * connections.idle_s,
        age_ms=1000 * connections.age_s,
        age_grace_ms=1000 * connections.age_grace_s,
        resets_burst=config.client_resets_burst,
        resets_per_s=config.client_resets_per_s,
        frames_burst=config.client_frames_burst,
        frames_per_s=config.client_frames_per_s,
    )
