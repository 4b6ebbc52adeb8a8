"""Fixtures of the pods: one etcd, and three pods with different runtimes in front of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from mm.edge.embedded_etcd import EmbeddedEtcd
from tests.pod.pods import Cluster
from tests.pod.tables import MLSERVER, TORCHSERVE, TRITON
from tests.system.conftest import etcd, keys
from tests.system.etcd import Keys

__all__ = ["etcd", "keys"]

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def new_cluster(etcd: EmbeddedEtcd, keys: Keys) -> Iterator[Callable[[], Cluster]]:
    """Answer clusters without pods, each with a root prefix of its own."""
    clusters: list[Cluster] = []

    def made() -> Cluster:
        clusters.append(Cluster(str(etcd.endpoint), keys, next(_numbers)))
        return clusters[-1]

    yield made
    for cluster in clusters:
        cluster.close()


@pytest.fixture(scope="session")
def cluster(new_cluster: Callable[[], Cluster]) -> Cluster:
    """Three pods, each of another runtime; the last is reached by ports."""
    cluster = new_cluster()
    cluster.runtimes = [MLSERVER, TRITON, TORCHSERVE]
    for runtime in cluster.runtimes:
        cluster.add(runtime, by_port=runtime is TORCHSERVE)
    cluster.wait_ready()
    return cluster
