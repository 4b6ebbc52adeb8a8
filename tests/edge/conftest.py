"""Fixtures that need the outside world: one etcd for all tests of this layer that want one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm.edge.etcd_process import EtcdProcess, find_binary


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[EtcdProcess]:
    """A running etcd. Tests share it: each keeps to a root prefix of its own and leaves it up."""
    with tempfile.TemporaryDirectory(prefix="mm-test-etcd-") as directory:
        etcd = EtcdProcess(find_binary(), Path(directory))
        try:
            etcd.start()
            yield etcd
        finally:
            etcd.stop()
