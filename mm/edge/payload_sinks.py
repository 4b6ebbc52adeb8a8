"""Where payloads go (around 17): a queue before each observer, and what carries them there.

Owns the bounds: a queue takes so many payloads, all of them together so many bytes, and what finds
no room is dropped and counted. So a slow observer delays neither calls nor other observers, as it
did in the Java mesh. How an observer is spoken to over HTTP is ``mm.edge.payload_http``'s.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import anyio
import anyio.to_thread

from mm.config import Config
from mm.edge.h2.incoming import IncomingCall
from mm.edge.payload_http import DeliveryError, HttpSink
from mm.edge.payloads import Calls, Observation, Payload
from mm.mesh.seldom import Seldom
from mm.mesh.statistics import Counters
from mm.payload_settings import PayloadSink

logger = logging.getLogger(__name__)


class Carrier(Protocol):
    """Brings payloads to one observer, one at a time; used by one thread at a time."""

    def deliver(self, payload: Payload) -> None:
        """Return when it is there; raises ``DeliveryError``."""

    def close(self) -> None:
        """Let go of what it holds."""


class LogSink:
    """Says what was called, and nothing of what was said."""

    def deliver(self, payload: Payload) -> None:
        """Log a line."""
        logger.info(
            "payload %s: model %s, vmodel %s, method %s, %s",
            payload.call_id,
            payload.model_id,
            payload.vmodel_id or "none",
            payload.method,
            f"status {payload.status}" if payload.code is not None else payload.kind,
        )

    def close(self) -> None:
        """Nothing is held."""


class Observers:
    """All observers of one instance. ``running`` as long as payloads are to go anywhere."""

    def __init__(self, config: Config, counters: Counters, started_ms: int) -> None:
        self._config = config
        self._counters = counters
        self._calls = Calls(config.instance_id, started_ms)
        self._source = f"/{config.service_name}/{config.instance_id}"
        self._queues = [_Queue(self, sink) for sink in config.payloads.sinks]
        #: Of all payloads that wait or are on their way.
        self.held_bytes = 0

    @property
    def config(self) -> Config:
        """The bounds."""
        return self._config

    @property
    def counters(self) -> Counters:
        """Where payloads are counted."""
        return self._counters

    def begin(self, incoming: IncomingCall, model_id: str, vmodel_id: str) -> Observation | None:
        """Answer what reads a call; None: nobody wants to see it."""
        method = incoming.method.removeprefix("/")
        queues = [queue for queue in self._queues if queue.sink.wants(method, model_id)]
        if not queues:
            return None
        length_max = self._config.message_bytes_max

        def tell(payload: Payload) -> None:
            for queue in queues:
                queue.put(payload)

        return Observation(incoming, self._calls.next_id(), model_id, vmodel_id, length_max, tell)

    def carrier(self, sink: PayloadSink) -> Carrier:
        """Make what speaks to an observer."""
        if sink.scheme == "logger":
            return LogSink()
        config = self._config
        return HttpSink(
            sink, self._source, config.payload_timeout_s, config.payloads.trust_path or None
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Deliver, and on the way out what is waiting, within ``close_timeout_s``."""
        async with anyio.create_task_group() as group:
            for queue in self._queues:
                for _ in range(self._config.payloads.threads):
                    group.start_soon(queue.run)
            try:
                yield
            finally:
                with anyio.move_on_after(self._config.close_timeout_s, shield=True):
                    for queue in self._queues:
                        await queue.emptied()
                group.cancel_scope.cancel()
                for queue in self._queues:
                    queue.give_up()


class _Queue:
    """Payloads before one observer, the oldest first.

    Each payload is counted once: delivered, failed or dropped.
    """

    def __init__(self, observers: Observers, sink: PayloadSink) -> None:
        self.sink = sink
        self._observers = observers
        length_max = observers.config.payloads.queue_length_max
        self._send, self._receive = anyio.create_memory_object_stream[Payload](length_max)
        self._open_count = 0
        self._empty = anyio.Event()
        self._dropped_count = 0
        self._drops, self._failures = Seldom(), Seldom()

    def put(self, payload: Payload) -> None:
        """Take a payload, or drop it; never blocks."""
        observers = self._observers
        size = len(payload.data)
        try:
            if observers.held_bytes + size > observers.config.payload_bytes_max:
                raise anyio.WouldBlock
            self._send.send_nowait(payload)
        except anyio.WouldBlock:
            self._drop(1)
            return
        observers.held_bytes += size
        self._open_count += 1

    async def run(self) -> None:
        """Deliver one payload after the other; several may run beside each other."""
        carrier = self._observers.carrier(self.sink)
        # Not of the threads that others share: an observer that does not answer holds it.
        limiter = anyio.CapacityLimiter(1)
        counters = self._observers.counters
        deliver = anyio.to_thread.run_sync
        try:
            while True:
                payload = await self._receive.receive()
                try:
                    await deliver(
                        partial(carrier.deliver, payload), limiter=limiter, abandon_on_cancel=True
                    )
                except DeliveryError as exc:
                    counters.payloads_failed += 1
                    level = self._failures.level(anyio.current_time())
                    logger.log(level, "payloads do not reach %s: %s", self.sink, exc)
                else:
                    counters.payloads_delivered += 1
                self._done(len(payload.data))
        finally:
            carrier.close()

    async def emptied(self) -> None:
        """Return when nothing waits or is on its way."""
        while self._open_count:
            self._empty = anyio.Event()
            await self._empty.wait()

    def give_up(self) -> None:
        """Count what is left as dropped, and close."""
        if self._open_count:
            logger.warning("%d payloads for %s were not delivered", self._open_count, self.sink)
            self._observers.counters.payloads_dropped += self._open_count
        self._send.close()
        self._receive.close()

    def _done(self, size: int) -> None:
        self._observers.held_bytes -= size
        self._open_count -= 1
        if not self._open_count:
            self._empty.set()

    def _drop(self, count: int) -> None:
        self._observers.counters.payloads_dropped += count
        self._dropped_count += count
        level = self._drops.level(anyio.current_time())
        if level > logging.DEBUG:
            logger.warning(
                "%d payloads for %s were dropped since one last said so: %d wait, or all together"
                " have %d bytes",
                self._dropped_count,
                self.sink,
                self._observers.config.payloads.queue_length_max,
                self._observers.config.payload_bytes_max,
            )
            self._dropped_count = 0
