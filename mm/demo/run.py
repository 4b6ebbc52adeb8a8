"""The order of the demo: train, start, register, call, kill, start again, judge, stop."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio
from anyio import to_process
from grpclib.client import Channel
from grpclib.exceptions import GRPCError

from mm.demo.capacity import Capacity, capacity
from mm.demo.cluster import Cluster, make_instances, running
from mm.demo.directory import PrivateDirectory, private_directory
from mm.demo.limits import EVICTIONS_MIN
from mm.demo.paste import sheet
from mm.demo.processes import DemoError
from mm.demo.statistics import Statistics
from mm.demo.summary import Outage, Outcome, problems, table, verdict_lines
from mm.demo.tally import Tally
from mm.demo.traffic import Roster, Traffic
from mm.demo.training import TrainedModel, train
from mm.demo.view import View
from mm.demo.zoo import MIB, zoo
from mm.edge.embedded_etcd import embedded_etcd
from mm.edge.etcd_process import find_binary
from mm.pb.mmesh import ModelInfo, ModelMeshStub, RegisterModelRequest

if TYPE_CHECKING:
    from rich.console import Console

#: What all clients together aim at; what two slow cores can do beside loading models.
CALLS_PER_S: Final = 50.0
CLIENTS_PER_INSTANCE: Final = 3

#: Registrations in flight.
_REGISTRATIONS_MAX: Final = 32
_REGISTER_TIMEOUT_S: Final = 30.0

#: How long the traffic may go on beyond what was asked for, if models are not replaced fast enough
#: or the instance that is back has not answered yet.
_EXTRA_S_MAX: Final = 60.0

_POLL_S: Final = 0.1

#: A Ctrl-C that a worker has heard reaches the demo itself within this time.
_INTERRUPT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. ``evictions_min`` is for short runs in tests."""

    traffic_s: float = 30.0
    model_count: int = 60
    instance_count: int = 3
    seed: int = 1
    is_plain: bool = False
    keeps_running: bool = False
    evictions_min: int = EVICTIONS_MIN


async def run_demo(options: Options, console: Console) -> int:
    """Run the whole demo; answers the exit code. Raises ``DemoError`` if it cannot go on."""
    _require_programs()
    demo = _Demo(options, console)
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with anyio.create_task_group() as tasks:
            # The receiver stays in place while everything is taken down: a second Ctrl-C must not
            # interrupt that.
            scope = anyio.CancelScope()

            async def stop_on_signal() -> None:
                async for number in signals:
                    demo.stop(number)
                    scope.cancel()

            tasks.start_soon(stop_on_signal)
            with scope:
                await demo.run()
            tasks.cancel_scope.cancel()
    return demo.exit_code


class _Demo:
    """One run, and what it knows so far."""

    def __init__(self, options: Options, console: Console) -> None:
        self.stopped_by: signal.Signals | None = None
        self._options = options
        self._console = console
        self._view = View(console, options.is_plain)
        self._rng = random.Random(options.seed)
        self._tally = Tally()
        self._outage: Outage | None = None
        self._verdict: int | None = None

    @property
    def exit_code(self) -> int:
        """The verdict if there is one, else what stopped it."""
        if self._verdict is not None:
            return self._verdict
        assert self.stopped_by is not None
        return 128 + self.stopped_by

    def stop(self, number: signal.Signals) -> None:
        """Note the signal that ends the run, and say that what was started is taken down."""
        if self.stopped_by is None:
            self.stopped_by = number
            self._view.say("stopping everything ...")

    async def run(self) -> None:
        started_s = anyio.current_time()
        options = self._options
        with private_directory() as directory:
            try:
                models = await self._train(directory)
                memory = capacity([model.size_bytes for model in models], options.instance_count)
                async with AsyncExitStack() as stack:
                    cluster = await self._start(stack, directory, memory)
                    await self._register(cluster, models)
                    outcome = await self._traffic(cluster, models, memory, started_s)
                    self._conclude(outcome, directory)
                    if options.keeps_running:
                        await self._keep(cluster, models)
            except Exception:
                directory.keep_logs()
                raise

    async def _train(self, directory: PrivateDirectory) -> tuple[TrainedModel, ...]:
        specs = zoo(self._options.model_count, self._options.seed)
        limiter = anyio.CapacityLimiter(os.cpu_count() or 2)
        trained: dict[str, TrainedModel] = {}
        with self._view.step(f"training {len(specs)} models", len(specs)) as progress:
            async with anyio.create_task_group() as trainers:

                async def train_one(index: int) -> None:
                    try:
                        model = await to_process.run_sync(
                            train,
                            specs[index],
                            str(directory.models),
                            cancellable=True,
                            limiter=limiter,
                        )
                    except KeyboardInterrupt:
                        # Ctrl-C in a terminal goes to the workers, too. It ends the demo in order,
                        # which this would forestall.
                        await anyio.sleep(_INTERRUPT_S)
                        raise DemoError("the training was interrupted") from None
                    trained[model.model_id] = model
                    progress(len(trained))

                for index in range(len(specs)):
                    trainers.start_soon(train_one, index)
        models = tuple(trained[spec.model_id] for spec in specs)
        sizes = [model.size_bytes / MIB for model in models]
        self._view.say(
            f"trained {len(models)} models of scikit-learn: {min(sizes):.1f} to {max(sizes):.1f} "
            f"MiB each, {sum(sizes):.0f} MiB together"
        )
        return models

    async def _start(
        self, stack: AsyncExitStack, directory: PrivateDirectory, memory: Capacity
    ) -> Cluster:
        count = self._options.instance_count
        etcd = await stack.enter_async_context(embedded_etcd())
        instances = make_instances(
            count,
            kv_store=f"etcd:{etcd.endpoint}",
            capacity_bytes=memory.bytes_each,
            models=directory.models,
            directory=directory.path,
        )
        with self._view.step(f"starting etcd and {count} instances", count):
            cluster = await stack.enter_async_context(running(instances))
        self._view.say(
            f"started etcd and {count} instances with {memory.bytes_each / MIB:.1f} MiB each: "
            f"together {memory.share:.0%} of what the models need"
        )
        return cluster

    async def _register(self, cluster: Cluster, models: Sequence[TrainedModel]) -> None:
        target = cluster.targets[0]
        limiter = anyio.CapacityLimiter(_REGISTRATIONS_MAX)
        channel = Channel(target.host, target.port)
        stub = ModelMeshStub(channel)

        async def register(model: TrainedModel) -> None:
            info = ModelInfo(type="sklearn", path=model.file)
            request = RegisterModelRequest(model_id=model.model_id, model_info=info)
            async with limiter:
                try:
                    await stub.register_model(request, timeout=_REGISTER_TIMEOUT_S)
                except (GRPCError, OSError) as exc:
                    raise DemoError(f"cannot register {model.model_id}: {exc}") from exc

        try:
            async with anyio.create_task_group() as tasks:
                for model in models:
                    tasks.start_soon(register, model)
        finally:
            channel.close()
        self._view.say(f"registered {len(models)} models through {target.name}")

    async def _traffic(
        self,
        cluster: Cluster,
        models: Sequence[TrainedModel],
        memory: Capacity,
        started_s: float,
    ) -> Outcome:
        options = self._options
        statistics = Statistics(cluster.instances)
        roster = Roster(cluster.targets)
        traffic = Traffic(
            roster,
            models,
            self._tally,
            calls_per_s=CALLS_PER_S,
            client_count=CLIENTS_PER_INSTANCE * options.instance_count,
            seed=options.seed,
        )
        traffic_started_s = anyio.current_time()
        async with anyio.create_task_group() as helpers:
            for helper in (cluster.watch, statistics.run):
                helpers.start_soon(helper)
            helpers.start_soon(self._view.follow, self._tally, statistics)
            async with anyio.create_task_group() as clients:
                clients.start_soon(traffic.run)
                await self._act(cluster, roster, statistics)
                traffic.stop()
            await statistics.poll()
            helpers.cancel_scope.cancel()
        return Outcome(
            tally=self._tally,
            readings=statistics.readings,
            outage=self._outage,
            model_count=len(models),
            model_bytes=sum(model.size_bytes for model in models),
            instance_count=options.instance_count,
            capacity_bytes=memory.bytes_each,
            traffic_s=anyio.current_time() - traffic_started_s,
            total_s=anyio.current_time() - started_s,
            evictions_min=options.evictions_min,
        )

    async def _act(self, cluster: Cluster, roster: Roster, statistics: Statistics) -> None:
        """Let the traffic run, with a kill half-way."""
        traffic_s = self._options.traffic_s
        started_s = anyio.current_time()
        await anyio.sleep(traffic_s / 2)
        victim = self._rng.choice(cluster.instances)
        # Its counters go with it: read them at the last moment.
        await statistics.poll()
        victim.kill()
        roster.killed(victim.name)
        killed_s = anyio.current_time() - started_s
        self._outage = Outage(victim.name, killed_s)
        self._view.say(f"killed {victim.name} (SIGKILL to mm serve and its runtime)")
        await victim.reap()
        await anyio.sleep(traffic_s / 10)
        self._view.say(f"starting {victim.name} again, under the same id")
        await victim.start()
        roster.back(victim.name)
        back_s = anyio.current_time() - started_s
        self._view.say(f"{victim.name} serves again")
        answered_before = self._tally.answered_by[victim.name]
        await anyio.sleep(max(traffic_s - back_s, traffic_s / 4))
        wanted = self._options.evictions_min
        with anyio.move_on_after(_EXTRA_S_MAX):
            await self._go_on_until(
                f"there are {wanted} evictions", lambda: statistics.total.evictions >= wanted
            )
            # On a slow machine its first answer can take longer than a short demo.
            await self._go_on_until(
                f"{victim.name} has answered",
                lambda: self._tally.answered_by[victim.name] > answered_before,
            )
        self._outage = Outage(
            victim.name,
            killed_s,
            back_s,
            self._tally.answered_by[victim.name] - answered_before,
        )

    async def _go_on_until(self, what: str, holds: Callable[[], bool]) -> None:
        if holds():
            return
        self._view.say(f"going on until {what}")
        while not holds():  # noqa: ASYNC110 - polled counters
            await anyio.sleep(_POLL_S)

    def _conclude(self, outcome: Outcome, directory: PrivateDirectory) -> None:
        self._console.print(table(outcome))
        for line in verdict_lines(outcome):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._verdict = 1 if problems(outcome) else 0
        if self._verdict:
            directory.keep_logs()
            self._console.print(
                f"The logs are in {directory.path}", markup=False, highlight=False, soft_wrap=True
            )

    async def _keep(self, cluster: Cluster, models: tuple[TrainedModel, ...]) -> None:
        self._console.print(
            "\nEverything stays up until Ctrl-C. Calls to paste:\n\n"
            f"{sheet(cluster.targets[0], models)}\n",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        await cluster.watch()


def _require_programs() -> None:
    """Raise an error for what is not installed before anything takes time."""
    missing = [
        package
        for package, module in (("scikit-learn", "sklearn"), ("joblib", "joblib"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise DemoError(
            f"mm demo needs {' and '.join(missing)}: install them with `pip install 'mm[demo]'`"
        )
    find_binary()
