"""The lives of a simulated cluster's instances: crashes, stops, and upgrades; who comes back when.

Owns which instances there should be, and whose life a fault has in hand, so that no two have the
same one and one instance is always left. When it happens is ``faults``'.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Final

import anyio

from mm.errors import StartupError
from mm.testing.simulated_cluster import SimulatedCluster

#: An instance that cannot start is started again after this, as by Kubernetes.
RESTART_S: Final = 2.0
#: A rollout waits so long for a new instance to be ready; then it goes on, which is the worst that
#: an operator can do to it.
READY_S: Final = 20.0
#: What Kubernetes makes names of.
LETTERS: Final = "bcdfghjkmn"


class Lives:
    """Who is there. ``names`` are those that should be, and change with upgrades."""

    def __init__(
        self,
        cluster: SimulatedCluster,
        names: list[str],
        rng: random.Random,
        tell: Callable[[str, str], None],
    ) -> None:
        self._cluster = cluster
        self._names = names
        self._rng = rng
        self._tell = tell
        #: Instances whose life a fault has in hand.
        self._taken: set[str] = set()
        self._version = 1
        #: Of those that an upgrade brought.
        self._versions: dict[str, int] = {}
        self._is_upgrading = False

    # --- faults ---------------------------------------------------------------------------------

    async def instance_crashes(self) -> None:
        """One crashes, and comes back."""
        name = self._take()
        if name is not None:
            self._tell(name, "crashes")
            await self._cluster[name].crash()
            await self._come_back(name)

    async def instance_restarts(self) -> None:
        """One is told to stop, and comes back."""
        name = self._take()
        if name is not None:
            self._tell(name, "is told to stop")
            await self._cluster[name].stop()
            await self._come_back(name)

    async def upgrade(self) -> None:
        """All are replaced by a newer version under other ids, one after the other, as Kubernetes
        does it with one too many.
        """
        if self._is_upgrading:
            return
        self._is_upgrading = True
        self._version += 1
        self._tell("", f"version {self._version} takes the place of the one before")
        for number, old in enumerate(list(self._names)):
            if old in self._taken:
                continue  # it comes back as it was: this rollout leaves it out
            new = _pod_name(self._version, number)
            self._versions[new] = self._version
            self._taken |= {old, new}
            self._names.append(new)
            await self._start(new)
            with anyio.move_on_after(READY_S):
                while self._cluster[new].node.unready is not None:  # noqa: ASYNC110 - as probes do
                    await anyio.sleep(0.5)
            self._names.remove(old)
            self._tell(old, f"is told to stop, as {new} is there")
            await self._cluster[old].stop()
            self._taken -= {old, new}
        self._is_upgrading = False

    # --- whoever is there -----------------------------------------------------------------------

    def take_all(self) -> list[str]:
        """Answer all, none of whom ends or starts until freed; nobody if that cannot be."""
        if any(name in self._taken or not self._cluster[name].is_serving for name in self._names):
            return []
        self._taken.update(self._names)
        return list(self._names)

    def free(self, names: Iterable[str]) -> None:
        """Leave their lives to others."""
        self._taken.difference_update(names)

    async def start_missing(self) -> None:
        """Start who should be there and is not, after whoever is about to stop has gone."""
        cluster = self._cluster
        for each in list(cluster.instances.values()):
            if each.is_stopping:
                await each.wait_ended()
        for name in self._names:
            if name in cluster.instances and cluster[name].is_serving:
                continue
            if name in cluster.instances:
                await cluster[name].wait_ended()
            await cluster.launch(name, self._versions.get(name, 1))

    # --- within -----------------------------------------------------------------------------------

    async def _come_back(self, name: str) -> None:
        await anyio.sleep(self._rng.choice([0.1, 5.0, 40.0]))
        await self._start(name)
        self._taken.discard(name)

    async def _start(self, name: str) -> None:
        """Start an instance, again and again until it does."""
        while True:
            try:
                await self._cluster.launch(name, self._versions.get(name, 1))
            except StartupError as exc:
                self._tell(name, f"does not start: {exc}")
                await anyio.sleep(RESTART_S)
            else:
                return

    def _take(self) -> str | None:
        """Choose an instance whose life may be changed; one is always left."""
        free = [n for n in self._names if n not in self._taken and self._cluster[n].is_serving]
        if len(free) < 2:
            return None
        name = self._rng.choice(free)
        self._taken.add(name)
        return name


def _pod_name(version: int, number: int) -> str:
    """Answer the id that Kubernetes would give to a pod of a replica set."""
    replica_set = LETTERS[version % len(LETTERS)] * 6
    return f"{replica_set}-222{LETTERS[number // 10]}{LETTERS[number % 10]}"
