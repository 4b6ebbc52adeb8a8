"""What the wire says of attempts of its own that failed (docs/wire.md).

The words are headers that begin with ``mm-wire-``, heard on the wire's own connections alone, with
the call that the wire gives to tier 2 to go on with; of a call that cannot be sent again they come
without it. Which of them the wire writes is in ``mm/wire/_wire_build.pxi``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mm.core.calls import Call, LocalRoute, Outcome, PeerRoute, Route
from mm.core.headers import Header, HeaderList, Status, read_status
from mm.core.hop_headers import LOAD, RESULT
from mm.core.ids import ModelId
from mm.edge.attempt import judge
from mm.edge.h2.incoming import IncomingCall
from mm.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from mm.mesh.ports import Router

#: "the answer that the wire holds is the answer".
PASS_ON: Final = b"mm-wire-pass-on"
_CLIENT: Final = b"mm-wire-client"
_TRIED: Final = b"mm-wire-tried"
_MODEL: Final = b"mm-wire-model"
_FAULT: Final = b"mm-wire-fault"
#: As the wire names them, and as they were in the answer's trailers.
_ANSWERED: Final = {
    b"mm-wire-status": b"grpc-status",
    b"mm-wire-message": b"grpc-message",
    b"mm-wire-result": b"mm-hop-result",
    b"mm-wire-state": b"mm-hop-state",
    b"mm-wire-pushback": b"grpc-retry-pushback-ms",
}


@dataclass(frozen=True, slots=True)
class Tried:
    """An attempt that the wire made from the table alone."""

    model_id: ModelId
    #: "here", then bits of the load; or the handle of an instance, then whether it might redirect.
    where: str
    number: int
    #: Why there was no answer; empty: there was.
    fault: str
    status: Status


def client_of(call: IncomingCall) -> object:
    """Answer whose call it is, the same for all calls of one connection of a client.

    Tier 2 has few connections with the wire, for all clients; none but these are believed.
    """
    if not call.link.is_wire:
        return call.link
    return next((value for name, value in call.head.mesh if name == _CLIENT), call.link)


def read_tried(mesh: Iterable[Header]) -> Tried | None:
    """Read what the wire says; None: it has not tried anything."""
    words = {name: value for name, value in mesh if name.startswith(b"mm-wire-")}
    tried = words.get(_TRIED)
    if tried is None:
        return None
    where, _, number = tried.decode().partition(" ")
    status = read_status(
        (_ANSWERED[name], value) for name, value in words.items() if name in _ANSWERED
    )
    model_id = ModelId(words[_MODEL].decode())
    return Tried(model_id, where, int(number), words.get(_FAULT, b"").decode(), status)


def goes_on(router: Router, incoming: IncomingCall, call: Call, tried: Tried) -> bool:
    """Weigh the attempt; answers whether the call is to be tried again.

    If not, the client has its answer. Raises ``MeshError``.
    """
    if tried.model_id != call.model_id:
        return True  # a vmodel that has moved on: the attempt says nothing of the model now
    weighed = _weigh(router, call, tried)
    if weighed is None:
        return True
    outcome, text = weighed
    if outcome in (Outcome.NO_MODEL, Outcome.MOVED) and call.failure is not None:
        raise call.failure
    if tried.fault:
        error = call.failure or RuntimeUnavailableError(text)
        if error.hop_result is None:
            error.hop_result = outcome.value
        raise error
    extra: HeaderList = [(PASS_ON, b"1")]
    if not incoming.link.server.external:
        extra.append((LOAD, b"%d" % router.tell_load(call)))
        if outcome is not Outcome.ANSWERED:
            extra.append((RESULT, outcome.value.encode()))
    incoming.send_status(tried.status.code or 0, "", extra)
    return False


def hear(router: Router, tried: Tried) -> None:
    """Weigh an attempt whose call cannot be sent again, and has had its answer."""
    _weigh(router, Call(tried.model_id), tried)


def _weigh(router: Router, call: Call, tried: Tried) -> tuple[Outcome, str] | None:
    """Answer what an attempt came to; None if it makes sense to try the call again."""
    route: Route | None = LocalRoute(call.model_id, load_id=tried.number)
    if tried.where != "here":
        route = router.route_there(call.model_id, int(tried.where), may_redirect=bool(tried.number))
    if route is None:
        return None
    outcome, text = Outcome.UNREACHABLE, tried.fault
    if not tried.fault:
        outcome, text = judge(route, tried.status), tried.status.message
        if isinstance(route, PeerRoute):
            if tried.status.hop_state is not None:
                router.report_state(call, route, tried.status.hop_state)
            call.hear_retry(tried.status.retry_after_ms)
    return None if router.tried(call, route, outcome, text) else (outcome, text)
