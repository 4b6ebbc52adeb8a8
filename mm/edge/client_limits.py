"""What clients are held to, from the configuration: of the wire, and what this machine allows."""

from __future__ import annotations

import resource

from mm.config import Config
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


def connections_max(config: Config) -> int:
    """Answer how many connections clients may have; others need files, too."""
    files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files_max == resource.RLIM_INFINITY:
        return config.connections.connections_max
    return min(config.connections.connections_max, int(files_max * config.connections_of_files))
