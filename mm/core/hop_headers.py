"""The ``mm-hop-*`` headers with which instances pass a call on (docs/peer-protocol.md).

Pure. Reading is forgiving, because the sender may be of another version: unknown headers are
ignored, an unreadable value counts as absent, and an unknown kind means "hit-only", which can
neither load nor forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

from mm.core.calls import Call, Hop, NamedBy, Outcome, PeerRoute
from mm.core.headers import Header, HeaderList
from mm.core.ids import InstanceId, ModelId

#: What this version speaks and sends.
HOP_VERSION: Final = 1
#: Longest list of instances read from one header: far more than any honest call collects.
INSTANCES_MAX: Final = 64

#: A longer value is not sent: what comes with a call has limits, and it goes on without it.
VMODEL_BYTES_MAX: Final = 4096

PREFIX: Final = b"mm-hop-"
VERSION: Final = b"mm-hop-version"
KIND: Final = b"mm-hop-kind"
LEFT: Final = b"mm-hop-left"
TRIED: Final = b"mm-hop-tried"
EXCLUDES: Final = b"mm-hop-excludes"
SIZE: Final = b"mm-hop-size"
FROM: Final = b"mm-hop-from"
VMODEL: Final = b"mm-hop-vmodel"
REDIRECT: Final = b"mm-hop-redirect"
REFUSE: Final = b"mm-hop-refuse"
LOAD: Final = b"mm-hop-load"
RESULT: Final = b"mm-hop-result"
STATE: Final = b"mm-hop-state"


@dataclass(frozen=True, slots=True)
class HopRequest:
    """What a peer says about the call that it passes on."""

    hop: Hop = Hop.EXTERNAL
    hops_left: int = 2
    tried: frozenset[InstanceId] = frozenset()
    excludes: frozenset[InstanceId] = frozenset()
    known_size_units: int = 0
    sender: InstanceId | None = None
    may_redirect: bool = False
    may_refuse: bool = False
    named_by: NamedBy | None = None

    def to_call(self, model_id: ModelId, method: str, deadline_s: float | None) -> Call:
        """Answer the call as the router here is asked about it."""
        return Call(
            model_id,
            method=method,
            hop=self.hop,
            deadline_s=deadline_s,
            tried=set(self.tried),
            excludes=set(self.excludes),
            hops_left=self.hops_left,
            known_size_units=self.known_size_units,
            sender=self.sender,
            named_by=self.named_by,
            may_redirect=self.may_redirect,
            may_refuse=self.may_refuse,
        )


def write_hop_request(route: PeerRoute, *, is_kept: bool = False) -> HeaderList:
    """Answer the headers that go with a call to a peer.

    ``is_kept``: the whole request is here and can be sent again, whatever happens; only then may
    the peer send the call back.
    """
    headers = [
        (VERSION, b"%d" % HOP_VERSION),
        (KIND, route.hop.value.encode()),
        (LEFT, b"%d" % route.hops_left),
    ]
    if route.tried:
        headers.append((TRIED, _write_instances(route.tried)))
    if route.excludes:
        headers.append((EXCLUDES, _write_instances(route.excludes)))
    if route.known_size_units:
        headers.append((SIZE, b"%d" % route.known_size_units))
    if route.sender:
        headers.append((FROM, quote(route.sender, safe="").encode()))
    if route.named_by is not None and is_kept:
        headers += _write_named_by(route.named_by)
    if route.may_redirect and is_kept:
        headers.append((REDIRECT, b"1"))
    if route.may_refuse and is_kept:
        headers.append((REFUSE, b"1"))
    return headers


def read_hop_request(mesh: Sequence[Header]) -> HopRequest:
    """Read what came with a call on the peer port; without a kind it is a client's own call."""
    values = {name: value for name, value in mesh if name.startswith(PREFIX)}
    kind = values.get(KIND)
    if kind is None:
        return HopRequest()
    return HopRequest(
        hop=_read_kind(kind),
        hops_left=_read_number(values.get(LEFT), 0),
        tried=_read_instances(values.get(TRIED)),
        excludes=_read_instances(values.get(EXCLUDES)),
        known_size_units=_read_number(values.get(SIZE), 0),
        sender=next(iter(_read_instances(values.get(FROM))), None),
        named_by=_read_named_by(values.get(VMODEL)),
        may_redirect=values.get(REDIRECT) == b"1",
        may_refuse=values.get(REFUSE) == b"1",
    )


def _read_kind(value: bytes) -> Hop:
    return Hop.LOAD_LOCAL if value == Hop.LOAD_LOCAL.value.encode() else Hop.HIT_ONLY


def _read_number(value: bytes | None, default: int) -> int:
    return int(value) if value is not None and value.isdigit() and len(value) <= 15 else default


def _write_instances(instances: Iterable[InstanceId]) -> bytes:
    return ",".join(quote(instance, safe="") for instance in sorted(instances)).encode()


def _read_instances(value: bytes | None) -> frozenset[InstanceId]:
    if not value:
        return frozenset()
    parts = value.decode("ascii", "replace").split(",", INSTANCES_MAX)[:INSTANCES_MAX]
    return frozenset(InstanceId(unquote(part)) for part in parts if part)


def _write_named_by(named_by: NamedBy) -> HeaderList:
    value = f"{quote(named_by.vmodel_id, safe='')}/{named_by.revision}".encode()
    return [(VMODEL, value)] if len(value) <= VMODEL_BYTES_MAX else []


def _read_named_by(value: bytes | None) -> NamedBy | None:
    vmodel_id, _, revision = (value or b"").rpartition(b"/")
    number = _read_number(revision, -1)
    if number < 0 or not vmodel_id:
        return None
    return NamedBy(unquote(vmodel_id.decode("ascii", "replace")), number)


def read_outcome(hop_result: str | None) -> Outcome | None:
    """Read ``mm-hop-result``; a word from a newer version counts as "stale": try elsewhere."""
    if hop_result is None:
        return None
    try:
        return Outcome(hop_result)
    except ValueError:
        return Outcome.STALE


def read_load(headers: Iterable[Header]) -> int | None:
    """Read ``mm-hop-load``: the calls that the answering copy has in flight."""
    for name, value in headers:
        if name == LOAD:
            return int(value) if value.isdigit() and len(value) <= 9 else None
    return None
