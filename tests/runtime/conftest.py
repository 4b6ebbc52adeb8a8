"""Fixtures of the runtime tests: servers in a thread, grpcio as the client that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from anyio.from_thread import start_blocking_portal

from mm.edge.h2 import TransportLimits
from mm.runtime.process import LIMITS, Services, listening


class Client:
    """A grpcio channel that calls by method name and message type."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(
            target, options=[("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
        )

    def unary(self, path: str, request: Any, response_type: Any, **kwargs: Any) -> Any:
        """Call a unary method with a deadline of ten seconds unless told otherwise."""
        kwargs.setdefault("timeout", 60)
        method = self.channel.unary_unary(
            path, request_serializer=bytes, response_deserializer=response_type.parse
        )
        return method(request, **kwargs)

    def close(self) -> None:
        self.channel.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., list[str]]]:
    """A function that serves what it is given and answers the targets to dial."""
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal("asyncio"))

        def start(services: Services, limits: TransportLimits = LIMITS, **kwargs: Any) -> list[str]:
            manager = portal.wrap_async_context_manager(listening(services, limits, **kwargs))
            addresses = stack.enter_context(manager)
            return [f"unix:{a.path}" if a.path else str(a) for a in addresses]

        yield start


@pytest.fixture
def connect() -> Iterator[Callable[[str], Client]]:
    """A function that connects a grpcio client to a target."""
    with ExitStack() as stack:

        def start(target: str) -> Client:
            client = Client(target)
            stack.callback(client.close)
            return client

        yield start


def status_of(error: grpc.RpcError) -> tuple[str, str]:
    """Answer code and text."""
    return error.code().name, error.details()
