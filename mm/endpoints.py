"""Where the runtime beside an instance is: a port or a Unix socket (around 3.1).

Owns the variables that say so. The rest of the configuration is ``mm.config``'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mm.environment import Environment

#: The runtime's places when nothing is said of it; both are tried, the first that is READY wins.
DEFAULT_RUNTIME_SOCKET_PATH: Final = "/tmp/mmesh/grpc.sock"
DEFAULT_RUNTIME_PORT: Final = 8085


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    """A place to connect to."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """A Unix socket to connect to."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Endpoint = TcpEndpoint | UnixEndpoint

DEFAULT_RUNTIME_ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    UnixEndpoint(DEFAULT_RUNTIME_SOCKET_PATH),
    TcpEndpoint("localhost", DEFAULT_RUNTIME_PORT),
)


def _endpoint(env: Environment, port_name: str, path_name: str) -> Endpoint | None:
    env.not_both(port_name, path_name, "the runtime listens on a port or on a Unix socket")
    path = env.text(path_name)
    if path is not None:
        return UnixEndpoint(path)
    if env.is_set(port_name):
        return TcpEndpoint("localhost", env.port(port_name, default=DEFAULT_RUNTIME_PORT))
    return None


def runtime_endpoints(env: Environment) -> tuple[Endpoint, ...]:
    """Answer where the runtime may be, to be tried in this order."""
    endpoint = _endpoint(env, "INTERNAL_GRPC_PORT", "INTERNAL_GRPC_SOCKET_PATH")
    if endpoint is not None:
        return (endpoint,)
    return DEFAULT_RUNTIME_ENDPOINTS


def serving_endpoint(env: Environment) -> Endpoint | None:
    """Answer where inferences go; None: where the runtime is managed."""
    return _endpoint(env, "INTERNAL_SERVING_GRPC_PORT", "INTERNAL_SERVING_GRPC_SOCKET_PATH")
