"""Opens the store that ``KV_STORE`` names (around 4.1), for as long as an instance runs.

What each of them is, is its own module's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread

from mm.config import Config
from mm.edge.embedded_etcd import embedded_etcd
from mm.edge.etcd_secret import EtcdSecret
from mm.edge.etcd_store import EtcdStore
from mm.edge.kv_config import Embedded, EtcdTarget, Memory, parse, secret_path
from mm.edge.memory_store import MemoryStore
from mm.mesh.ports import Store

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_store(config: Config) -> AsyncIterator[Store]:
    """Open what ``KV_STORE`` names."""
    path = await anyio.to_thread.run_sync(secret_path, config.kv_store)
    if path is not None:
        secret = EtcdSecret(path)
        target = await anyio.to_thread.run_sync(secret.read)
        async with _etcd_store(target, config) as store, secret.followed(store.exchange):
            yield store
        return
    match parse(config.kv_store):
        case Memory():
            logger.info("KV_STORE=memory: the registry lives and dies with this process")
            yield MemoryStore()
        case Embedded():
            logger.info("KV_STORE=embedded: an etcd of its own for this one instance, not kept")
            async with embedded_etcd() as etcd, _etcd_store(etcd.target, config) as store:
                yield store
        case EtcdTarget() as target:
            async with _etcd_store(target, config) as store:
                yield store


def _etcd_store(target: EtcdTarget, config: Config) -> EtcdStore:
    return EtcdStore(target, timeout_s=config.store_timeout_s, silence_s=config.store_silence_max_s)
