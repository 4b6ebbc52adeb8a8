"""One call for several models: the same message to each, the answers in one (spec core 2.13).

Only for methods with one message in and one out. The answers are concatenated in the order of the
ids, which protobuf reads as a merge; so are their metadata.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mm.core import call_texts
from mm.core.calls import Call, LocalRoute, NamedBy, Outcome, PeerRoute, Route
from mm.core.headers import (
    Header,
    HeaderList,
    IdKind,
    Status,
    check_response_headers,
    is_balanced,
    read_status,
    requires_all,
    without_mesh_headers,
)
from mm.core.ids import ModelId
from mm.core.protobuf_ids import FieldWalk, MalformedMessageError, injection_suffix
from mm.edge.attempt import judge
from mm.edge.h2.client import ChannelFullError, UnreachableError
from mm.edge.h2.incoming import IncomingCall
from mm.edge.h2.messages import ENCODINGS_READ, MessageTooLargeError, frame_message
from mm.edge.h2.stream import FaultKind
from mm.edge.moves import Moves
from mm.edge.pipe import upstream_headers
from mm.edge.unary import Answer, CallError, exchange, read_request
from mm.errors import MeshError, ModelNotFoundError, RuntimeUnavailableError, StatusCode

if TYPE_CHECKING:
    from mm.edge.proxy import Proxy

#: Written anew for the merged answer, so not taken from the parts.
_OWN_HEADERS = frozenset(
    (
        b":status",
        b"content-type",
        b"content-length",
        b"grpc-encoding",
        b"grpc-status",
        b"grpc-message",
        b"grpc-status-details-bin",
    )
)


class MultiCall:
    """A client's call for several models."""

    def __init__(self, proxy: Proxy, incoming: IncomingCall, kind: IdKind, ids: list[str]) -> None:
        self._proxy = proxy
        self._incoming = incoming
        self._kind = kind
        self._ids = ids
        self._answers: list[Answer | None] = [None] * len(ids)
        self._merged_bytes = 0

    async def run(self) -> None:
        """Ask every model and send the merged answer. Raises ``MeshError``."""
        message = await read_request(self._incoming)
        self._incoming.request_bytes = len(message)
        positions = iter(range(len(self._ids)))
        workers = min(self._proxy.config.multi_parallelism, len(self._ids))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work(positions, message))
        except BaseExceptionGroup as errors:
            # The first failure cancelled the others; it alone is the answer. A bug in the same
            # turn, or in giving up, comes before it: nobody else would hear of it.
            failures = errors.exceptions
            first = next((exc for exc in failures if not isinstance(exc, MeshError)), failures[0])
            if isinstance(first, CallError):
                self._incoming.send_status(
                    first.code, first.message, _custom(first.trailers, keep_details=True)
                )
                return
            raise first from None
        self._send()

    async def _work(self, positions: Iterator[int], message: bytes) -> None:
        for position in positions:
            try:
                answer = await self._ask(self._ids[position], message)
                self._answers[position] = answer
                self._merged_bytes += sum(len(part) for part in answer.plain_messages())
                self._check_size()
            except MeshError as error:
                missing = error.code == StatusCode.NOT_FOUND
                if not missing or requires_all(self._incoming.head.mesh):
                    raise

    async def _ask(self, given_id: str, message: bytes) -> Answer:
        """Answer one model's answer, which is OK. Raises ``MeshError``."""
        router, incoming = self._proxy.router, self._incoming
        is_vmodel = self._kind is IdKind.VMODEL
        model_id = await router.resolve(given_id) if is_vmodel else ModelId(given_id)
        call = Call(
            model_id,
            method=incoming.method,
            deadline_s=incoming.deadline_s,
            balanced=is_balanced(incoming.head.mesh),
            named_by=NamedBy(given_id) if is_vmodel else None,
        )
        observers = self._proxy.observers
        observation = None
        if observers is not None:
            observation = observers.begin(incoming, model_id, given_id if is_vmodel else "")
        if observation is None:
            return await self._ask_until(call, message, given_id if is_vmodel else None)
        observation.request(message)
        with observation.until_end(lambda: None):
            answer = await self._ask_until(call, message, given_id if is_vmodel else None)
            observation.response_headers(answer.headers)
            for part in answer.plain_messages():
                observation.response(part)
            observation.end(StatusCode.OK)
        return answer

    async def _ask_until(self, call: Call, message: bytes, vmodel_id: str | None) -> Answer:
        """Follow the vmodel, if one named the model, wherever it goes meanwhile."""
        moves = Moves(self._proxy.router, vmodel_id)
        return await moves.serve(call, lambda call: self._ask_model(call, message))

    async def _ask_model(self, call: Call, message: bytes) -> Answer:
        router = self._proxy.router
        while True:
            route = await router.route(call)
            answer: Answer | None = None
            began_s = self._incoming.link.loop.time()
            try:
                answer = await self._exchange(route, message)
            except ChannelFullError:
                router.finished(call, route, Outcome.CROWDED)
                raise
            except UnreachableError as error:
                outcome, status = Outcome.UNREACHABLE, Status(14, error.message)
            except BaseException:
                self._measure(call, route, StatusCode.CANCELLED, began_s)
                router.finished(call, route, Outcome.ABANDONED)
                raise
            else:
                outcome, status = _classify(route, answer)
                if isinstance(route, PeerRoute) and status.hop_state is not None:
                    router.report_state(call, route, status.hop_state)
                if isinstance(route, PeerRoute) and outcome is not Outcome.ANSWERED:
                    call.hear_retry(status.retry_after_ms)
            code = StatusCode.UNKNOWN if status.code is None else status.code
            self._measure(call, route, code, began_s)
            again = router.finished(call, route, outcome, status.message)
            if answer is not None and status.code == StatusCode.OK:
                return answer
            if outcome is Outcome.ANSWERED or not again:
                if outcome in (Outcome.NO_MODEL, Outcome.MOVED):
                    raise call.failure or ModelNotFoundError
                if answer is not None and answer.trailers is not None:
                    raise CallError(status.code or 2, status.message, answer.trailers)
                raise call.failure or RuntimeUnavailableError(status.message)

    def _measure(self, call: Call, route: Route, code: int, began_s: float) -> None:
        """Count a call of the runtime here."""
        meter = self._proxy.meter
        if meter is not None and isinstance(route, LocalRoute):
            taken_s = self._incoming.link.loop.time() - began_s
            meter.invoked(call.method, code, taken_s, route.model_id, "")

    async def _exchange(self, route: Route, message: bytes) -> Answer:
        channel = self._proxy.channel(route)
        if isinstance(route, LocalRoute) and route.injection_path:
            walk = FieldWalk()
            walk.feed(message)
            if not walk.at_boundary:
                raise MalformedMessageError(call_texts.MESSAGE_CUT_OFF)
            message = message + injection_suffix(route.injection_path, route.model_id)
        headers = upstream_headers(
            self._incoming, route, channel, b"", ENCODINGS_READ, is_kept=True
        )
        answer = await exchange(channel, headers, frame_message(message))
        if answer.error is not None:
            raise answer.error
        check_response_headers(answer.headers)
        check_response_headers(answer.trailers or ())
        return answer

    def _check_size(self) -> None:
        """Stop gathering as soon as the whole is too large."""
        length_max = self._proxy.message_bytes_max
        if self._merged_bytes > length_max:
            raise MessageTooLargeError("merged response", self._merged_bytes, length_max)

    def _send(self) -> None:
        answers = [answer for answer in self._answers if answer is not None]
        if not answers:
            raise ModelNotFoundError("none of the requested models were found")
        merged = b"".join(part for answer in answers for part in answer.plain_messages())
        headers = _merge(answer.headers for answer in answers)
        trailers = _merge(answer.trailers or [] for answer in answers)
        self._incoming.response_bytes = len(merged)
        self._incoming.send_headers(headers)
        self._incoming.stream.send_data(frame_message(merged))
        self._incoming.send_status(StatusCode.OK, extra=trailers)


def _classify(route: Route, answer: Answer) -> tuple[Outcome, Status]:
    if answer.fault is not None:
        lost = answer.fault.kind in (FaultKind.LOST, FaultKind.REFUSED)
        outcome = Outcome.UNREACHABLE if lost else Outcome.ANSWERED
        return outcome, Status(StatusCode.UNAVAILABLE, answer.fault.text)
    status = read_status(answer.trailers or ())
    if status.code == StatusCode.OK:
        return Outcome.ANSWERED, status
    return judge(route, status), status


def _custom(headers: HeaderList, *, keep_details: bool = False) -> HeaderList:
    kept = _OWN_HEADERS - {b"grpc-status-details-bin"} if keep_details else _OWN_HEADERS
    return [header for header in without_mesh_headers(headers) if header[0] not in kept]


def _merge(lists: Iterator[HeaderList]) -> HeaderList:
    """Concatenate header lists, each distinct header once."""
    merged: dict[Header, None] = {}
    for headers in lists:
        merged.update(dict.fromkeys(_custom(headers)))
    return list(merged)
