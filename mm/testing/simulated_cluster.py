"""A cluster under simulation: stores, clocks, wires and runtimes that can go wrong, and a log.

Owns what each instance gets beside it, and that everything it does is told to the ``EventLog``.
What goes wrong when is ``faults``' affair.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import anyio
import msgspec
from anyio.abc import TaskGroup

from mm.config import Config
from mm.core.ids import ModelId
from mm.edge.memory_store import MemoryStore
from mm.mesh.ports import RuntimeParameters, Write
from mm.testing.cluster import PREFIX, Cluster
from mm.testing.event_log import EventLog
from mm.testing.fake_clock import FakeClock
from mm.testing.fake_runtime import MIB, FakeRuntime
from mm.testing.instance import Instance
from mm.testing.simulated_store import SimulatedStore

#: Clocks of one cluster are wrong by as much.
SKEW_MS_MAX: Final = 10_000
#: The longest that a healthy wire takes for one message.
WAY_S_MAX: Final = 0.01
#: So does the way to a healthy store, and that of its events.
STORE_WAY_S_MAX: Final = 0.01

#: The share of an instance's copies that somebody takes out who thinks that it is gone.
TAKEN_OUT_SHARE: Final = 0.7

_here: ContextVar[str] = ContextVar("here", default="")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What one model is like, in every runtime."""

    size_bytes: int
    predicted_bytes: int
    load_s: float
    unload_s: float
    is_size_told: bool


class SimulatedCluster(Cluster):
    """Instances whose world is made from one seed."""

    def __init__(
        self,
        group: TaskGroup,
        *,
        seed: int,
        log: EventLog,
        shapes: dict[str, ModelShape],
        parameters: RuntimeParameters,
        skew_ms_max: int,
        limits: dict[str, Any],
    ) -> None:
        super().__init__(group, seed=seed, parameters=parameters, **limits)
        self.log = log
        self.rng = random.Random(f"cluster {seed}")
        self.call_s = self.rng.choice([0, 0.02, 0.2])
        self.way_s_max = WAY_S_MAX
        #: Wires that break under this share of their messages.
        self.loss_share: dict[tuple[str, str], float] = {}
        self.network.delay_s = self._way_s
        self.network.loses = self._loses
        self._shapes = shapes
        self._skew_ms_max = skew_ms_max
        self._starts: Counter[str] = Counter()
        #: The revision at which a model was registered, and when that was.
        self._registered: dict[str, tuple[int, float]] = {}

    def times_s(self, model_id: str) -> tuple[float, float]:
        """Answer how long a load and an unload of a model take when all is well."""
        shape = self._shapes[model_id]
        return shape.load_s, shape.unload_s

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Say in the log that what happens inside, or in tasks begun there, is at ``name``."""
        token = _here.set(name)
        try:
            yield
        finally:
            _here.reset(token)

    async def launch(self, name: str, version: int = 1) -> Instance:
        """Start an instance, or start it again; raises ``StartupError``."""
        self._starts[name] += 1
        self.log.tell(name, "", f"starts for the {self._starts[name]}. time")
        with self.at(name):
            return await self.start(name, is_known_by_all=False, version=version)

    def tell(self, name: str, model_id: str, text: str) -> None:
        """Note what the data plane of an instance does."""
        self.log.tell(name, model_id, text)

    def revision_registered(self, model_id: str) -> int:
        """Answer the revision at which a model was registered; 0 if it is not."""
        item = self.server.get(f"{PREFIX}/registry/{model_id}")
        return 0 if item is None else item.create_revision

    def registered_s(self, model_id: str) -> float:
        """Answer when the present registration of a model was made."""
        return self._registered[model_id][1]

    def take_out_copies(self, name: str, rng: random.Random) -> int:
        """Take copies of an instance out of their records, as another one does that has not heard
        of it for long; answers how many.

        A Java instance is the hardest: it leaves alone what ours say of the copy beside that.
        """
        taken: list[str] = []
        if self.server.is_full:
            return 0
        for item in self.server.table(f"{PREFIX}/registry/").items:
            record = msgspec.json.decode(item.value, type=dict[str, Any])
            if name in record.get("instanceIds", {}) and rng.random() < TAKEN_OUT_SHARE:
                del record["instanceIds"][name]
                write = Write(item.key, msgspec.json.encode(record), item.mod_revision)
                self.server.transact([write])
                taken.append(item.key.rpartition("/")[2])
        for model_id in taken:
            self.log.tell("", model_id, f"registry: the copy of {name} is taken out")
        return len(taken)

    # --- what is beside an instance -------------------------------------------------------------

    def make_store(self, config: Config) -> MemoryStore:
        """Answer a store that can go wrong."""
        name = str(config.instance_id)

        def tell(key: str, text: str) -> None:
            table, _, key_id = key.removeprefix(f"{PREFIX}/").partition("/")
            if table == "registry":
                revision = self.revision_registered(key_id)
                if self._registered.get(key_id, (0, 0.0))[0] != revision:
                    self._registered[key_id] = (revision, anyio.current_time())
                self.log.tell(name, key_id, f"registry: {text}")
            else:
                self.log.tell(name, "", f"{table}/{key_id}: {text}")

        rng = random.Random(f"store {self.seed} {name} {self._starts[name]}")
        store = SimulatedStore(self.server, rng, tell, timeout_s=config.store_timeout_s)
        store.way_s_max = store.late_s_max = STORE_WAY_S_MAX
        return store

    def make_clock(self, config: Config) -> FakeClock:
        """Answer a clock that is wrong."""
        return FakeClock(self.rng.randint(-self._skew_ms_max, self._skew_ms_max))

    def make_runtime(self, config: Config) -> FakeRuntime:
        """Answer a runtime that knows the models and tells what it does."""
        name = str(config.instance_id)
        runtime = FakeRuntime(self.parameters)
        for model_id, shape in self._shapes.items():
            runtime.plan(
                model_id,
                size_bytes=shape.size_bytes,
                predicted_bytes=shape.predicted_bytes,
                load_s=shape.load_s,
                unload_s=shape.unload_s,
                is_size_told=shape.is_size_told,
            )

        def tell(model_id: ModelId, text: str) -> None:
            held = f"{runtime.memory_bytes / MIB:g} of {self.parameters.capacity_bytes / MIB:g} MiB"
            self.log.tell(name, model_id, f"runtime: {text} ({held})")
            if text == "unload begins" and runtime.calls[model_id]:
                # They are shorter than any wait for them.
                runtime.violated(model_id, f"unload of {model_id} under calls")

        runtime.tell = tell
        return runtime

    # --- wires ----------------------------------------------------------------------------------

    def _way_s(self, source: str, target: str) -> float:
        return self.rng.uniform(0, self.way_s_max)

    def _loses(self, source: str, target: str) -> bool:
        share = self.loss_share.get((source, target), 0.0)
        if not share or self.rng.random() >= share:
            return False
        self.log.tell(_name_at(source), "", f"the connection to {_name_at(target)} breaks")
        return True


def _name_at(address: str) -> str:
    return address.partition(":")[0]


class _LogHandler(logging.Handler):
    def __init__(self, log: EventLog) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.tell(_here.get(), "", f"log: {record.getMessage()}")


@contextmanager
def logging_to(log: EventLog) -> Iterator[None]:
    """Put what mm logs among the events, and nowhere else."""
    logger = logging.getLogger("mm")
    handler = _LogHandler(log)
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
