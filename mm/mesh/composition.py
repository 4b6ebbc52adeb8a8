"""What one instance is made of, and how its parts are put together (design section 7).

Owns which part is given which; of what runs beside the calls that is ``services``'. The life of the
parts, their order of start and stop, is ``node``'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mm.config import Config
from mm.core.accounting import UnloadAccounting
from mm.core.busyness import Busyness
from mm.core.cluster_state import ClusterState
from mm.core.eviction import CostEviction
from mm.core.load_times import LoadTimes
from mm.core.probation import Terms
from mm.core.records import InstanceRecord
from mm.core.sizing import CacheSizing
from mm.mesh.concurrency import CallLimits
from mm.mesh.copies import Copies
from mm.mesh.dynamic_config import DynamicConfig
from mm.mesh.first_loads import FirstLoads
from mm.mesh.janitor import Janitor
from mm.mesh.load_pusher import LoadPusher
from mm.mesh.loader import Loader
from mm.mesh.measures import Measures
from mm.mesh.members import Members
from mm.mesh.models import Models
from mm.mesh.pins import Pins
from mm.mesh.placer import Placer
from mm.mesh.policies import Policies
from mm.mesh.ports import Clock, Peers, Runtime, RuntimeParameters, Store
from mm.mesh.preloader import Preloader
from mm.mesh.readiness import Readiness
from mm.mesh.registrar import Registrar
from mm.mesh.registry import Registry
from mm.mesh.router import Router
from mm.mesh.runtime_watch import RuntimeWatch, sizing_of
from mm.mesh.sentinel import Sentinel
from mm.mesh.statistics import Counters
from mm.mesh.statuses import Statuses
from mm.mesh.vmodels import VModels
from mm.mesh.waiters import Waiters
from mm.table import Table


@dataclass(frozen=True, slots=True)
class Ports:
    """The world, as one node sees it."""

    store: Store
    runtime: Runtime
    peers: Peers
    clock: Clock
    rng: random.Random


@dataclass(frozen=True, slots=True)
class Parts:
    """All of an instance that is there from its start to its end."""

    parameters: RuntimeParameters
    counters: Counters
    measures: Measures
    busyness: Busyness
    registry: Registry
    vmodels: VModels
    dynamic: DynamicConfig
    runtime_watch: RuntimeWatch
    accounting: UnloadAccounting
    load_times: LoadTimes
    registrar: Registrar
    copies: Copies
    cluster: ClusterState
    members: Members
    pusher: LoadPusher
    sentinel: Sentinel
    loader: Loader
    waiters: Waiters
    placer: Placer
    router: Router
    policies: Policies
    pins: Pins
    models: Models
    preloader: Preloader
    janitor: Janitor
    first_loads: FirstLoads
    readiness: Readiness


def compose(
    config: Config,
    ports: Ports,
    parameters: RuntimeParameters,
    own_record: Callable[[], InstanceRecord],
) -> Parts:
    """Put the parts together; nothing runs yet. ``own_record`` is asked only once all is there."""
    counters, prefix = Counters(), prefix_of(config)
    registry = Registry(ports.store, f"{prefix}/registry/", config)
    vmodels = VModels(ports.store, f"{prefix}/vmodels/", config)
    sizing = sizing_of(parameters)
    load_times = LoadTimes(sizing.assumed_load_ms)
    registrar = Registrar(registry, config.instance_id, ports.clock)
    copies = _copies(config, ports, parameters, sizing, load_times, registrar, counters)
    cluster = _cluster(config, sizing)
    members = _members(config, ports, registry, copies, cluster, load_times)
    pusher = _pusher(config, ports, copies, members)
    first_loads = _first_loads(config, ports, parameters, registry, copies)
    sentinel = Sentinel(members, ports.peers, config)
    loader = _loader(config, ports, parameters, sizing, registrar, copies, first_loads)
    timeout_s, let_go = config.load_wait_factor * loader.load_timeout_s, copies.admission.leave
    waiters = Waiters(config, counters, wait_timeout_s=timeout_s, on_let_go=let_go)
    placer = _placer(config, ports, cluster, own_record, members, sizing, counters)
    router = Router(
        config=config,
        parameters=parameters,
        registry=registry,
        vmodels=vmodels,
        members=members,
        copies=copies,
        loader=loader,
        waiters=waiters,
        placer=placer,
        pusher=pusher,
        sentinel=sentinel,
        rng=ports.rng,
    )
    policies = _policies(config, ports, registry, members, cluster, sizing)
    copies.promises.is_promised = lambda model_id: policies.kept_count(model_id) > 0
    return Parts(
        parameters=parameters,
        counters=counters,
        measures=copies.measures,
        busyness=Busyness(),
        registry=registry,
        vmodels=vmodels,
        dynamic=DynamicConfig(ports.store, f"{prefix}/config/"),
        runtime_watch=RuntimeWatch(ports.runtime, parameters, sizing, copies, loader),
        accounting=copies.accounting,
        load_times=load_times,
        registrar=registrar,
        copies=copies,
        cluster=cluster,
        members=members,
        pusher=pusher,
        sentinel=sentinel,
        loader=loader,
        waiters=waiters,
        placer=placer,
        router=router,
        policies=policies,
        pins=Pins(registry, copies),
        models=_models(
            config, ports, registry, vmodels, members, policies, copies, router, load_times
        ),
        first_loads=first_loads,
        readiness=Readiness(members, first_loads, config),
        preloader=_preloader(config, ports, registry, members, copies, loader, placer),
        janitor=_janitor(config, ports, registry, registrar, copies, members),
    )


def prefix_of(config: Config) -> str:
    """Answer what all keys of the service begin with (spec core 1.2)."""
    return f"/{config.kv_prefix}/{config.service_name}"


def _copies(
    config: Config,
    ports: Ports,
    parameters: RuntimeParameters,
    sizing: CacheSizing,
    load_times: LoadTimes,
    registrar: Registrar,
    counters: Counters,
) -> Copies:
    accounting = UnloadAccounting(sizing.capacity_units, sizing.reserve_units)
    table = Table(accounting.table_capacity_units)
    copies = Copies(
        table=table,
        accounting=accounting,
        runtime=ports.runtime,
        registrar=registrar,
        clock=ports.clock,
        limits=config,
        counters=counters,
        measures=Measures(config.metrics.models_max(config)),
        load_times=load_times,
        by_cost=CostEviction(table.last_used, ports.rng) if config.eviction == "cost" else None,
    )
    if parameters.limit_model_concurrency:
        copies.call_limits = CallLimits(config.copy_calls_max, counters, copies.measures)
    return copies


def _first_loads(
    config: Config,
    ports: Ports,
    parameters: RuntimeParameters,
    registry: Registry,
    copies: Copies,
) -> FirstLoads:
    terms = Terms(
        me=config.instance_id,
        # From now on it could load; a runtime may take minutes to start.
        start_time_ms=ports.clock.now_ms(),
        period_ms=config.probation_ms,
        load_timeout_ms=parameters.load_timeout_ms,
    )
    return FirstLoads(
        terms,
        registry=registry,
        clock=ports.clock,
        counters=copies.counters,
        loads_in_progress=lambda: copies.loads_in_progress,
    )


def _loader(
    config: Config,
    ports: Ports,
    parameters: RuntimeParameters,
    sizing: CacheSizing,
    registrar: Registrar,
    copies: Copies,
    first_loads: FirstLoads,
) -> Loader:
    return Loader(
        copies=copies,
        registrar=registrar,
        runtime=ports.runtime,
        parameters=parameters,
        sizing=sizing,
        config=config,
        first_loads=first_loads,
    )


def _cluster(config: Config, sizing: CacheSizing) -> ClusterState:
    return ClusterState(
        config.instance_id,
        config.labels,
        min_space_units=sizing.min_space_units,
        saturated_age_ms=sizing.saturated_age_ms,
        constraints=config.type_constraints,
    )


def _members(
    config: Config,
    ports: Ports,
    registry: Registry,
    copies: Copies,
    cluster: ClusterState,
    load_times: LoadTimes,
) -> Members:
    return Members(
        ports.store,
        f"{prefix_of(config)}/instances/",
        me=config.instance_id,
        table=copies.table,
        registry=registry,
        cluster=cluster,
        clock=ports.clock,
        assumed_load_ms=load_times.assumed_ms,
    )


def _pusher(config: Config, ports: Ports, copies: Copies, members: Members) -> LoadPusher:
    return LoadPusher(
        me=config.instance_id,
        table=copies.table,
        members=members,
        peers=ports.peers,
        limits=config,
        counters=copies.counters,
    )


def _placer(
    config: Config,
    ports: Ports,
    cluster: ClusterState,
    own_record: Callable[[], InstanceRecord],
    members: Members,
    sizing: CacheSizing,
    counters: Counters,
) -> Placer:
    return Placer(
        me=config.instance_id,
        cluster=cluster,
        own_record=own_record,
        members=members,
        failure_rules=config.failure_rules,
        default_units=sizing.default_units,
        counters=counters,
        rng=ports.rng,
    )


def _policies(
    config: Config,
    ports: Ports,
    registry: Registry,
    members: Members,
    cluster: ClusterState,
    sizing: CacheSizing,
) -> Policies:
    return Policies(
        config=config,
        registry=registry,
        members=members,
        cluster=cluster,
        clock=ports.clock,
        default_units=sizing.default_units,
    )


def _models(
    config: Config,
    ports: Ports,
    registry: Registry,
    vmodels: VModels,
    members: Members,
    policies: Policies,
    copies: Copies,
    router: Router,
    load_times: LoadTimes,
) -> Models:
    statuses = Statuses(
        config=config,
        members=members,
        copies=copies,
        peers=ports.peers,
        clock=ports.clock,
        load_times=load_times,
    )
    return Models(
        config=config,
        registry=registry,
        vmodels=vmodels,
        statuses=statuses,
        policies=policies,
        copies=copies,
        router=router,
        peers=ports.peers,
        clock=ports.clock,
    )


def _preloader(
    config: Config,
    ports: Ports,
    registry: Registry,
    members: Members,
    copies: Copies,
    loader: Loader,
    placer: Placer,
) -> Preloader:
    return Preloader(
        config=config,
        registry=registry,
        members=members,
        copies=copies,
        loader=loader,
        placer=placer,
        peers=ports.peers,
    )


def _janitor(
    config: Config,
    ports: Ports,
    registry: Registry,
    registrar: Registrar,
    copies: Copies,
    members: Members,
) -> Janitor:
    return Janitor(
        config=config,
        registry=registry,
        registrar=registrar,
        copies=copies,
        members=members,
        peers=ports.peers,
        rng=ports.rng,
    )
