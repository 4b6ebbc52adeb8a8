"""Ids of any length reach runtimes on grpcio, which bears 8 KiB of headers for sure."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from mm.core.headers import PLAIN_ID_BYTES_MAX, id_headers
from mm.edge.h2.client import Channel
from mm.edge.h2.limits import RUNTIME_LIMITS
from mm.edge.unary import call_raw
from mm.limits import Limits

pytestmark = pytest.mark.anyio

CLIENTS_OWN = (b"authorization", b"t" * 1500)
#: Above what is borne for sure a call is refused by chance, one in ten with the longest id twice.
CALLS = 50


class _Echo(grpc.GenericRpcHandler):
    """Answers with the id that it was told."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        told = dict(details.invocation_metadata)["mm-model-id-bin"]
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: told)


@pytest.fixture
def runtime() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[_Echo()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.mark.parametrize("length", [PLAIN_ID_BYTES_MAX, Limits().id_bytes_max])
async def test_the_longest_ids_are_told(runtime: str, length: int) -> None:
    channel = Channel(runtime, RUNTIME_LIMITS)
    metadata = [*id_headers("x" * length), CLIENTS_OWN]
    for _ in range(CALLS):
        answer = await call_raw(channel, "/a.B/c", b"", timeout_s=60.0, metadata=metadata)
        assert answer == b"x" * length
    await channel.close()
