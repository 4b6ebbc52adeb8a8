"""Which services are served at which port: all at the clients', or management at its own.

Owns what a port says of calls that belong to the other one (MM_MANAGEMENT_PORT). What the methods
do is their own modules'; calls for models go to whatever falls back, the proxy.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm.edge.h2 import IncomingCall
from mm.edge.health import Health, add_health
from mm.edge.listing import add_listing
from mm.edge.management import Management
from mm.edge.policy_management import PolicyManagement
from mm.edge.reflection import INFERENCE, LISTED, MANAGEMENT, add_reflection
from mm.edge.unary import ServiceTable
from mm.edge.vmodel_management import VModelManagement
from mm.errors import MethodRefusedError
from mm.mesh.node import Node


@dataclass(frozen=True, slots=True)
class ClientServices:
    """What clients are served. Health is told at both ports."""

    external: ServiceTable
    #: None: there is no port for it, and ``external`` has it all.
    management: ServiceTable | None
    health: Health


def client_services(node: Node, *, has_management_port: bool) -> ClientServices:
    """Answer what is served to clients, but for calls of models."""
    external = ServiceTable()
    management = ServiceTable(_no_inferences) if has_management_port else external
    _add_models(management, node, external=True)
    VModelManagement(node.vmodels).add_to(management)
    add_listing(management, node.parts)
    health = add_health(external, node.parts.counters)
    if not has_management_port:
        add_reflection(external)
        return ClientServices(external, None, health)
    for path, _ in management.paths():
        external.add(path.decode(), _no_management)
    add_reflection(external, [name for name in LISTED if name != MANAGEMENT])
    health.add_to(management)
    add_reflection(management, [name for name in LISTED if name != INFERENCE])
    return ClientServices(external, management, health)


def add_peer_services(services: ServiceTable, node: Node) -> None:
    """Serve to other instances what they ask of each other as clients do."""
    _add_models(services, node, external=False)


def _add_models(services: ServiceTable, node: Node, *, external: bool) -> None:
    Management(node.models, external=external).add_to(services)
    PolicyManagement(node.models).add_to(services)


async def _no_management(call: IncomingCall) -> None:
    raise MethodRefusedError(
        f"{call.method[1:]} is not served at this port (MM_SVC_GRPC_PORT): management has its own,"
        " that of MM_MANAGEMENT_PORT"
    )


async def _no_inferences(call: IncomingCall) -> None:
    raise MethodRefusedError(
        f"{call.method[1:]} is not served at this port (MM_MANAGEMENT_PORT): inferences have their"
        " own, that of MM_SVC_GRPC_PORT"
    )
