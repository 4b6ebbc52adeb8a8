"""Replica sets that are being replaced by a newer one: a model loaded there would soon have to move
(spec core 4.6, intentions of 10.1).

In Kubernetes the end of a pod's name is the hash of its replica set, a dash and five characters of
its own, and that is what instance ids are made of. Ids of another shape are in no set.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Final

from mm.core.ids import InstanceId

_MINUTE_MS: Final = 60_000
#: A rollout takes minutes. One whose newest pod is older than this is over, or stuck;
ROLLOUT_MS_MAX: Final = 20 * _MINUTE_MS
#: it goes on while pods start,
STARTING_MS: Final = 10 * _MINUTE_MS
#: and while pods of the older set come or go.
SHRINKING_MS: Final = 15 * _MINUTE_MS

#: Kubernetes makes both parts of letters and digits that spell no words.
_POD_ID: Final = re.compile(r"([bcdf-hj-np-tv-xz2456789]{6})-[bcdf-hj-np-tv-xz2456789]{5}")


def replica_set_of(instance_id: str) -> str:
    """Answer the part of an id that its replica set has in common; empty if there is none."""
    match = _POD_ID.fullmatch(instance_id)
    return match.group(1) if match else ""


class _ReplicaSet:
    __slots__ = ("changed_ms", "starts_ms")

    def __init__(self) -> None:
        #: Sorted.
        self.starts_ms: list[int] = []
        self.changed_ms = 0


class ReplicaSets:
    """The replica sets of the instances that are there, by their labels.

    An event costs the logarithm of a set's size. Whether a set is being replaced is worked out
    from what is known when it is asked: there is nothing to expire.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, ...], dict[str, _ReplicaSet]] = {}
        #: Groups with more than one set: the only ones worth a look.
        self._mixed: set[tuple[str, ...]] = set()

    def add(self, instance_id: InstanceId, labels: tuple[str, ...], start_ms: int) -> None:
        """An instance appeared."""
        name = replica_set_of(instance_id)
        if not name:
            return
        group = self._groups.setdefault(labels, {})
        each = group.setdefault(name, _ReplicaSet())
        insort(each.starts_ms, start_ms)
        each.changed_ms = max(each.changed_ms, start_ms)
        if len(group) > 1:
            self._mixed.add(labels)

    def remove(
        self, instance_id: InstanceId, labels: tuple[str, ...], start_ms: int, now_ms: int
    ) -> None:
        """An instance that was added with these labels and this start is gone."""
        name = replica_set_of(instance_id)
        if not name:
            return
        group = self._groups[labels]
        each = group[name]
        del each.starts_ms[bisect_left(each.starts_ms, start_ms)]
        each.changed_ms = max(each.changed_ms, now_ms)
        if not each.starts_ms:
            del group[name]
        if len(group) < 2:
            self._mixed.discard(labels)
        if not group:
            del self._groups[labels]

    def replaced(self, now_ms: int) -> frozenset[tuple[tuple[str, ...], str]]:
        """Answer the sets, as (labels, name), that are likely being replaced now."""
        if not self._mixed:
            return _NONE
        return frozenset(
            (labels, name)
            for labels in self._mixed
            for name in _replaced_in(self._groups[labels], now_ms)
        )


_NONE: Final[frozenset[tuple[tuple[str, ...], str]]] = frozenset()


def _replaced_in(group: dict[str, _ReplicaSet], now_ms: int) -> Iterator[str]:
    newest = max(group.values(), key=lambda each: each.starts_ms[0])
    started_ms = now_ms - newest.starts_ms[-1]
    if started_ms > ROLLOUT_MS_MAX:
        return
    for name, each in group.items():
        is_older = each.starts_ms[-1] < newest.starts_ms[0]
        is_active = started_ms <= STARTING_MS or now_ms - each.changed_ms <= SHRINKING_MS
        if is_older and is_active:
            yield name
