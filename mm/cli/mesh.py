"""Asking a mesh: which instance, how long, and how each failure is told.

What `mm model` and `mm vmodel` share. Any instance answers for the whole mesh.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import anyio
import typer

from mm.cli.client_tls import (
    ASKS_FOR_CERTIFICATE,
    CA,
    CERTIFICATE,
    KEY,
    NAME,
    SPEAKS_TLS,
    context_for,
    split_scheme,
    tls_failure,
)
from mm.cli.client_token import show_token, way_to_token
from mm.cli.errors import (
    FAILED,
    INTERRUPTED,
    MISUSED,
    NOT_FOUND,
    TIME_LIMIT,
    UNREACHABLE,
    AccessError,
    CommandError,
    ExistsError,
    exit_code_of,
)
from mm.cli.output import quoted, remark
from mm.cli.values import seconds
from mm.errors import StatusCode
from mm.pb.mmesh import ModelMeshStub

if TYPE_CHECKING:
    from grpclib.client import Channel
    from grpclib.exceptions import GRPCError

DEFAULT_ADDRESS: Final = "localhost:8033"
DEFAULT_PORT: Final = 8033
#: Named by a port that does not serve what it is asked, where management has its own.
MANAGEMENT_PORT: Final = "MM_MANAGEMENT_PORT"
#: How often what is waited for is looked at, to say how far it is.
LOOK_S: Final = 1.0
#: A watch may hear nothing for hours: so often it asks whether the instance is there, and takes it
#: for gone after so long.
KEEPALIVE_S: Final = 10.0
KEEPALIVE_TIMEOUT_S: Final = 10.0
#: Entries asked for at a time: what an instance tells at most.
PAGE_SIZE: Final = 1000

T = TypeVar("T")

ADDRESS_HELP: Final = (
    "Every command asks one instance of the mesh, no matter which. Where it is, --address says, or"
    f" the environment variable MM_ADDRESS; else it is {DEFAULT_ADDRESS}. https:// before the"
    f" address asks for TLS. Then {CA} may name a file with the authorities to trust (without it,"
    f" those of the system are trusted), {NAME} the name in the certificate if it is not the host"
    f" of the address, and {CERTIFICATE} and {KEY} the files with our own certificate and its key,"
    " if the instance asks for one."
)
Address = Annotated[
    str,
    typer.Option(envvar="MM_ADDRESS", metavar="HOST:PORT", help="An instance of the mesh."),
]
Timeout = Annotated[
    float,
    typer.Option(metavar="SECONDS", parser=seconds, help="How long to wait for the answer."),
]


def parse_address(address: str) -> tuple[str, int]:
    """Read ``host``, ``host:port``, ``[v6]:port`` or ``:port``; raises ``CommandError``."""
    text = address.strip()
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port_text = rest.removeprefix(":")
        well_formed = bool(bracket) and (not rest or rest.startswith(":"))
    elif text.count(":") > 1:
        host, port_text, well_formed = text, "", True
    else:
        host, _, port_text = text.partition(":")
        well_formed = bool(text)
    port = int(port_text) if port_text.isascii() and port_text.isdigit() else None
    if not port_text:
        port = DEFAULT_PORT
    if not (well_formed and _is_host(host)) or port is None or not 0 < port < 65536:
        raise CommandError(
            f"{address!r} (--address or MM_ADDRESS) is no address; allowed: host or host:port, an"
            " IPv6 address in brackets, a port from 1 to 65535, and https:// before it for TLS",
            exit_code=MISUSED,
        )
    return host or "localhost", port


def _is_host(host: str) -> bool:
    try:
        host.encode("idna")  # as it is looked up
    except UnicodeError:
        return False
    return "/" not in host and " " not in host


def ask(address: str, timeout_s: float, make: Callable[[ModelMeshStub], Awaitable[T]]) -> T:
    """Answer what an instance answers. Raises ``CommandError``."""

    async def asking() -> T:
        async with connected(address, timeout_s) as channel:
            return await make(ModelMeshStub(channel))

    return asyncio.run(asking())


@asynccontextmanager
async def connected(
    address: str, timeout_s: float, *, for_all: bool = True
) -> AsyncIterator[Channel]:
    """A channel to an instance; whatever goes wrong with it becomes a ``CommandError``.

    ``timeout_s`` is for all that is done with it, or for each answer.
    """
    from grpclib.client import Channel
    from grpclib.config import Configuration
    from grpclib.events import RecvInitialMetadata, listen
    from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

    pings = Configuration(
        _keepalive_time=KEEPALIVE_S,
        _keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        _http2_max_pings_without_data=0,
        _http2_min_sent_ping_interval_without_data=KEEPALIVE_S / 2,
        ssl_target_name_override=os.environ.get(NAME) or None,
    )
    wants_tls, address = split_scheme(address)
    host, port = parse_address(address)
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    context = context_for(wants_tls, os.environ)
    channel = Channel(host, port, ssl=context, config=pings)
    is_heard = False

    async def hear(_: RecvInitialMetadata) -> None:
        nonlocal is_heard
        is_heard = True

    listen(channel, RecvInitialMetadata, hear)
    show_token(channel)
    try:
        async with asyncio.timeout(timeout_s if for_all else None):
            yield channel
    except GRPCError as exc:
        text = f"{exc.status.name}: {exc.message or 'no message'}"
        if MANAGEMENT_PORT in text:
            raise CommandError(f"{place}: {text}; --address takes it", exit_code=MISUSED) from exc
        if _is_elsewhere(exc):
            raise CommandError(
                f"{place} is not the client port of an mm instance (MM_SVC_GRPC_PORT,"
                f" {DEFAULT_PORT} by default), or it is one of the Java mesh, which does not know"
                f" list, watch and policies: {text}",
                exit_code=MISUSED,
            ) from exc
        raise _refused(exc, text) from exc
    except TimeoutError as exc:
        text = f"no answer from {place} within {timeout_s:g} s"
        raise CommandError(text, exit_code=TIME_LIMIT) from exc
    except (StreamTerminatedError, ProtocolError) as exc:
        text = f"the connection to {place} broke: {exc}"
        if not is_heard:
            text += f" ({ASKS_FOR_CERTIFICATE if context else SPEAKS_TLS})"
        raise CommandError(text, exit_code=UNREACHABLE) from exc
    except ssl.SSLError as exc:
        raise CommandError(
            f"cannot connect to {place}: {tls_failure(exc)}", exit_code=UNREACHABLE
        ) from exc
    except OSError as exc:
        raise CommandError(
            f"cannot connect to {place}: {_reason(exc)} (is `mm serve` running there?)",
            exit_code=UNREACHABLE,
        ) from exc
    finally:
        await end(channel)


async def end(channel: Channel) -> None:
    """Close a channel, its socket at once: TLS would wait for a goodbye, beyond the loop's end."""
    protocol: Any = getattr(channel, "_protocol", None)
    transport = getattr(protocol and protocol.connection, "_transport", None)
    channel.close()
    if transport is not None and transport.get_extra_info("ssl_object"):
        transport.abort()
    await asyncio.sleep(0)


def way_to_register(model_id: str) -> str:
    """Answer what to do about a model that is not there."""
    return f"register it: `mm model register {quoted(model_id)} --path PATH`"


@contextmanager
def ways_out(ways: Mapping[int, str]) -> Iterator[None]:
    """Say also what may be done about a failure, by its exit code: what a mesh answers does not
    speak of commands.
    """
    try:
        yield
    except CommandError as exc:
        if exc.exit_code not in ways or isinstance(exc, AccessError):
            raise
        text = f"{exc}; {ways[exc.exit_code]}"
        raise CommandError(text, exit_code=exc.exit_code, details=exc.details) from exc
    except KeyboardInterrupt:
        if INTERRUPTED in ways:
            remark(f"mm: interrupted; {ways[INTERRUPTED]}")
        raise


def _refused(exc: GRPCError, text: str) -> CommandError:
    code = exit_code_of(exc.status.value)
    if exc.status.value == StatusCode.UNAUTHENTICATED:
        return AccessError(f"{text}; {way_to_token()}", exit_code=code)
    kinds = {
        StatusCode.PERMISSION_DENIED.value: AccessError,
        StatusCode.ALREADY_EXISTS.value: ExistsError,
    }
    return kinds.get(exc.status.value, CommandError)(text, exit_code=code)


def _is_elsewhere(exc: GRPCError) -> bool:
    """Whether this is what peer ports, runtimes and etcd answer, and what knows no such method."""
    if exc.status.value == StatusCode.UNIMPLEMENTED:
        return True
    # A mesh takes methods that it does not know for calls of models.
    is_invalid = exc.status.value == StatusCode.INVALID_ARGUMENT
    return is_invalid and "mm-model-id" in (exc.message or "")


def _reason(exc: OSError) -> str:
    if isinstance(exc, socket.gaierror):
        return (exc.strerror or str(exc)).lower()  # its numbers are its own
    if exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno).lower()
    # A name with several addresses: asyncio tells what became of each in one text.
    return "connection refused" if f"Errno {errno.ECONNREFUSED}" in str(exc) else str(exc)


# --- waiting --------------------------------------------------------------------------------------


def ask_and_look(
    address: str,
    timeout_s: float,
    make: Callable[[ModelMeshStub], Awaitable[T]],
    look: Callable[[ModelMeshStub], Awaitable[str]],
) -> T:
    """Answer what an instance answers, and say on stderr meanwhile how far it is: each time that
    ``look`` finds something else. Raises ``CommandError``.
    """

    async def asking() -> T:
        async with connected(address, timeout_s) as channel:
            return await _with_looks(ModelMeshStub(channel), make, look)

    return asyncio.run(asking())


async def _with_looks(
    stub: ModelMeshStub,
    make: Callable[[ModelMeshStub], Awaitable[T]],
    look: Callable[[ModelMeshStub], Awaitable[str]],
) -> T:
    from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

    expected = (GRPCError, ProtocolError, StreamTerminatedError, OSError)

    async def look_on() -> None:
        told = ""
        while True:
            await anyio.sleep(LOOK_S)
            try:
                text = await look(stub)
            except expected:
                return  # so does what is waited for, and that is told
            if text != told:
                remark(text)
                told = text

    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(look_on)
        try:
            answer = await make(stub)
        except expected as exc:
            failure = exc  # raised out here, so that it is not wrapped in a group
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return answer


# --- lists and watches ----------------------------------------------------------------------------


async def pages(
    channel: Channel,
    method: str,
    reply_name: str,
    request: Any,
    timeout_s: float,
) -> AsyncIterator[Any]:
    """Ask for page after page; ``request`` is changed on the way.

    Replies are protobuf's own messages, which are read many times as fast as betterproto2's.
    """
    from grpclib.client import UnaryUnaryMethod

    from mm.edge.protobuf import message_class

    reply_type = message_class(reply_name)
    call: Any = UnaryUnaryMethod(channel, f"/mmesh.ModelMesh/{method}", type(request), reply_type)
    while True:
        reply = await call(request, timeout=timeout_s)
        yield reply
        if not reply.next_page_token:
            return
        request.page_token = reply.next_page_token


@asynccontextmanager
async def watching(
    channel: Channel, method: str, entry_name: str, key_id: str, prefix: str, timeout_s: float
) -> AsyncIterator[AsyncIterator[Any]]:
    """Open a watch; from the moment that this is entered, no change is missed."""
    from grpclib.client import UnaryStreamMethod

    from mm.edge.protobuf import message_class

    request = message_class("mmesh.WatchRequest")(id=key_id, id_prefix=prefix)
    path = f"/mmesh.ModelMesh/{method}"
    call: Any = UnaryStreamMethod(channel, path, type(request), message_class(entry_name))
    async with call.open() as stream:
        async with asyncio.timeout(timeout_s):
            await stream.send_message(request, end=True)
            await stream.recv_initial_metadata()
        yield aiter(stream)


def exit_by_status(name: str) -> None:
    """End the command with the code for what a status says; return if that is 0."""
    codes = {"NOT_FOUND": NOT_FOUND, "LOADING_FAILED": FAILED, "TRANSITION_FAILED": FAILED}
    if name in codes:
        raise typer.Exit(codes[name])
