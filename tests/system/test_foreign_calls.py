"""grpcio as a client: all that a call can carry comes out as it would of the runtime itself.

Each test runs against the runtime, to know what it does by itself, against the instance that has
the model, and against one that has to pass the call on. The service is ``mm.testing.Echo``.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, empty_pb2

from mm.pb.mm.testing import EchoRequest, EchoResponse
from tests.system.conftest import Pair
from tests.system.meshes import MESSAGE_BYTES_MAX, refusal

pytestmark = pytest.mark.system

ID = ("mm-model-id", "echo")
TIMEOUT_S = 60.0
MIB = 2**20


class EchoClient:
    """A channel of its own to one of the three places."""

    def __init__(self, target: str, compression: grpc.Compression | None = None) -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ]
        self.channel = grpc.insecure_channel(target, options=options, compression=compression)

    def _stub(self, kind: str, method: str) -> Any:
        make = getattr(self.channel, kind)
        return make(
            f"/mm.testing.Echo/{method}",
            request_serializer=bytes,
            response_deserializer=EchoResponse.parse,
        )

    def unary(self, request: EchoRequest, *metadata: tuple[str, str | bytes]) -> EchoResponse:
        return self.unary_call(request, *metadata)[0]

    def unary_call(
        self, request: EchoRequest, *metadata: tuple[str, str | bytes], timeout_s: float = TIMEOUT_S
    ) -> tuple[EchoResponse, grpc.Call]:
        stub = self._stub("unary_unary", "unary")
        reply, call = stub.with_call(request, metadata=(ID, *metadata), timeout=timeout_s)
        return reply, call

    def server_stream(
        self, request: EchoRequest, *metadata: tuple[str, str | bytes]
    ) -> Iterator[EchoResponse]:
        stub = self._stub("unary_stream", "serverStream")
        metadata = (ID, *metadata)
        replies: Iterator[EchoResponse] = stub(request, metadata=metadata, timeout=TIMEOUT_S)
        return replies

    def client_stream(self, requests: Iterable[EchoRequest]) -> EchoResponse:
        stub = self._stub("stream_unary", "clientStream")
        reply: EchoResponse = stub(iter(requests), metadata=(ID,), timeout=TIMEOUT_S)
        return reply

    def bidi_stream(self, requests: Iterable[EchoRequest]) -> Any:
        stub = self._stub("stream_stream", "bidiStream")
        return stub(iter(requests), metadata=(ID,), timeout=TIMEOUT_S)


@pytest.fixture(scope="module", params=["runtime", "holder", "other"])
def client(request: pytest.FixtureRequest, pair: Pair) -> Iterator[EchoClient]:
    client = EchoClient(pair.targets()[request.param])
    yield client
    client.channel.close()


# --- the four kinds -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, MESSAGE_BYTES_MAX - 1024])
def test_unary(client: EchoClient, size: int) -> None:
    payload = os.urandom(size)
    reply = client.unary(EchoRequest(payload=payload, model_name="as it is"))
    assert reply.payload == payload
    assert (reply.model_id, reply.model_name) == ("echo", "as it is")


def test_unary_with_an_empty_message(client: EchoClient) -> None:
    assert client.unary(EchoRequest()).payload == b""


def test_server_stream(client: EchoClient) -> None:
    replies = list(client.server_stream(EchoRequest(payload=b"again", reply_count=300)))
    assert [reply.payload for reply in replies] == [b"again"] * 300


def test_server_stream_of_large_messages(client: EchoClient) -> None:
    sizes = [
        len(reply.payload)
        for reply in client.server_stream(EchoRequest(reply_bytes=5 * MIB, reply_count=3))
    ]
    assert sizes == [5 * MIB] * 3


@pytest.mark.parametrize(("count", "size"), [(200, 10), (4, 2 * MIB)])
def test_client_stream(client: EchoClient, count: int, size: int) -> None:
    payloads = [os.urandom(size) for _ in range(count)]
    reply = client.client_stream(EchoRequest(payload=payload) for payload in payloads)
    assert reply.request_count == count
    assert reply.payload == b"".join(payloads)


def test_bidi_stream_message_by_message(client: EchoClient) -> None:
    """Each answer is there before the next question is asked: nothing waits for the end."""
    answers: list[bytes] = []
    arrived = threading.Semaphore(0)

    def requests() -> Iterator[EchoRequest]:
        for number in range(30):
            yield EchoRequest(payload=b"%d" % number)
            assert arrived.acquire(timeout=TIMEOUT_S)

    for reply in client.bidi_stream(requests()):
        answers.append(reply.payload)
        arrived.release()
    assert answers == [b"%d" % number for number in range(30)]


def test_bidi_stream_without_messages(client: EchoClient) -> None:
    call = client.bidi_stream([])
    assert list(call) == []
    assert call.code() == grpc.StatusCode.OK


# --- metadata -----------------------------------------------------------------------------------


def application_headers(reply: EchoResponse) -> list[tuple[str, bytes]]:
    return [(h.key, h.value) for h in reply.headers if not h.key.startswith("mm-")]


def test_metadata_reaches_the_runtime(client: EchoClient) -> None:
    metadata: list[tuple[str, str | bytes]] = [
        ("x-custom", "value"),
        ("x-repeated", "first"),
        ("authorization", "Bearer abc"),
        ("x-repeated", "second"),
        ("x-empty", ""),
        ("x-spaces", "in the middle, and ,;="),
        ("x-binary-bin", bytes(range(256))),
        ("x-binary-bin", b""),
        ("x-long", "l" * 4000),
    ]
    reply = client.unary(EchoRequest(), *metadata)
    expected = [(k, v.encode() if isinstance(v, str) else v) for k, v in metadata]
    found = application_headers(reply)
    for key in dict(metadata):
        assert [item for item in found if item[0] == key] == [
            item for item in expected if item[0] == key
        ]


def test_metadata_of_the_mesh_stays_in_it(pair: Pair) -> None:
    """Ids come as one and the same pair of headers; nothing of hops gets out, or in."""
    client = EchoClient(pair.targets()["other"])
    with client.channel:
        reply, call = client.unary_call(
            EchoRequest(),
            ("mm-hop-version", "1"),
            ("mm-hop-kind", "hit-only"),
            ("mm-balanced", "true"),
            ("tas-model-id", "another"),
        )
    names = [header.key for header in reply.headers]
    assert [name for name in names if name.startswith(("mm-", "tas-"))] in (
        ["mm-model-id", "mm-model-id-bin"],
        ["mm-model-id-bin", "mm-model-id"],
    )
    told = [key for key, _ in (*call.initial_metadata(), *call.trailing_metadata())]
    assert [key for key in told if key.startswith("mm-")] == []


def test_metadata_comes_back(client: EchoClient) -> None:
    metadata: list[tuple[str, str | bytes]] = [
        ("echo-initial-one", "1"),
        ("echo-initial-many", "a"),
        ("echo-initial-many", "b"),
        ("echo-initial-bytes-bin", b"\0\xff"),
        ("echo-trailing-one", "2"),
        ("echo-trailing-many", "c"),
        ("echo-trailing-many", "d"),
        ("echo-trailing-bytes-bin", b"\xfe\1"),
    ]
    _, call = client.unary_call(EchoRequest(), *metadata)
    initial = [item for item in call.initial_metadata() if item[0].startswith("echo-")]
    trailing = [item for item in call.trailing_metadata() if item[0].startswith("echo-")]
    assert initial == [item for item in metadata if item[0].startswith("echo-initial")]
    assert trailing == [item for item in metadata if item[0].startswith("echo-trailing")]


def test_ids_beyond_ascii(pair: Pair) -> None:
    model_id = "größe/二"
    pair.other.register(model_id, "SIZE_1000000_0_0", load_now=True, sync=True)
    for instance in (pair.holder, pair.other):
        reply = instance.predict("", metadata=[("mm-model-id-bin", model_id.encode())])
        assert reply.results[0].category == f"classification for hello by model {model_id}"


# --- failures -----------------------------------------------------------------------------------

#: What grpc-status-details-bin carries by convention: a google.rpc.Status. Any message will do.
DETAILS = any_pb2.Any()
DETAILS.Pack(empty_pb2.Empty())


FAILURES: set[grpc.StatusCode] = set(grpc.StatusCode)
FAILURES -= {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}


@pytest.mark.parametrize("code", sorted(FAILURES, key=str))
def test_status_with_details(client: EchoClient, code: grpc.StatusCode) -> None:
    text = "100 % wrong:\nnöt at all"
    request = EchoRequest(
        fail_code=code.value[0], fail_message=text, fail_details=DETAILS.SerializeToString()
    )
    with pytest.raises(grpc.RpcError) as caught:
        client.unary(request, ("echo-trailing-more", "of it"))
    error = caught.value
    assert (error.code(), error.details()) == (code, text)
    trailers: dict[str, object] = {item.key: item.value for item in error.trailing_metadata()}
    assert trailers["grpc-status-details-bin"] == DETAILS.SerializeToString()
    assert trailers["echo-trailing-more"] == "of it"


@pytest.mark.parametrize("via", ["holder", "other"])
def test_not_found_of_the_model_itself(pair: Pair, via: str) -> None:
    """To the mesh it says that the runtime lost the model; loaded anew the model says the same.

    Then it is the model's own word and goes to the client (design section 5). The model may move.
    """
    model_id = f"not-found-{via}"
    pair.holder.register(model_id, "SIZE_1000000_0_0", load_now=True, sync=True)
    request = EchoRequest(fail_code=5, fail_message="no such row", fail_details=b"\x0a\x01x")
    client = EchoClient(pair.targets()[via])
    with client.channel:
        stub: Any = client.channel.unary_unary("/mm.testing.Echo/unary", request_serializer=bytes)
        future = stub.future(request, metadata=(("mm-model-id", model_id),), timeout=TIMEOUT_S)
        assert (future.code(), future.details()) == (grpc.StatusCode.NOT_FOUND, "no such row")
        trailers: dict[str, object] = {item.key: item.value for item in future.trailing_metadata()}
    assert trailers["grpc-status-details-bin"] == b"\x0a\x01x"
    assert pair.other.predict(model_id).results[0].confidence == 1.0


def test_failure_in_the_middle_of_a_stream(client: EchoClient) -> None:
    request = EchoRequest(
        payload=b"x", reply_count=9, fail_code=8, fail_message="enough", fail_after=4
    )
    replies = client.server_stream(request)
    assert [next(replies).payload for _ in range(4)] == [b"x"] * 4
    with pytest.raises(grpc.RpcError) as caught:
        next(replies)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "enough"


def test_unknown_method(client: EchoClient) -> None:
    stub: Any = client.channel.unary_unary("/mm.testing.Echo/noSuchMethod")
    code, text = refusal(partial(stub, b"", metadata=(ID,), timeout=TIMEOUT_S))
    assert (code, text) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "unknown method /mm.testing.Echo/noSuchMethod",
    )


# --- compression, deadlines, many streams -------------------------------------------------------


@pytest.mark.parametrize("via", ["runtime", "holder", "other"])
@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compression(pair: Pair, via: str, compression: grpc.Compression) -> None:
    client = EchoClient(pair.targets()[via], compression)
    with client.channel:
        payload = b"compress me " * 100_000
        assert client.unary(EchoRequest(payload=payload)).payload == payload
        reply = client.client_stream([EchoRequest(payload=payload), EchoRequest(payload=b"x")])
        assert reply.payload == payload + b"x"


def test_deadline_travels_and_shrinks(client: EchoClient) -> None:
    reply, _ = client.unary_call(EchoRequest(), timeout_s=30.0)
    # grpcio rounds up what it tells.
    assert 0 < reply.deadline_ms <= 30_500


def test_deadline_passes(client: EchoClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.unary_call(EchoRequest(reply_delay_ms=60_000), timeout_s=0.5)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("via", ["holder", "other"])
def test_many_streams_on_one_connection(pair: Pair, via: str) -> None:
    """150 streams that are all open before the first one ends (grpclib's own limit is 100)."""
    asyncio.run(hold_streams_open(pair.targets()[via], 150))


async def hold_streams_open(target: str, count: int) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub: Any = channel.stream_stream(
            "/mm.testing.Echo/bidiStream",
            request_serializer=bytes,
            response_deserializer=EchoResponse.parse,
        )
        calls = [stub(metadata=(ID,), timeout=TIMEOUT_S) for _ in range(count)]
        for turn in range(2):
            for number, call in enumerate(calls):
                await call.write(EchoRequest(payload=b"%d %d" % (turn, number)))
            for number, call in enumerate(calls):
                assert (await call.read()).payload == b"%d %d" % (turn, number)
        for call in calls:
            await call.done_writing()
        for call in calls:
            assert await call.read() is grpc.aio.EOF
            assert await call.code() == grpc.StatusCode.OK
