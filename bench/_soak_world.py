"""Three instances for ``bench/soak.py``, what goes wrong with them, and what it leaves behind.

Owns the processes and their figures: resident memory and descriptors. What came of the calls is in
``soak.py``, whether memory grows in ``_soak_judge.py``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from _contenders import free_port, wait_listening
from _instance import Instance

from mm.edge.embedded_etcd import EmbeddedEtcd, embedded_etcd
from mm.pb import mmesh

#: Room for this many models of an instance: those that are called now and then are loaded anew.
ROOM_MODELS = 12
MODELS, VMODELS = 60, 6
SIZE_BYTES = 1_000_000
INSTANCES = 3


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What descriptors a process holds."""

    #: All, and those of connections among the processes of the mesh, which stay open
    #: for the next call.
    fds: int
    pooled: int

    @property
    def others(self) -> int:
        """Descriptors that have to be as many as before."""
        return self.fds - self.pooled


class Place:
    """One instance with its runtime: the example runtime manages models, ``soaked`` serves."""

    def __init__(self, number: int, etcd: EmbeddedEtcd, directory: Path, counts: Path) -> None:
        own = directory / str(number)
        own.mkdir()
        self._soaked_command = [str(directory / "soaked"), str(free_port()), str(counts)]
        options = ("--default-size", str(SIZE_BYTES), "--capacity", str(ROOM_MODELS * SIZE_BYTES))
        self.instance = Instance(
            etcd,
            own,
            runtime_options=options,
            settings={
                "MM_INSTANCE_ID": f"soak-{number}",
                "MM_DATAPLANE": "wire",
                "INTERNAL_SERVING_GRPC_PORT": self._soaked_command[1],
            },
        )
        self.number = number
        self.soaked: asyncio.subprocess.Process | None = None
        #: Names of processes that were started anew since the last look.
        self.renewed: set[str] = set()

    @property
    def port(self) -> int:
        """Where clients call."""
        return int(self.instance.address.rpartition(":")[2])

    async def start(self) -> None:
        """Start all three processes."""
        await self.start_runtime()
        await self.instance.start_serve()

    async def start_runtime(self) -> None:
        """Start the two processes of the runtime."""
        self.soaked = await asyncio.create_subprocess_exec(*self._soaked_command)
        await asyncio.to_thread(wait_listening, int(self._soaked_command[1]))
        await self.instance.runtime.start()

    async def kill_runtime(self) -> None:
        """The runtime is gone, with all that it was doing."""
        assert self.soaked is not None
        self.soaked.kill()
        self.instance.runtime.kill()
        await self.soaked.wait()
        await self.instance.runtime.reap()

    async def stop(self) -> None:
        """End all of it."""
        await self.instance.channel.close()
        self.instance.serve.kill()
        await self.instance.serve.reap()
        if self.soaked is not None:
            await self.kill_runtime()

    # --- faults ---------------------------------------------------------------------------------

    async def die(self) -> str:
        """The instance is killed, and comes back."""
        self._check_alive()
        await self.instance.channel.close()
        self.instance.serve.kill()
        await self.instance.serve.reap()
        await self.instance.start_serve()
        self.renewed.add("mm serve")
        return f"killed and restarted instance {self.number}"

    async def lose_runtime(self) -> str:
        """The runtime is killed, and comes back."""
        await self.kill_runtime()
        await self.start_runtime()
        self.renewed |= {"runtime", "soaked"}
        return f"killed and restarted the runtime of instance {self.number}"

    def _check_alive(self) -> None:
        """Exit if what nobody killed is gone."""
        if self.instance.serve.has_ended:
            raise SystemExit(f"mm serve {self.number} has ended by itself")

    # --- figures --------------------------------------------------------------------------------

    def pids(self) -> dict[str, int]:
        """Answer the ids of the processes; 0 for one that is being started anew."""
        assert self.soaked is not None
        return {
            "mm serve": self.instance.serve.pid,
            "runtime": self.instance.runtime.pid,
            "soaked": self.soaked.pid,
        }

    def descriptors(self) -> dict[str, Descriptors]:
        """Answer what each process holds now, when no fault is under way."""
        self._check_alive()
        return {name: _descriptors_of(pid) for name, pid in self.pids().items()}


def rss_kib_of(pid: int) -> int | None:
    """Answer the resident memory of a process that is its own; None if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # One that has just ended has none.
    rss = next((line for line in status.splitlines() if line.startswith("RssAnon")), None)
    return None if rss is None else int(rss.split()[1])


def _descriptors_of(pid: int) -> Descriptors:
    established = _established()
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(fd))
        except FileNotFoundError:
            continue
    pooled = sum(link in established for link in links)
    return Descriptors(len(links), pooled)


def _established() -> set[str]:
    """Answer the sockets of connections that are open, as links to descriptors name them."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "01":
                found.add(f"socket:[{fields[9]}]")
    return found


@asynccontextmanager
async def world_of(directory: Path, counts: Path) -> AsyncIterator[list[Place]]:
    """Three instances that serve, with models and vmodels registered."""
    async with embedded_etcd() as etcd:
        places = [Place(number, etcd, directory, counts) for number in range(INSTANCES)]
        try:
            await asyncio.gather(*(place.start() for place in places))
            first = places[0].instance
            for number in range(MODELS):
                await first.register(f"model-{number:04}", f"SIZE_{SIZE_BYTES}_20_0")
            await move_vmodels(first, 0)
            yield places
        finally:
            for place in places:
                await place.stop()


async def move_vmodels(instance: Instance, turn: int) -> str:
    """Turn each vmodel to the next model. Raises ``AioRpcError``."""
    for number in range(VMODELS):
        model_id = f"model-{(turn * VMODELS + number) % MODELS:04}"
        request = mmesh.SetVModelRequest(
            v_model_id=f"vmodel-{number:04}", target_model_id=model_id, sync=True
        )
        await instance.call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)
    return f"moved {VMODELS} vmodels"
