"""Who may do what, asked by the wire and by the Python data plane alike: the same answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import unquote

import grpc.aio
import pytest

from mm.core.access import (
    AUTHORIZATION,
    NOT_A_TOKEN,
    NOTHING_SHOWN,
    SHOWN_TWICE,
    UNKNOWN_TOKEN,
    Access,
    parse_access,
    role_of_own,
)
from mm.core.headers import HeaderList
from mm.edge.access import AccessControl
from mm.edge.h2 import IncomingCall
from mm.edge.h2.messages import frame_message
from mm.edge.unary import ServiceTable
from mm.edge.wire_access import wire_access
from mm.wire import Method, MethodFlag, Role
from tests.edge.raw_h2 import REQUEST, connect
from tests.wire.stand import WireStand, serve_wire, until

pytestmark = pytest.mark.anyio

OK, PERMISSION_DENIED, UNAUTHENTICATED = b"0", b"7", b"16"
LIST = "/mmesh.ModelMesh/listModels"
REGISTER = "/mmesh.ModelMesh/registerModel"
HEALTH = "/grpc.health.v1.Health/Check"
INFER = "/t.S/Unary"
ID = (b"mm-model-id", b"m")


def access_of(*, pass_tokens: bool = False, **roles: list[str]) -> Access:
    """Each may do that, and has its name and "-token" as a token."""
    identities = {
        name: {"roles": each, "tokenSha256": [hashlib.sha256(f"{name}-token".encode()).hexdigest()]}
        for name, each in roles.items()
    }
    return parse_access(json.dumps({"identities": identities, "passTokens": pass_tokens}))


EVERYBODY = {"reader": ["read"], "shop": ["infer"], "ops": ["read", "manage", "infer"]}


@dataclass
class Guarded:
    """Both data planes over one tier 2."""

    stand: WireStand
    control: AccessControl
    port: int

    def go_by(self, access: Access) -> None:
        self.control.access = access
        self.stand.configure(access=wire_access(access))

    @property
    def refused(self) -> tuple[int, int]:
        """How many were unknown, and how many without the role, on either data plane."""
        here, counts = self.control.statistics, self.stand.counts
        return here.unauthenticated + counts.unauthenticated, here.denied + counts.denied


@asynccontextmanager
async def guarded(plane: str, access: Access | None = None) -> AsyncIterator[Guarded]:
    async with serve_wire() as stand:
        server = stand.tier2_servers[Role.EXTERNAL]
        services = ServiceTable(server.handler)
        for path in (LIST, REGISTER, HEALTH):
            services.add(path, _served)
        control = AccessControl(access or access_of(**EVERYBODY))
        server.handler = control.before(services, services)
        methods = {
            path: Method(MethodFlag.OWN, needs=role_of_own(path)) for path, _ in services.paths()
        }
        stand.configure(methods=methods, access=wire_access(control.access))
        port = stand.port if plane == "wire" else await server.start("127.0.0.1", 0)
        yield Guarded(stand, control, port)


async def _served(call: IncomingCall) -> None:
    lists = (call.headers, call.head.metadata)
    has_token = any(name == AUTHORIZATION for each in lists for name, _ in each)
    call.send_status(0, "served" + " with authorization" * has_token)


@pytest.fixture(params=["wire", "python"])
def plane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def ask(port: int, path: str, *headers: tuple[bytes, bytes]) -> tuple[bytes, str]:
    """Answer the status of a call, and its text."""
    async with connect(port) as peer:
        head: HeaderList = [(n, path.encode() if n == b":path" else v) for n, v in REQUEST]
        stream_id = peer.begin([*head, *headers])
        peer.send(stream_id, frame_message(b"x"), end=True)
        answer, _ = await peer.wait_answer(stream_id)
    return answer[b"grpc-status"], unquote(answer.get(b"grpc-message", b"").decode())


def bearer(name: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {name}-token".encode()


async def test_each_role_opens_its_own_methods(plane: str) -> None:
    methods = {LIST: "read", REGISTER: "manage", INFER: "infer"}
    async with guarded(plane) as at:
        refused = 0
        for name, roles in EVERYBODY.items():
            for path, needed in methods.items():
                code, text = await ask(at.port, path, bearer(name), ID)
                if needed in roles:
                    assert code == OK
                    continue
                refused += 1
                assert code == PERMISSION_DENIED
                assert text == f'"{name}" may not: the call needs the role {needed}, not {roles[0]}'
        assert at.refused == (0, refused)
        assert len(at.stand.runtime.metadata) == 2


async def test_health_is_told_to_anybody(plane: str) -> None:
    async with guarded(plane) as at:
        assert await ask(at.port, HEALTH) == (OK, "served")


@pytest.mark.parametrize("passes", [False, True])
async def test_tokens_end_also_where_nobody_needs_one(plane: str, passes: bool) -> None:
    """The log of headers, which is behind, must not have them."""
    access = access_of(pass_tokens=passes, **EVERYBODY)
    async with guarded(plane, access) as at:
        code, text = await ask(at.port, HEALTH, bearer("shop"))
        assert (code, text.endswith("with authorization")) == (OK, passes)


SECRET = b"shop-token"
ATTACKS = [
    ((), NOTHING_SHOWN),
    ((b"Bearer SHOP-TOKEN",), UNKNOWN_TOKEN),
    ((b"Basic c2hvcDp0b2tlbg==",), NOT_A_TOKEN),
    ((b"Bearer",), NOT_A_TOKEN),
    ((b"Bearer ",), NOT_A_TOKEN),
    ((SECRET,), NOT_A_TOKEN),
    ((b"Bearershop-token",), NOT_A_TOKEN),
    ((b"Bearer\tshop-token",), NOT_A_TOKEN),
    ((b"Bearer shop-token, Bearer ops-token",), NOT_A_TOKEN),
    ((b"Bearer shop-token,ops-token",), NOT_A_TOKEN),
    ((b"Bearer shop-token x",), NOT_A_TOKEN),
    ((b"Bearer =",), NOT_A_TOKEN),
    ((b"Bearer shop-token=",), UNKNOWN_TOKEN),
    ((b"Bearer shop-toke\xc3\xb1",), NOT_A_TOKEN),
    ((b"Bearer \xff",), NOT_A_TOKEN),
    ((b"\xe2earer shop-token",), NOT_A_TOKEN),
    ((b"Bearer shop-token", b"Bearer shop-token"), SHOWN_TWICE),
    ((b"Bearer nobody", b"Bearer shop-token"), SHOWN_TWICE),
    ((b"Bearer " + 4097 * b"a",), UNKNOWN_TOKEN),
]


async def test_nobody_is_let_in_who_shows_no_token_as_it_is(plane: str) -> None:
    async with guarded(plane) as at:
        for values, why in ATTACKS:
            for path in (INFER, LIST):
                shown = tuple((b"authorization", value) for value in values)
                assert await ask(at.port, path, *shown, ID) == (UNAUTHENTICATED, why), values
        assert at.refused == (2 * len(ATTACKS), 0)
        assert at.stand.runtime.metadata == []
        # 8 KB are more than a list of headers may have, whoever asks.
        code, text = await ask(at.port, INFER, (b"authorization", b"Bearer " + 8192 * b"a"), ID)
        assert (code, "MM_SVC_GRPC_MAX_HEADERS_SIZE" in text) == (b"8", True)


async def test_the_scheme_is_the_same_in_any_case(plane: str) -> None:
    async with guarded(plane) as at:
        for scheme in (b"bearer", b"BEARER", b"bEaReR", b"Bearer  "):
            shown = (b"authorization", scheme + b" " + SECRET)
            assert (await ask(at.port, INFER, shown, ID))[0] == OK


@pytest.mark.parametrize("passes", [False, True])
async def test_runtimes_get_tokens_only_if_told(plane: str, passes: bool) -> None:
    access = access_of(pass_tokens=passes, **EVERYBODY)
    async with guarded(plane, access) as at:
        assert (await ask(at.port, INFER, bearer("shop"), ID, (b"x-own", b"1")))[0] == OK
        seen = dict(at.stand.runtime.metadata[0])
        assert seen["x-own"] == "1"
        assert seen.get("authorization") == ("Bearer shop-token" if passes else None)


async def test_calls_that_tier_2_serves_are_asked_there_and_keep_no_token(plane: str) -> None:
    """Not loaded here: the wire gives the call to tier 2, with its token."""
    async with guarded(plane) as at:
        elsewhere = (b"mm-model-id", b"other")
        assert (await ask(at.port, INFER, bearer("shop"), elsewhere))[0] == OK
        assert "authorization" not in dict(at.stand.runtime.metadata[0])
        assert (await ask(at.port, INFER, bearer("reader"), elsewhere))[0] == PERMISSION_DENIED


async def test_what_the_wire_says_counts_from_the_wire_alone(plane: str) -> None:
    async with guarded(plane) as at:
        for path in (INFER, LIST):
            code, text = await ask(at.port, path, (b"mm-wire-certificate", b"ops"), ID)
            assert (code, text) == (UNAUTHENTICATED, NOTHING_SHOWN)
        other = (b"mm-model-id", b"other")
        assert (await ask(at.port, INFER, (b"mm-wire-certificate", b"ops"), other))[0] == b"16"


async def test_a_token_that_is_taken_back_ends_on_connections_that_are_there(plane: str) -> None:
    async with guarded(plane) as at, connect(at.port) as peer:
        head: HeaderList = [(n, INFER.encode() if n == b":path" else v) for n, v in REQUEST]

        async def again() -> bytes:
            stream_id = peer.begin([*head, bearer("shop"), ID])
            peer.send(stream_id, frame_message(b"x"), end=True)
            return (await peer.wait_answer(stream_id))[0][b"grpc-status"]

        assert [await again(), await again()] == [OK, OK]
        at.go_by(access_of(shop=["read"]))
        assert await again() == PERMISSION_DENIED
        at.go_by(access_of(ops=["infer"]))
        assert await again() == UNAUTHENTICATED
        at.go_by(access_of(**EVERYBODY))
        assert await again() == OK


async def test_streams_under_way_go_on(plane: str) -> None:
    async with (
        guarded(plane) as at,
        grpc.aio.insecure_channel(f"127.0.0.1:{at.port}") as client,
    ):
        metadata = (("mm-model-id", "m"), ("authorization", "Bearer shop-token"))
        call = client.stream_stream("/t.S/Both")(metadata=metadata)
        await call.write(b"1")
        assert await call.read() == b"re:1"
        at.go_by(access_of(ops=["infer"]))
        refused = client.unary_unary(INFER)(b"", metadata=metadata)
        assert await refused.code() is grpc.StatusCode.UNAUTHENTICATED
        await call.write(b"2")
        assert await call.read() == b"re:2"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_stream_without_a_role_is_ended_before_its_first_message(plane: str) -> None:
    async with guarded(plane) as at, connect(at.port) as peer:
        head: HeaderList = [(n, b"/t.S/Both" if n == b":path" else v) for n, v in REQUEST]
        stream_id = peer.begin([*head, bearer("reader"), ID])
        answer, _ = await peer.wait_answer(stream_id)
        assert answer[b"grpc-status"] == PERMISSION_DENIED
        assert at.stand.runtime.metadata == []


async def test_peers_need_no_role() -> None:
    async with serve_wire(role=Role.PEER) as stand:
        stand.configure(access=wire_access(access_of(**EVERYBODY)))
        hop = ((b"mm-hop-kind", b"hit-only"), (b"mm-hop-version", b"1"), (b"mm-hop-left", b"1"))
        assert (await ask(stand.port, INFER, ID, *hop))[0] == OK


async def test_a_client_is_no_instance_whatever_it_says(plane: str) -> None:
    """Hop headers of a client: not heeded, not sent on, not answered."""
    async with guarded(plane) as at:
        hop = (
            (b"mm-hop-version", b"1"),
            (b"mm-hop-kind", b"hit-only"),
            (b"mm-hop-left", b"0"),
            (b"mm-hop-from", b"peer"),
            (b"mm-hop-redirect", b"1"),
            (b"mm-hop-tried", b"me"),
            (b"mm-hop-excluded", b"me"),
            (b"mm-wire-tried", b"here 0"),
            (b"mm-wire-model", b"m"),
            (b"mm-wire-fault", b"lost"),
        )
        for model_id in (b"m", b"other"):
            async with connect(at.port) as peer:
                head: HeaderList = [(n, INFER.encode() if n == b":path" else v) for n, v in REQUEST]
                stream_id = peer.begin([*head, bearer("shop"), (b"mm-model-id", model_id), *hop])
                peer.send(stream_id, frame_message(b"x"), end=True)
                answer, _ = await peer.wait_answer(stream_id)
            assert answer[b"grpc-status"] == OK
            assert [name for name in answer if name.startswith(b"mm-")] == []
            seen = dict(at.stand.runtime.metadata.pop())
            assert {name for name in seen if name.startswith("mm-")} <= {
                "mm-model-id",
                "mm-model-id-bin",
            }
        assert at.stand.router.tried_routes == []
        assert at.stand.wire.take_reports() == []


async def test_who_is_not_asked_is_not_looked_at() -> None:
    async with serve_wire() as stand:
        shown = ((b"authorization", b"Basic x"), (b"authorization", b"y"))
        assert (await ask(stand.port, INFER, *shown, ID))[0] == OK
        seen = [value for name, value in stand.runtime.metadata[0] if name == "authorization"]
        assert seen == ["Basic x", "y"]
        await until(lambda: stand.counts.calls_open == 0)
