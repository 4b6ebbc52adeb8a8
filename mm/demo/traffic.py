"""Calls of concurrent gRPC clients at all instances, every answer checked.

Each client has a home instance and one connection. Popularity of models follows Zipf's law. When a
client's instance is gone it moves to another one, and it goes home when the instance is back.

What counts as lost and what as failed. A call is *lost* if it was sent on a connection that had
been opened to an instance before that instance was killed, and the connection broke under it before
the instance was back: no client of any kind could have saved it. Everything else without an answer
is *failed*: any gRPC status other than OK from anywhere, a connection that broke without a kill, a
live instance that refuses connections. A connection refused by an instance that is down is neither:
nothing was sent, the client moves on and sends its call elsewhere.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from mm.demo.lost_connections import told_as_errors
from mm.demo.tally import Tally
from mm.demo.training import Sample, TrainedModel
from mm.pb.inference import (
    InferTensorContents,
    ModelInferRequest,
    ModelInferRequestInferInputTensor,
    ModelInferResponse,
)

INFER_PATH: Final = "/inference.GRPCInferenceService/ModelInfer"

#: Longer than any load may take, shorter than a person waits.
CALL_TIMEOUT_S: Final = 30.0

#: How steep: the model of rank r is called in proportion to 1 / r ** exponent.
ZIPF_EXPONENT: Final = 1.2

#: Pause before another connection after one was refused.
CONNECT_PAUSE_S: Final = 0.1


def zipf_weights(count: int, exponent: float = ZIPF_EXPONENT) -> tuple[float, ...]:
    """Answer the shares of ``count`` models by rank; they add up to 1."""
    weights = [1 / rank**exponent for rank in range(1, count + 1)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


@dataclass(frozen=True, slots=True)
class Question:
    """A request as it goes over the wire, and the right answer to it."""

    model_id: str
    request: bytes
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """An instance that answers clients."""

    name: str
    host: str
    port: int


@dataclass(slots=True)
class _Presence:
    """What is known of an instance: whether it is up, and when it was last killed and back."""

    up: bool = True
    killed_s: float = float("-inf")
    back_s: float = float("-inf")


@dataclass(slots=True)
class _Connection:
    target: Target
    channel: Channel
    opened_s: float


@dataclass(slots=True)
class Roster:
    """Which instances are up. Whoever kills one says so here, in the same breath."""

    targets: Sequence[Target]
    _presences: dict[str, _Presence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._presences = {target.name: _Presence() for target in self.targets}

    def killed(self, name: str) -> None:
        """The instance was killed just now."""
        presence = self._presences[name]
        presence.up = False
        presence.killed_s = anyio.current_time()

    def back(self, name: str) -> None:
        """The instance serves again."""
        presence = self._presences[name]
        presence.up = True
        presence.back_s = anyio.current_time()

    def is_up(self, name: str) -> bool:
        """Answer whether the instance is believed to serve."""
        return self._presences[name].up

    def excuses(self, name: str, *, opened_s: float, sent_s: float) -> bool:
        """Answer whether a connection that broke under a call died with its instance.

        Opened before the kill, and the call was sent before the instance was back: later on, the
        connection is to another process, whatever the channel object remembers.
        """
        presence = self._presences[name]
        if opened_s >= presence.killed_s:
            return False
        return not presence.up or sent_s < presence.back_s


def questions(model: TrainedModel) -> tuple[Question, ...]:
    """Encode every sample of a model; half of them with raw tensors, half with typed ones."""
    return tuple(
        Question(
            model_id=model.model_id,
            request=_encode(model.model_id, sample, raw=index % 2 == 1),
            expected=sample.expected,
        )
        for index, sample in enumerate(model.samples)
    )


def _encode(model_id: str, sample: Sample, *, raw: bool) -> bytes:
    values = list(itertools.chain.from_iterable(sample.rows))
    tensor = ModelInferRequestInferInputTensor(
        name="input-0", datatype="FP64", shape=[len(sample.rows), len(sample.rows[0])]
    )
    request = ModelInferRequest(model_name=model_id, inputs=[tensor])
    if raw:
        request.raw_input_contents = [struct.pack(f"<{len(values)}d", *values)]
    else:
        tensor.contents = InferTensorContents(fp64_contents=values)
    return bytes(request)


def labels_of(response: ModelInferResponse) -> tuple[int, ...] | None:
    """Answer the predicted classes, None if the response holds no integer tensor."""
    for index, output in enumerate(response.outputs):
        if output.datatype != "INT64":
            continue
        if response.raw_output_contents:
            content = response.raw_output_contents[index]
            return struct.unpack(f"<{len(content) // 8}q", content)
        if output.contents is not None:
            return tuple(output.contents.int64_contents)
    return None


def difference(question: Question, response: ModelInferResponse) -> str | None:
    """Tell how an answer differs from what scikit-learn says; None if it is equal."""
    if response.model_name != question.model_id:
        return f"{question.model_id}: answered by model {response.model_name!r}"
    labels = labels_of(response)
    if labels == question.expected:
        return None
    found = "no INT64 tensor" if labels is None else str(list(labels))
    return f"{question.model_id}: scikit-learn says {list(question.expected)}, the mesh {found}"


class _RequestBytesCodec(CodecBase):
    """Sends requests that are encoded already; decodes responses into their message type."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        assert isinstance(message, bytes)
        return message

    def decode(self, data: bytes, message_type: Any) -> Any:
        return message_type.parse(data)


class Traffic:
    """Clients that call models by Zipf's law until told to stop.

    ``calls_per_s`` is the aim of all clients together; a slow mesh gets fewer, because every
    client waits for its answer before it sends again.
    """

    def __init__(
        self,
        roster: Roster,
        models: Sequence[TrainedModel],
        tally: Tally,
        *,
        calls_per_s: float,
        client_count: int,
        seed: int,
    ) -> None:
        self._roster = roster
        self._tally = tally
        self._client_count = client_count
        self._pause_mean_s = client_count / calls_per_s
        self._rng = random.Random(seed)
        ranked = list(models)
        self._rng.shuffle(ranked)
        self._questions = [questions(model) for model in ranked]
        self._cumulative = list(itertools.accumulate(zipf_weights(len(ranked))))
        self._stopping = anyio.Event()

    def stop(self) -> None:
        """Let every client end after the answer it waits for."""
        self._stopping.set()

    async def run(self) -> None:
        """Run all clients; returns when they have ended after ``stop``."""
        async with anyio.create_task_group() as clients:
            for index in range(self._client_count):
                clients.start_soon(self._client, index, name=f"client {index}")

    async def _client(self, index: int) -> None:
        targets = self._roster.targets
        home = targets[index % len(targets)]
        connection: _Connection | None = None
        try:
            while not self._stopping.is_set():
                target = self._choose(home)
                if connection is not None and connection.target is not target:
                    connection.channel.close()
                    connection = None
                if connection is None:
                    connection = _connect(target)
                if not await self._call(connection, home):
                    connection.channel.close()
                    connection = None
                with anyio.move_on_after(self._rng.expovariate(1 / self._pause_mean_s)):
                    await self._stopping.wait()
        finally:
            if connection is not None:
                connection.channel.close()

    def _choose(self, home: Target) -> Target:
        if self._roster.is_up(home.name):
            return home
        others = [target for target in self._roster.targets if self._roster.is_up(target.name)]
        return self._rng.choice(others) if others else home

    def _pick(self) -> Question:
        (chosen,) = self._rng.choices(self._questions, cum_weights=self._cumulative)
        return self._rng.choice(chosen)

    async def _call(self, connection: _Connection, home: Target) -> bool:
        """Make one call and report it; answers whether the connection is still good."""
        question = self._pick()
        target = connection.target
        sent_s = anyio.current_time()
        method = UnaryUnaryMethod[bytes, ModelInferResponse](
            connection.channel, INFER_PATH, bytes, ModelInferResponse
        )
        try:
            with told_as_errors():
                response = await method(
                    question.request,
                    timeout=CALL_TIMEOUT_S,
                    metadata={"mm-model-id": question.model_id},
                )
        except GRPCError as exc:
            text = f"{target.name}: {question.model_id}: {exc.status.name}: {exc.message}"
            self._tally.record_failure(text)
            return True
        except TimeoutError:
            # grpclib's own time limit; the mesh should have answered DEADLINE_EXCEEDED before.
            text = f"{target.name}: {question.model_id}: no answer in {CALL_TIMEOUT_S:g} s"
            self._tally.record_failure(text)
            return False
        except (StreamTerminatedError, ProtocolError) as exc:
            text = f"{target.name}: {question.model_id}: {exc or type(exc).__name__}"
            if self._roster.excuses(target.name, opened_s=connection.opened_s, sent_s=sent_s):
                self._tally.record_loss(text)
            else:
                self._tally.record_failure(text)
            return False
        except OSError as exc:
            # Raised while connecting only: nothing was sent.
            if self._roster.is_up(target.name):
                self._tally.record_failure(f"{target.name}: cannot connect: {exc}")
            await anyio.sleep(CONNECT_PAUSE_S)
            return False
        latency_ms = (anyio.current_time() - sent_s) * 1000
        if target is not home:
            self._tally.moved += 1
        self._tally.record_answer(target.name, latency_ms, difference(question, response))
        return True


def _connect(target: Target) -> _Connection:
    """Make a channel; it connects with the first call."""
    channel = Channel(target.host, target.port, codec=_RequestBytesCodec())
    return _Connection(target, channel, opened_s=anyio.current_time())
