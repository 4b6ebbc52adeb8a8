"""An etcd of our own for development: ``KV_STORE=embedded``, ``mm demo`` and the tests.

Owns its private directory and the thread in which ``mm.edge.etcd_process`` may block. It dies with
its owner; what killed owners left on disk is removed by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio

from mm.edge.etcd_process import START_TIMEOUT_S, STOP_TIMEOUT_S, EtcdProcess, find_binary
from mm.edge.kv_config import Endpoint, EtcdTarget

logger = logging.getLogger(__name__)

_DIRECTORY_PREFIX: Final = "mm-etcd-"
_LOCK_NAME: Final = "owner.lock"


class EmbeddedEtcd:
    """A running etcd. Made by ``embedded_etcd``.

    ``stop`` and ``start`` again keep data and port; ``pause`` and ``resume`` freeze it with its
    connections open.
    """

    def __init__(self, process: EtcdProcess, executor: ThreadPoolExecutor) -> None:
        self._process = process
        self._executor = executor

    @property
    def endpoint(self) -> Endpoint:
        """Where clients connect."""
        return self._process.endpoint

    @property
    def target(self) -> EtcdTarget:
        """The same as what ``KV_STORE`` means."""
        return self._process.target

    @property
    def pid(self) -> int:
        """The process id; 0 while stopped."""
        return self._process.pid

    async def start(self) -> None:
        """Start it again; ``StartupError`` tells its last words if it does not serve."""
        await self._run(self._process.start)

    async def stop(self) -> None:
        """End it in order."""
        await self._run(self._process.stop)

    async def kill(self) -> None:
        """End it at once, as a crash does."""
        await self._run(self._process.kill)

    async def wipe(self) -> None:
        """Forget all data, as if the disk were new; only while stopped."""
        await self._run(self._process.wipe)

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self._process.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._process.resume()

    async def _run(self, step: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, step)


@asynccontextmanager
async def embedded_etcd(extra_args: Sequence[str] = ()) -> AsyncIterator[EmbeddedEtcd]:
    """Run an etcd until the block ends; its directory is removed then."""
    loop = asyncio.get_running_loop()
    # A thread of its own, not one of a pool: the kernel ends etcd with the thread that started it.
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mm-embedded-etcd")
    try:
        # Cancelled half-way it would leave a directory behind that nobody knows of.
        with anyio.fail_after(START_TIMEOUT_S, shield=True):
            owned = await loop.run_in_executor(executor, _Owned, extra_args)
        try:
            await loop.run_in_executor(executor, owned.process.start)
            etcd = EmbeddedEtcd(owned.process, executor)
            logger.info("embedded etcd (process %d) serves at %s", etcd.pid, etcd.endpoint)
            yield etcd
        finally:
            owned.process.close()
            with anyio.move_on_after(START_TIMEOUT_S + STOP_TIMEOUT_S, shield=True):
                await loop.run_in_executor(executor, owned.close)
    finally:
        executor.shutdown(wait=False)  # idle by now, so the thread ends at once


class _Owned:
    """The process with its directory and the lock that marks it as in use."""

    def __init__(self, extra_args: Sequence[str]) -> None:
        binary = find_binary()
        _sweep()
        self._directory = Path(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX))
        self._lock_fd = _lock(self._directory)
        self.process = EtcdProcess(binary, self._directory, extra_args, self._lock_fd)

    def close(self) -> None:
        self.process.stop()
        os.close(self._lock_fd)
        shutil.rmtree(self._directory, ignore_errors=True)


def _lock(directory: Path) -> int:
    """Mark the directory as in use for as long as its owner or its etcd lives."""
    fresh = directory / (_LOCK_NAME + ".new")
    fd = os.open(fresh, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fresh.rename(directory / _LOCK_NAME)  # only now may a sweeper look at it
    return fd


def _sweep() -> None:
    """Remove the directories of owners that were killed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY_PREFIX}*/{_LOCK_NAME}"):
        with contextlib.suppress(OSError):  # in use, or another's, or gone: leave it
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
            finally:
                os.close(fd)
