"""How many clients may be connected, from the configuration and what this machine allows."""

from __future__ import annotations

import resource
from dataclasses import replace

from mm.config import Config
from mm.edge.h2.limits import TransportLimits


def connections_max(config: Config) -> int:
    """Answer how many connections clients may have; others need files, too."""
    places_max = config.connections.connections_max
    files_max = _files_max()
    if files_max is None:
        return places_max
    left = int(files_max * config.connections_of_files)
    if config.management_port is not None:
        left -= management_connections_max(config)
    return max(1, min(places_max, left))


def management_connections_max(config: Config) -> int:
    """Answer how many of them those may have who manage models, at a port of their own."""
    files_max = _files_max()
    if files_max is None:
        return config.management_connections_max
    few = int(files_max * config.management_connections_of_files)
    return max(1, min(config.management_connections_max, few))


def listener_limits(config: Config, base: TransportLimits, *, management: bool) -> TransportLimits:
    """Answer the limits of a server for clients, or of that for management alone."""
    connections = config.connections
    places_max, of_address_max = connections_max(config), connections.per_address_max
    if management:
        places_max = management_connections_max(config)
        # As for clients: no address has them all.
        of_address_max = min(of_address_max, max(1, places_max * 3 // 4))
    return replace(
        base,
        connections_max=places_max,
        per_address_max=of_address_max,
        age_s=connections.age_s,
        age_grace_s=connections.age_grace_s,
    )


def _files_max() -> int | None:
    """Answer how many files the process may open; None: any number."""
    files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if files_max == resource.RLIM_INFINITY else files_max
