"""What runs beside the calls, once an instance has a session, and how it is put together.

Owns which of it is given which part of ``composition``. Its life is ``node``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from mm.config import Config
from mm.core.dynamic_settings import LOG_EACH, RPM_THRESHOLD, Value
from mm.core.records import InstanceRecord
from mm.mesh.composition import Parts, Ports, prefix_of
from mm.mesh.drain import Drain
from mm.mesh.filler import Filler
from mm.mesh.keeper import Keeper
from mm.mesh.leader import Leader
from mm.mesh.ports import Session
from mm.mesh.publisher import Publisher
from mm.mesh.reaper import Reaper
from mm.mesh.reference_counts import ReferenceCounts
from mm.mesh.restorer import Restorer
from mm.mesh.scaler import Scaler, compose_scaler
from mm.mesh.trials import Trials


@dataclass(frozen=True, slots=True)
class Services:
    """What runs beside the calls, once the instance has a session."""

    publisher: Publisher
    drain: Drain
    scaler: Scaler
    leader: Leader
    #: Each is run until the instance stops, in a task of its own.
    tasks: tuple[Callable[[], Coroutine[Any, Any, None]], ...]


def compose_services(
    config: Config,
    ports: Ports,
    parts: Parts,
    session: Session,
    own_record: Callable[[], InstanceRecord],
) -> Services:
    """Put together what needs the session; nothing runs yet."""
    publisher = Publisher(
        store=ports.store,
        session=session,
        members=parts.members,
        copies=parts.copies,
        limits=config,
        own_record=own_record,
    )
    leader = Leader(
        store=ports.store,
        prefix=f"{prefix_of(config)}/leaderLatch/",
        me=config.instance_id,
        session=session,
    )
    reaper = Reaper(
        config=config,
        registry=parts.registry,
        members=parts.members,
        leader=leader,
        clock=ports.clock,
    )
    restorer = Restorer(
        (parts.vmodels.mirror, parts.registry.mirror, parts.dynamic.mirror),
        parts.members,
        limits=config,
        counters=parts.counters,
    )
    trials = Trials(
        first_loads=parts.first_loads, loader=parts.loader, registry=parts.registry, config=config
    )
    drain = _drain(config, ports, parts)
    scaler = compose_scaler(config, ports.peers, parts, own_record)
    filler = _filler(config, ports, parts, leader)
    _follow_settings(config, parts, scaler)
    return Services(
        publisher=publisher,
        drain=drain,
        scaler=scaler,
        leader=leader,
        tasks=(
            restorer.run,
            parts.waiters.run,
            publisher.run,
            parts.runtime_watch.run,
            parts.registrar.run,
            parts.pusher.run,
            parts.sentinel.run,
            scaler.run,
            leader.run,
            parts.janitor.run,
            reaper.run,
            _reference_counts(config, ports, parts, leader).run,
            filler.run,
            _keeper(config, ports, parts, leader).run,
            parts.pins.run,
            parts.readiness.run,
            trials.run,
        ),
    )


def _reference_counts(
    config: Config, ports: Ports, parts: Parts, leader: Leader
) -> ReferenceCounts:
    return ReferenceCounts(
        config=config,
        store=ports.store,
        registry=parts.registry,
        vmodels=parts.vmodels,
        leader=leader,
        counters=parts.counters,
    )


def _drain(config: Config, ports: Ports, parts: Parts) -> Drain:
    return Drain(
        config=config,
        registry=parts.registry,
        registrar=parts.registrar,
        copies=parts.copies,
        members=parts.members,
        preloader=parts.preloader,
        store=ports.store,
        policies=parts.policies,
    )


def _follow_settings(config: Config, parts: Parts, scaler: Scaler) -> None:
    """Let the store override what the environment says."""

    def set_rpm(value: Value | None) -> None:
        scaler.set_rpm_threshold(config.scaling.rpm_threshold if value is None else int(value))

    def set_log_each(value: Value | None) -> None:
        parts.router.logs_each_call = config.logs.each_invoke if value is None else bool(value)

    parts.dynamic.follow(RPM_THRESHOLD, set_rpm)
    parts.dynamic.follow(LOG_EACH, set_log_each)


def _keeper(config: Config, ports: Ports, parts: Parts, leader: Leader) -> Keeper:
    return Keeper(
        config=config,
        registry=parts.registry,
        members=parts.members,
        leader=leader,
        policies=parts.policies,
        preloader=parts.preloader,
        clock=ports.clock,
    )


def _filler(config: Config, ports: Ports, parts: Parts, leader: Leader) -> Filler:
    now_ms, view = ports.clock.now_ms, parts.placer.view
    return Filler(
        config, parts.registry, parts.members, leader, parts.preloader, lambda: view(now_ms())
    )
