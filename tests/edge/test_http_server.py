"""Requests that kubelet sends, and those that nobody should: each costs its own connection only."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from http import HTTPStatus

import anyio
import pytest
from anyio.lowlevel import checkpoint

from mm.config import Config
from mm.core.ids import InstanceId
from mm.edge.http_server import HttpServer, Request, Response
from mm.edge.life_cycle import LifeCycle
from mm.edge.page_tls import page_context, self_signed, use
from mm.limits import Limits

pytestmark = pytest.mark.anyio

HOST = "127.0.0.1"
#: More than sockets hold.
PAGE = bytes(range(256)) * 4 * 8192
#: Ends what hangs.
LIMIT_S = 60.0
#: No time of the server's own is to end anything, unless a test is about it.
PATIENT = replace(
    Limits(), probe_request_s=LIMIT_S, probe_linger_s=LIMIT_S, metric_page_s=2 * LIMIT_S
)


@dataclass
class Served:
    """A server that knows "/fine", "/bug" and "/long", which ends with ``end``."""

    server: HttpServer
    port: int
    end: anyio.Event

    async def ask(self, request: bytes, own: str = HOST) -> bytes:
        """Send bytes, and answer all that comes until the server closes."""
        reader, writer = await asyncio.open_connection(HOST, self.port, local_addr=(own, 0))
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), LIMIT_S)
        writer.close()
        return answer

    async def status(self, request: bytes) -> int:
        """Answer the status; fails unless the answer is whole, and nothing more."""
        answer = await self.ask(request)
        line, *headers = answer.removesuffix(b"\r\n\r\n").split(b"\r\n")
        assert headers == [b"Content-Length: 0", b"Connection: close"]
        assert line.startswith(b"HTTP/1.1 ")
        return int(line.split()[1])

    async def wait_connections(self, count: int) -> None:
        """Return when there are so many."""
        await until(lambda: len(self.server.connections) == count)

    async def wait_asked(self, count: int) -> None:
        """Return when so many wait for their answers."""
        await until(lambda: sum(c.has_asked for c in self.server.connections) == count)


async def until(is_so: Callable[[], bool]) -> None:
    """Return when it is."""

    async def look() -> None:
        while True:
            if is_so():
                return
            await checkpoint()

    await asyncio.wait_for(look(), LIMIT_S)


async def send_on(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(bytes(65536))
        await writer.drain()
        await checkpoint()


@asynccontextmanager
async def served(
    limits: Limits = PATIENT, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Served]:
    end = anyio.Event()

    async def answer(request: Request) -> Response:
        path = request.path
        if path == "/long":
            await end.wait()
        if path == "/page":
            return Response(HTTPStatus.OK, PAGE, (("Content-Type", "text/plain"),))
        if path == "/echo":
            text = f"{sorted(request.query.items())} {request.header('x-one')}"
            return Response(HTTPStatus.OK, text.encode())
        if path == "/bug":
            raise KeyError(path)
        is_known = path in ("/fine", "/long")
        return Response(HTTPStatus.OK if is_known else HTTPStatus.NOT_FOUND)

    server = HttpServer(answer, limits, tls)
    port = await server.start(HOST, 0)
    try:
        yield Served(server, port, end)
    finally:
        with anyio.move_on_after(0):
            await server.stop()
        # Aborted connections are told so in the next turn.
        await checkpoint()
        assert not server.connections


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /fine HTTP/1.1", 200),
        (b"GET /fine/ HTTP/1.0", 200),
        (b"GET /fine?a=b&c HTTP/1.1", 200),
        (b"POST /fine HTTP/1.1", 200),
        (b"M-SEARCH /fine HTTP/1.1", 200),
        (b"GET / HTTP/1.1", 404),
        (b"GET /fine// HTTP/1.1", 404),
        (b"GET /FINE HTTP/1.1", 404),
        (b"GET /bug HTTP/1.1", 500),
        (b"GET fine HTTP/1.1", 400),
        (b"GET http://h/fine HTTP/1.1", 400),
        (b"GET  /fine HTTP/1.1", 400),
        (b"GET /fine HTTP/2.0", 400),
        (b"GET /fine", 400),
        (b"G(T /fine HTTP/1.1", 400),
        (b"GET /fi\xff\x00ne HTTP/1.1", 400),
        (b"PRI * HTTP/2.0", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"", 400),
    ],
)
async def test_requests(request_line: bytes, status: int) -> None:
    async with served() as each:
        assert await each.status(request_line + b"\r\nHost: h\r\n\r\n") == status


async def test_a_body_and_a_second_request_mean_nothing() -> None:
    async with served() as each:
        more = b"Content-Length: 17\r\n\r\nGET /bug HTTP/1.1\r\n\r\nGET /none HTTP/1.1\r\n\r\n"
        assert await each.status(b"POST /fine HTTP/1.1\r\n" + more) == 200


async def test_a_request_that_comes_in_pieces() -> None:
    async with served() as each:
        reader, writer = await asyncio.open_connection(HOST, each.port)
        for byte in b"GET /fine HTTP/1.1\r\n\r\n":
            writer.write(bytes((byte,)))
            await checkpoint()
        writer.write_eof()
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
async def test_a_head_that_does_not_end_is_refused(end: bytes) -> None:
    async with served() as each:
        head = b"GET /fine HTTP/1.1\r\nA: " + b"b" * PATIENT.probe_head_bytes_max
        assert await each.status(head + end) == 431


async def test_a_slow_request_has_its_time() -> None:
    """However its bytes trickle: the time is that of the whole head."""
    async with served(replace(PATIENT, probe_request_s=0.05)) as each:
        reader, writer = await asyncio.open_connection(HOST, each.port)
        answer = asyncio.ensure_future(reader.read())
        with anyio.fail_after(LIMIT_S):
            writer.write(b"GET /fine HTTP/1.1\r\n")
            while not answer.done():
                writer.write(b"A")
                await asyncio.wait({answer}, timeout=0.01)
        assert answer.result().startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_who_does_not_hang_up_is_hung_up_on() -> None:
    async with served(replace(PATIENT, probe_linger_s=0.01)) as each:
        _, writer = await asyncio.open_connection(HOST, each.port)
        writer.write(b"GET /fine HTTP/1.1\r\n\r\n")
        await each.wait_connections(1)
        await each.wait_connections(0)
        writer.close()


async def test_who_sends_without_end_is_cut_off() -> None:
    async with served() as each:
        _, writer = await asyncio.open_connection(HOST, each.port)
        writer.write(b"POST /long HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send_on(writer), LIMIT_S)
        await each.wait_connections(0)


async def test_whoever_only_connects_keeps_out_nobody() -> None:
    """The oldest that has not asked goes first; those that wait for an answer stay."""
    async with served(replace(PATIENT, probe_connections_max=5)) as each:
        waiting = asyncio.ensure_future(each.status(b"GET /long HTTP/1.1\r\n\r\n"))
        await each.wait_asked(1)
        idle = [await asyncio.open_connection(HOST, each.port) for _ in range(20)]
        assert await each.status(b"GET /fine HTTP/1.1\r\n\r\n") == 200
        assert len(each.server.connections) <= 5
        each.end.set()
        assert await asyncio.wait_for(waiting, LIMIT_S) == 200
        for _, writer in idle:
            writer.close()


LONG = b"GET /long HTTP/1.1\r\n\r\n"


async def test_when_all_wait_a_new_one_is_refused() -> None:
    """Each is of another address, and nobody has more than his share."""
    async with served(replace(PATIENT, probe_connections_max=3)) as each:
        waiting = []
        for number in range(3):
            waiting.append(asyncio.ensure_future(each.ask(LONG, f"127.0.0.{number + 1}")))
            await each.wait_asked(number + 1)
        with suppress(ConnectionError):
            assert await each.ask(b"GET /fine HTTP/1.1\r\n\r\n", "127.0.0.4") == b""
        each.end.set()
        answers = await asyncio.gather(*waiting)
        assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)


async def test_whoever_only_waits_keeps_out_nobody_else() -> None:
    """Who holds every place at /prestop gives up his own oldest ones for the hooks of others."""
    async with served(replace(PATIENT, probe_connections_max=5)) as each:
        held = []
        for number in range(5):
            held.append(asyncio.ensure_future(each.ask(LONG, "127.0.0.7")))
            await each.wait_asked(number + 1)
        hooks = [asyncio.ensure_future(each.ask(LONG, "127.0.0.1")) for _ in range(2)]
        with suppress(ConnectionError):
            assert await held[0] == b""
        with suppress(ConnectionError):
            assert await held[1] == b""
        await each.wait_asked(5)
        assert not any(other.done() for other in (*held[2:], *hooks))
        each.end.set()
        answers = await asyncio.gather(*held[2:], *hooks)
        assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)


async def test_who_leaves_is_forgotten() -> None:
    async with served(replace(PATIENT, probe_linger_s=0.01)) as each:
        _, writer = await asyncio.open_connection(HOST, each.port)
        writer.write(b"GET /long HTTP/1.1\r\n\r\n")
        await each.wait_asked(1)
        writer.transport.abort()
        await each.wait_connections(0)


# --- what the paths mean ------------------------------------------------------------------------


def config_of(**settings: object) -> Config:
    told = {
        "service_name": "s",
        "kv_store": "memory",
        "instance_id": InstanceId("one"),
        "bind_host": HOST,
        "probe_port": None,
        "prestop_port": None,
        **settings,
    }
    return Config(**told)  # type: ignore[arg-type]


async def ask(port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), LIMIT_S)
    writer.close()
    return int(answer.split()[1])


def port_of(caplog: pytest.LogCaptureFixture, paths: str) -> int:
    text = next(r.getMessage() for r in caplog.records if r.getMessage().startswith(paths))
    return int(text.rpartition(" ")[2])


async def test_a_hook_is_answered_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Not before it, and before the instance has ended; probes are answered meanwhile."""
    caplog.set_level("INFO")
    order = []

    async def wait_at_hook() -> None:
        order.append(await ask(hook_port, "/prestop"))

    async with anyio.create_task_group() as group:
        async with LifeCycle(config_of(probe_port=0, prestop_port=0), lambda: False).shown():
            hook_port, probe_port = port_of(caplog, "/prestop"), port_of(caplog, "/live")
            for _ in range(3):
                group.start_soon(wait_at_hook)
            await until(lambda: caplog.text.count("waits at /prestop") == 3)
            assert await ask(hook_port, "/live") == 404
            assert await ask(probe_port, "/prestop") == 404
            assert (await ask(probe_port, "/live"), await ask(probe_port, "/ready")) == (200, 503)
            order.append(0)
    assert order == [0, 200, 200, 200]


async def test_a_hook_waits_no_longer_than_two_stops(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = config_of(prestop_port=0, shutdown_timeout_s=-0.99)
    assert config.prestop_wait_s == pytest.approx(0.02)
    async with LifeCycle(config, lambda: True).shown():
        assert await ask(port_of(caplog, "/prestop"), "/prestop") == 200
    assert "for longer than a stop can take" in caplog.text


def trusting() -> ssl.SSLContext:
    """A client that verifies nothing, as Prometheus is told to be."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.fixture(scope="module")
def tls() -> ssl.SSLContext:
    context = page_context()
    use(context, self_signed(HOST))
    return context


@pytest.mark.parametrize("is_tls", [False, True])
async def test_a_page_comes_whole(is_tls: bool, tls: ssl.SSLContext) -> None:
    async with served(tls=tls if is_tls else None) as stand:
        reader, writer = await asyncio.open_connection(
            HOST, stand.port, ssl=trusting() if is_tls else None, limit=2**16
        )
        writer.write(b"GET /page HTTP/1.1\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Content-Length: %d\r\nContent-Type: text/plain\r\n" % len(PAGE) in head
        # Whoever reads to the end finds one, over TLS, too.
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == PAGE
        writer.close()


async def test_head_has_the_length_and_no_body() -> None:
    async with served() as stand:
        answer = await stand.ask(b"HEAD /page HTTP/1.1\r\n\r\n")
        assert answer.endswith(b"Connection: close\r\n\r\n")
        assert b"Content-Length: %d\r\n" % len(PAGE) in answer


async def test_the_query_and_headers_are_told() -> None:
    async with served() as stand:
        answer = await stand.ask(b"GET /echo/?n[]=a&n%5B%5D=b HTTP/1.1\r\nX-One:  1 \r\n\r\n")
        assert answer.endswith(b"\r\n\r\n[('n[]', ['a', 'b'])] 1")


async def test_who_does_not_speak_tls_is_cut_off(tls: ssl.SSLContext) -> None:
    async with served(tls=tls) as stand:
        reader, writer = await asyncio.open_connection(HOST, stand.port)
        writer.write(b"GET /page HTTP/1.1\r\n\r\n")
        with suppress(ConnectionError):
            assert b"HTTP" not in await asyncio.wait_for(reader.read(), LIMIT_S)
        writer.close()
