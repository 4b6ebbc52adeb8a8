"""The demo's clients against servers that answer, err, lie and die."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from mm.demo.tally import Tally
from mm.demo.traffic import (
    INFER_PATH,
    Question,
    Roster,
    Target,
    Traffic,
    difference,
    labels_of,
    questions,
    zipf_weights,
)
from mm.demo.training import Sample, TrainedModel
from mm.pb.inference import (
    InferTensorContents,
    ModelInferRequest,
    ModelInferResponse,
    ModelInferResponseInferOutputTensor,
)

pytestmark = pytest.mark.anyio

MODEL = TrainedModel(
    model_id="m",
    file="m.joblib",
    file_bytes=1,
    size_bytes=1,
    samples=(Sample(((1.0, 2.0),), (7,)), Sample(((3.0, 4.0),), (7,))),
)

#: Encoded here and not in a test: betterproto2 imports pydantic with its first message, if it is
#: installed, and imports block.
TYPED, RAW = questions(MODEL)


def response(label: int, model_id: str = "m") -> ModelInferResponse:
    output = ModelInferResponseInferOutputTensor(
        name="predict",
        datatype="INT64",
        shape=[1],
        contents=InferTensorContents(int64_contents=[label]),
    )
    return ModelInferResponse(model_name=model_id, outputs=[output])


class FakeInstance(Server):
    """Answers ``answer``, raises it if it is an error, or waits for ``release`` first."""

    def __init__(self, name: str, answer: Any) -> None:
        super().__init__([self])
        self.name = name
        self.answer = answer
        self.waits_for: anyio.Event | None = None
        self.arrived = anyio.Event()
        self.requests: list[ModelInferRequest] = []
        self.model_ids: list[str] = []
        self._transports: list[Any] = []

    def __mapping__(self) -> dict[str, Handler]:
        return {
            INFER_PATH: Handler(
                self._infer, Cardinality.UNARY_UNARY, ModelInferRequest, ModelInferResponse
            )
        }

    async def _infer(self, stream: Stream[Any, Any]) -> None:
        request = await stream.recv_message()
        assert request is not None
        assert stream.metadata is not None
        self.requests.append(request)
        self.model_ids.append(str(stream.metadata["mm-model-id"]))
        self.arrived.set()
        if self.waits_for is not None:
            await self.waits_for.wait()
        if isinstance(self.answer, BaseException):
            raise self.answer
        await stream.send_message(self.answer)

    def _protocol_factory(self) -> Any:
        protocol: Any = super()._protocol_factory()
        made = protocol.connection_made

        def connection_made(transport: Any) -> None:
            self._transports.append(transport)
            made(transport)

        protocol.connection_made = connection_made
        return protocol

    def kill(self) -> None:
        """Stop listening and cut every connection, as the kernel does for a killed process."""
        assert self._server is not None
        self._server.close()
        for transport in self._transports:
            transport.abort()


@asynccontextmanager
async def serving(fake: FakeInstance) -> AsyncIterator[Target]:
    await fake.start("127.0.0.1", 0)
    assert fake._server is not None
    port = fake._server.sockets[0].getsockname()[1]
    try:
        yield Target(fake.name, "127.0.0.1", port)
    finally:
        fake.kill()


@asynccontextmanager
async def traffic(roster: Roster, tally: Tally, client_count: int = 1) -> AsyncIterator[None]:
    clients = Traffic(roster, [MODEL], tally, calls_per_s=1000.0, client_count=client_count, seed=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(clients.run)
        yield
        clients.stop()


async def until(condition: Any) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def test_right_answers_are_counted() -> None:
    fake, tally = FakeInstance("a", response(7)), Tally()
    async with serving(fake) as target, traffic(Roster([target]), tally):
        await until(lambda: tally.checked >= 5)
    assert (tally.wrong, tally.failed, tally.lost, tally.moved) == (0, 0, 0, 0)
    assert tally.answered_by["a"] == tally.checked
    assert set(fake.model_ids) == {"m"}
    assert {request.model_name for request in fake.requests} == {"m"}
    values = {
        request.raw_input_contents[0]
        if request.raw_input_contents
        else tuple(request.inputs[0].contents.fp64_contents)  # type: ignore[union-attr]
        for request in fake.requests
    }
    assert values <= {(1.0, 2.0), struct.pack("<2d", 3.0, 4.0)}


async def test_a_wrong_answer_is_noticed() -> None:
    fake, tally = FakeInstance("a", response(8)), Tally()
    async with serving(fake) as target, traffic(Roster([target]), tally):
        await until(lambda: tally.wrong)
    assert tally.wrong_examples[0] == "m: scikit-learn says [7], the mesh [8]"
    assert tally.failed == 0


async def test_a_status_other_than_ok_is_a_failure() -> None:
    fake, tally = FakeInstance("a", GRPCError(Status.UNAVAILABLE, "no room")), Tally()
    async with serving(fake) as target, traffic(Roster([target]), tally):
        await until(lambda: tally.failed)
    assert tally.failed_examples[0] == "a: m: UNAVAILABLE: no room"
    assert (tally.checked, tally.lost) == (0, 0)


async def test_a_call_in_flight_on_a_killed_instance_is_lost_and_the_client_moves_home_later() -> (
    None
):
    first, second = FakeInstance("a", response(7)), FakeInstance("b", response(7))
    first.waits_for = anyio.Event()
    tally = Tally()
    async with serving(first) as a, serving(second) as b:
        roster = Roster([a, b])
        async with traffic(roster, tally):
            await first.arrived.wait()
            first.kill()
            roster.killed("a")
            await until(lambda: tally.moved >= 3)
            assert (tally.lost, tally.failed) == (1, 0)
            # Back again, on the same port.
            again = FakeInstance("a", response(7))
            await again.start("127.0.0.1", a.port)
            roster.back("a")
            await until(lambda: tally.answered_by["a"] >= 3)
        again.kill()
    assert (tally.lost, tally.failed, tally.wrong) == (1, 0, 0)
    assert tally.answered_by["b"] == tally.moved


async def test_a_connection_that_breaks_without_a_kill_is_a_failure() -> None:
    fake, tally = FakeInstance("a", response(7)), Tally()
    fake.waits_for = anyio.Event()
    async with serving(fake) as target, traffic(Roster([target]), tally):
        await fake.arrived.wait()
        fake.kill()
        await until(lambda: tally.failed >= 2)
    assert tally.lost == 0
    assert "Connection lost" in tally.failed_examples[0]
    assert "cannot connect" in tally.failed_examples[1]


@pytest.mark.parametrize(
    ("opened_s", "killed_s", "sent_s", "back_s", "excused"),
    [
        (1, 5, 4, None, True),
        (1, 5, 4, 9, True),
        (1, 5, 8, 9, True),  # on a stale connection, before anybody knew better
        (1, 5, 10, 9, False),  # after the return the connection must be a new one
        (6, 5, 8, None, False),  # opened after the kill: to whom?
        (6, 5, 8, 9, False),
        (1, None, 4, None, False),
    ],
)
async def test_what_excuses_a_broken_connection(
    monkeypatch: pytest.MonkeyPatch,
    opened_s: float,
    killed_s: float | None,
    sent_s: float,
    back_s: float | None,
    excused: bool,
) -> None:
    roster = Roster([Target("a", "h", 1)])
    for event, time_s in ((roster.killed, killed_s), (roster.back, back_s)):
        if time_s is not None:
            monkeypatch.setattr(anyio, "current_time", lambda time_s=time_s: time_s)
            event("a")
    assert roster.excuses("a", opened_s=opened_s, sent_s=sent_s) is excused


async def test_zipf() -> None:
    weights = zipf_weights(60, 1.0)
    assert sum(weights) == pytest.approx(1.0)
    assert weights[0] == pytest.approx(2 * weights[1])
    assert weights[0] == pytest.approx(60 * weights[59])
    assert zipf_weights(2, 2.0) == pytest.approx((0.8, 0.2))


async def test_answers_in_both_forms() -> None:
    assert (TYPED.expected, RAW.expected) == ((7,), (7,))
    assert labels_of(response(7)) == (7,)
    packed = response(7)
    packed.outputs[0].contents = None
    packed.raw_output_contents = [struct.pack("<q", 7)]
    assert labels_of(packed) == (7,)
    assert difference(RAW, packed) is None
    assert labels_of(ModelInferResponse()) is None


async def test_an_answer_of_another_model_is_wrong_whatever_it_says() -> None:
    question = Question("m", b"", (7,))
    assert difference(question, response(7, "n")) == "m: answered by model 'n'"
    assert difference(question, ModelInferResponse(model_name="m")) == (
        "m: scikit-learn says [7], the mesh no INT64 tensor"
    )
