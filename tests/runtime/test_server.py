"""What a runtime serves: many calls, hostile and broken ones, limits, stopping.

grpcio drives what a well-behaved client can do; a bare HTTP/2 connection the rest.
"""

from __future__ import annotations

import gzip
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import anyio
import grpc
import h2.config
import h2.events
import pytest
from anyio.from_thread import start_blocking_portal

from mm.edge.h2 import Handler, IncomingCall
from mm.edge.unary import MessageStream, read_request, send_reply
from mm.errors import InvalidRequestError, StatusCode
from mm.runtime.address import Address
from mm.runtime.call import CallError, Methods
from mm.runtime.process import LIMITS, listening
from tests.edge.raw_h2 import LastingConnection

SMALL_MESSAGES = replace(LIMITS, message_bytes_max=100_000)
GRPC_HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "x"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


class Scenario:
    """Methods to call, and what happened to their calls."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.cancelled = threading.Event()
        self.waiting = threading.Semaphore(0)

    def methods(self) -> Methods:
        return table(
            {
                "/t/echo": self.echo,
                "/t/wait": self.wait,
                "/t/bug": self.bug,
                "/t/mesh_error": self.mesh_error,
                "/t/call_error": self.call_error,
                "/t/flood": self.flood,
            }
        )

    async def echo(self, call: IncomingCall) -> None:
        send_reply(call, await read_request(call))

    async def wait(self, call: IncomingCall) -> None:
        """Answer once ``release`` is set."""
        await read_request(call)
        self.waiting.release()
        try:
            await anyio.to_thread.run_sync(
                self.release.wait, limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True
            )
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise
        send_reply(call, b"done")

    async def bug(self, call: IncomingCall) -> None:
        raise KeyError("a bug")

    async def mesh_error(self, call: IncomingCall) -> None:
        raise InvalidRequestError("no such thing")

    async def call_error(self, call: IncomingCall) -> None:
        raise CallError(StatusCode.ABORTED, "no luck", details=b"\x00why")

    async def flood(self, call: IncomingCall) -> None:
        """Answer without reading, with more than the client has room for, until it goes."""
        stream = MessageStream(call)
        try:
            while True:
                await stream.send(bytes(60_000))
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise


def table(handlers: dict[str, Handler]) -> Methods:
    methods = Methods()
    for path, handler in handlers.items():
        methods.add(path, handler)
    return methods


@pytest.fixture
def scenario() -> Iterator[Scenario]:
    scenario = Scenario()
    yield scenario
    scenario.release.set()


@pytest.fixture
def target(serve: Any, scenario: Scenario) -> str:
    [target] = serve([(Address(), scenario.methods())], SMALL_MESSAGES)
    return str(target)


def raw_call(client: Any, path: str, message: bytes = b"", **kwargs: Any) -> Any:
    return client.channel.unary_unary(path)(message, **{"timeout": 60, **kwargs})


def fails_with(code: str, text: str) -> Any:
    """Expect an RpcError with this code and this in its text."""
    return pytest.raises(
        grpc.RpcError, check=lambda e: e.code().name == code and text in e.details()
    )


class Http2:
    """A client connection without gRPC: sends what it is told to."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        self.h2 = LastingConnection(
            h2.config.H2Configuration(
                header_encoding=None, validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )  # fmt: skip
        self.h2.initiate_connection()
        self.flush()
        self.events: list[Any] = []

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def call(
        self, path: str, *frames: bytes, headers: Any = (), end: bool = True, stream_id: int = 1
    ) -> dict[bytes, bytes]:
        """Send a request of these DATA frames; answer all headers of the response."""
        self.h2.send_headers(stream_id, [(":path", path), *GRPC_HEADERS, *headers])
        for number, frame in enumerate(frames):
            self.h2.send_data(stream_id, frame, end_stream=end and number == len(frames) - 1)
            self.flush()
            if number < len(frames) - 1:
                self.ping()  # the server shall see one frame at a time
        if not frames:
            if end:
                self.h2.end_stream(stream_id)
            self.flush()
        return self.answer(stream_id)

    def answer(self, stream_id: int = 1) -> dict[bytes, bytes]:
        """Read until the response has ended."""
        answer: dict[bytes, bytes] = {}
        while True:
            for event in self.read():
                if getattr(event, "stream_id", None) != stream_id:
                    continue
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    answer |= dict(event.headers)
                if isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    return answer

    def ping(self) -> None:
        """Return once the server has handled everything before."""
        self.h2.ping(b"12345678")
        self.flush()
        while not any(isinstance(e, h2.events.PingAckReceived) for e in self.read()):
            pass

    def read(self) -> list[Any]:
        data = self.socket.recv(65536)
        assert data, "the server closed the connection"
        events = self.h2.receive_data(data)
        self.flush()
        self.events += events
        return events


@pytest.fixture
def http2(target: str) -> Iterator[Http2]:
    client = Http2(target)
    yield client
    client.socket.close()


def framed(message: bytes, flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(message)) + message


# --- many calls -----------------------------------------------------------------------------------


def test_five_hundred_calls_at_a_time_on_one_connection(serve: Any, connect: Any) -> None:
    """Nobody is answered before all are there, so fewer at a time would wait for ever."""
    arrived = 0
    everybody = anyio.Event()

    async def meet(call: IncomingCall) -> None:
        nonlocal arrived
        await read_request(call)
        arrived += 1
        if arrived == 500:
            everybody.set()
        await everybody.wait()
        send_reply(call, b"done")

    [target] = serve([(Address(), table({"/t/meet": meet}))])
    method = connect(target).channel.unary_unary("/t/meet")
    calls = [method.future(b"x", timeout=60) for _ in range(500)]
    assert {call.result() for call in calls} == {b"done"}


def test_a_message_larger_than_every_window(serve: Any, connect: Any, scenario: Scenario) -> None:
    limits = replace(LIMITS, message_bytes_max=8 * 2**20, stream_window_bytes=2**16)
    [target] = serve([(Address(), scenario.methods())], limits)
    message = bytes(range(256)) * 20_000
    assert raw_call(connect(target), "/t/echo", message) == message


# --- errors ---------------------------------------------------------------------------------------


def test_statuses(target: str, connect: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = connect(target)
    with fails_with("UNIMPLEMENTED", "unknown method /t/none"):
        raw_call(client, "/t/none")
    with fails_with("INVALID_ARGUMENT", "no such thing"):
        raw_call(client, "/t/mesh_error")
    with pytest.raises(grpc.RpcError) as caught:
        raw_call(client, "/t/call_error")
    assert (caught.value.code().name, caught.value.details()) == ("ABORTED", "no luck")
    assert dict(caught.value.trailing_metadata())["grpc-status-details-bin"] == b"\x00why"
    with fails_with("INTERNAL", "internal error"):
        raw_call(client, "/t/bug")
    assert "call of /t/bug failed" in caplog.text
    assert "KeyError: 'a bug'" in caplog.text
    assert "Traceback" in caplog.text
    assert raw_call(client, "/t/echo", b"x") == b"x"


def test_a_message_above_the_limit_names_it(target: str, connect: Any) -> None:
    client = connect(target)
    assert len(raw_call(client, "/t/echo", bytes(100_000))) == 100_000
    with fails_with("RESOURCE_EXHAUSTED", "message of 100001 bytes exceeds the limit of 100000"):
        raw_call(client, "/t/echo", bytes(100_001))


def test_compressed_messages_are_read(target: str, connect: Any) -> None:
    client = connect(target)
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        answer = raw_call(client, "/t/echo", b"x" * 50_000, compression=compression)
        assert answer == b"x" * 50_000
    with fails_with("RESOURCE_EXHAUSTED", "decompressed message of 100001 bytes exceeds the limit"):
        raw_call(client, "/t/echo", bytes(5_000_000), compression=grpc.Compression.Gzip)


@pytest.mark.parametrize(
    ("frame", "encoding", "status", "text"),
    [
        (framed(b"x", flag=1), b"snappy", b"12", b"snappy cannot be read here; use gzip or"),
        (framed(b"junk", flag=1), b"gzip", b"3", b"compressed message cannot be read"),
        (framed(gzip.compress(b"abc", mtime=0)[:-9], flag=1), b"gzip", b"3", b"it is cut off"),
        (framed(zlib.compress(b"abc"), flag=2), b"gzip", b"13", b"neither 0 nor 1"),
        (framed(b"abc")[:-1], b"identity", b"3", b"ends inside a message"),
        (framed(b"abc")[:3], b"identity", b"3", b"ends inside a message"),
        (b"", b"identity", b"3", b"no message"),
        (framed(b"a") + framed(b"b"), b"identity", b"12", b"takes one message"),
    ],
)
def test_broken_messages_are_answered(
    http2: Http2, frame: bytes, encoding: bytes, status: bytes, text: bytes
) -> None:
    answer = http2.call("/t/echo", frame, headers=[("grpc-encoding", encoding)])
    assert answer[b"grpc-status"] == status
    assert text in answer[b"grpc-message"]
    assert answer[b"grpc-accept-encoding"] == b"identity,gzip,deflate"


def test_empty_frames_and_split_prefixes_are_no_end(http2: Http2) -> None:
    message = framed(b"abc")
    answer = http2.call("/t/echo", message[:2], b"", message[2:6], b"", message[6:])
    assert answer[b"grpc-status"] == b"0"


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ([("content-type", "text/html")], b"'text/html'"),
        ([("content-type", "application/grpc+json")], b"application/grpc+json"),
        ([("grpc-timeout", "soon")], b"grpc-timeout 'soon' is not a timeout"),
        ([("grpc-timeout", "1000000000S")], b"is not a timeout"),
    ],
)
def test_headers_that_cannot_be(http2: Http2, headers: Any, text: bytes) -> None:
    names = {name for name, _ in headers}
    http2.h2.send_headers(
        1, [(":path", "/t/echo"), *(h for h in GRPC_HEADERS if h[0] not in names), *headers]
    )
    http2.h2.send_data(1, framed(b"x"), end_stream=True)
    http2.flush()
    answer = http2.answer()
    assert answer[b"grpc-status"] == b"3"
    assert text in answer[b"grpc-message"]


def test_strange_metadata_harms_nobody(http2: Http2) -> None:
    strange = [(b"a", b"\xff\xfe"), (b"b", b""), (b"c", b"1"), (b"c", b"2"), (b"d-bin", b"!!")]
    assert http2.call("/t/echo", framed(b"x"), headers=strange)[b"grpc-status"] == b"0"
    assert http2.call("/t/echo", framed(b"x"), stream_id=3)[b"grpc-status"] == b"0"


def test_an_answer_before_the_end_of_the_request_stops_the_client(http2: Http2) -> None:
    answer = http2.call("/t/mesh_error", framed(b"x"), end=False)
    assert answer[b"grpc-status"] == b"3"
    while not any(isinstance(event, h2.events.StreamReset) for event in http2.events):
        http2.read()


# --- deadlines, cancellation, flow control --------------------------------------------------------


def test_the_deadline_ends_the_handler(http2: Http2, scenario: Scenario) -> None:
    answer = http2.call("/t/wait", framed(b""), headers=[("grpc-timeout", "500m")])
    assert answer[b"grpc-status"] == b"4"
    assert answer[b"grpc-message"] == b"deadline exceeded"
    assert scenario.cancelled.wait(60)


def test_cancel_ends_the_handler(target: str, connect: Any, scenario: Scenario) -> None:
    call = connect(target).channel.unary_unary("/t/wait").future(b"", timeout=60)
    assert scenario.waiting.acquire(timeout=60)
    call.cancel()
    assert scenario.cancelled.wait(60)


def test_a_lost_connection_ends_the_handler(http2: Http2, scenario: Scenario) -> None:
    http2.h2.send_headers(1, [(":path", "/t/wait"), *GRPC_HEADERS])
    http2.h2.send_data(1, framed(b""), end_stream=True)
    http2.flush()
    assert scenario.waiting.acquire(timeout=60)
    http2.socket.close()
    assert scenario.cancelled.wait(60)


def test_a_client_that_does_not_read_holds_up_only_itself(
    http2: Http2, target: str, connect: Any, scenario: Scenario
) -> None:
    http2.h2.send_headers(1, [(":path", "/t/flood"), *GRPC_HEADERS], end_stream=True)
    http2.flush()
    received = 0
    while received < 65_535:  # the window that this client grants
        received += sum(len(e.data) for e in http2.read() if isinstance(e, h2.events.DataReceived))
    assert received == 65_535
    assert raw_call(connect(target), "/t/echo", b"x") == b"x"
    http2.h2.reset_stream(1)
    http2.flush()
    assert scenario.cancelled.wait(60)


def test_a_handler_that_does_not_read_stops_the_client(serve: Any) -> None:
    """One stream may send its window and no more, the others go on."""

    async def deaf(call: IncomingCall) -> None:
        await anyio.sleep_forever()

    limits = replace(LIMITS, stream_window_bytes=70_000)
    [target] = serve([(Address(), table({"/t/deaf": deaf}))], limits, stop_grace_s=0.0)
    client = Http2(target)
    client.h2.send_headers(1, [(":path", "/t/deaf"), *GRPC_HEADERS])
    client.flush()
    while client.h2.remote_settings.initial_window_size != 70_000:
        client.read()
    while (room := client.h2.local_flow_control_window(1)) > 0:
        client.h2.send_data(1, bytes(min(room, 16_384)))
        client.flush()
    client.ping()
    assert client.h2.local_flow_control_window(1) == 0
    client.socket.close()


# --- starting and stopping ----------------------------------------------------------------------


def test_stop_lets_calls_in_flight_end_and_clients_stay_connected(
    connect: Any, scenario: Scenario
) -> None:
    with start_blocking_portal("asyncio") as portal, ExitStack() as stack:
        services = [(Address(), scenario.methods())]
        manager = portal.wrap_async_context_manager(listening(services))
        [address] = stack.enter_context(manager)
        client, idle = connect(str(address)), Http2(str(address))
        call = client.channel.unary_unary("/t/wait").future(b"", timeout=60)
        assert scenario.waiting.acquire(timeout=60)
        stopping = threading.Thread(target=stack.close)
        stopping.start()
        # Refused as soon as the server stops: further calls on connections that exist.
        method = client.channel.unary_unary("/t/echo")
        while (code := method.future(b"", timeout=60).code()) is grpc.StatusCode.OK:
            pass
        assert code is grpc.StatusCode.UNAVAILABLE
        scenario.release.set()
        assert call.result() == b"done"
        stopping.join(timeout=60)
        assert not stopping.is_alive()
        while not any(isinstance(e, h2.events.ConnectionTerminated) for e in idle.events):
            idle.read()
        idle.socket.close()


def test_stop_does_not_wait_longer_than_the_grace(connect: Any, scenario: Scenario) -> None:
    with start_blocking_portal("asyncio") as portal:
        manager = portal.wrap_async_context_manager(
            listening([(Address(), scenario.methods())], stop_grace_s=0.05)
        )
        with manager as [address]:
            call = connect(str(address)).channel.unary_unary("/t/wait").future(b"", timeout=60)
            assert scenario.waiting.acquire(timeout=60)
            began_s = time.monotonic()
    assert time.monotonic() - began_s < 30, "the call itself would take a minute"
    assert scenario.cancelled.is_set()
    with pytest.raises(grpc.RpcError):
        call.result()


def test_errors_have_details() -> None:
    error = CallError(StatusCode.ABORTED, "text", details=b"x")
    assert (error.code, error.message, error.details) == (10, "text", b"x")
