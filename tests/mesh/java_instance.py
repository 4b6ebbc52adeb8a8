"""A stand-in for an instance of the Java mesh: what it writes, watches and prunes, and when.

Owns its half of the store: its record, its candidature, its copies, and as the leader the pruning
and the switches of vmodels (spec core 1.3-1.8, 5.1, 5.4, 5.6, 6.5). Serves nobody: what it does
with calls cannot be seen from here. Shares no code with the records of the product: what Java
leaves out, and in which order it writes, is written down here. Over any kind of store, on anyio
alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus

from mm.mesh.ports import Delete, Item, Part, Put, Resync, Session, Store, WatchEvent, Write

#: Attributes in the order of Java's classes, those of the base class first; what it does not know
#: comes behind, as it was read.
MODEL: Final = ("actionable", "type", "encKey", "mPath", "instanceIds", "failedIn", "fails", "refs",
                "autoDel", "lu", "lul")  # fmt: skip
VMODEL: Final = ("actionable", "o", "amid", "tmid", "failed")
INSTANCE: Final = ("actionable", "lruTime", "count", "cap", "used", "lThreads", "lInProg", "rpm",
                   "shutdown", "startTime", "vers", "loc", "zone", "labels")  # fmt: skip
_ORDERS: Final = {"registry": MODEL, "vmodels": VMODEL, "instances": INSTANCE}

NEVER_MS: Final = 2**63 - 1
MINUTE_MS: Final = 60_000
LEASE_TTL_S: Final = 20
PUBLISH_S: Final = 40.0
REAPER_FIRST_S: Final = 120.0
REAPER_S: Final = 420.0
#: A copy is not looked at before it is so old, and goes once its instance was missed for as long.
PRUNED_AFTER_MS: Final = 10 * MINUTE_MS
HOUR_MS: Final = 60 * MINUTE_MS

Attributes = dict[str, Any]
Change = Callable[[Attributes | None], Attributes | None]


def java_json(attributes: Mapping[str, Any], order: Sequence[str]) -> bytes:
    """Write a record as Java does: no defaults, not inside maps either, and compact."""
    known = {name: attributes[name] for name in order if attributes.get(name)}
    for name, value in known.items():
        if isinstance(value, dict):
            known[name] = {key: entry for key, entry in value.items() if entry or entry == {}}
    rest = {name: value for name, value in attributes.items() if name not in order}
    return json.dumps({**known, **rest}, separators=(",", ":")).encode()


class JavaInstance:
    """One of them. ``run`` is its life; ``stop`` ends it in order, cancelling is a crash."""

    def __init__(
        self,
        store: Store,
        name: str,
        prefix: str,
        now_ms: Callable[[], int],
        *,
        labels: Sequence[str] = (),
        version: int = 0,
    ) -> None:
        self.name = name
        self._store = store
        self._prefix = prefix
        self._now_ms = now_ms
        self._labels = sorted(labels)
        self._version = version
        #: Everything below the prefix, as the watch tells it.
        self._items: dict[str, Item] = {}
        self._news = anyio.Event()
        self._shutdown = False
        self._start_ms = 0
        #: Who was missed at a run of the reaper: (model, instance) -> since when.
        self._missed_ms: dict[tuple[str, str], int] = {}
        #: model -> the time of its load here: what it would serve.
        self.copies: dict[str, int] = {}
        #: Types that its runtime loads; None: all.
        self.types: set[str] | None = None
        self.pruned: list[tuple[str, str]] = []
        self.switched: list[str] = []

    # --- what it knows ------------------------------------------------------------------------

    def _key(self, table: str, name: str) -> str:
        return f"{self._prefix}/{table}/{name}"

    def table(self, table: str) -> dict[str, Attributes]:
        """Answer what it has mirrored of a table."""
        prefix = self._key(table, "")
        return {
            key[len(prefix) :]: json.loads(item.value)
            for key, item in self._items.items()
            if key.startswith(prefix)
        }

    @property
    def leader(self) -> str | None:
        """Answer who leads, as it reckons: the oldest candidate, its value's first line."""
        prefix = self._key("leaderLatch", "")
        standing = [each for key, each in self._items.items() if key.startswith(prefix)]
        if not standing:
            return None
        first = min(standing, key=lambda item: item.create_revision)
        return first.value.split(b"\n", 1)[0].decode().removeprefix("_")

    @property
    def leads(self) -> bool:
        """Whether that is itself."""
        return self.leader == self.name

    def record(self) -> Attributes:
        """Answer its own record."""
        held = self.table("registry")
        used = [held[each].get("lu", 0) for each in self.copies if each in held]
        return {
            "actionable": True,
            "lruTime": min(used, default=NEVER_MS),
            "count": len(self.copies),
            "cap": 131_072,
            "used": 128 * len(self.copies),
            "lThreads": 2,
            "shutdown": self._shutdown,
            "startTime": self._start_ms,
            "vers": self._version,
            "loc": "10.0.0.7",
            "labels": self._labels,
        }

    # --- life ---------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Join, in the order of its start, and do what it does until cancelled."""
        self._start_ms = self._now_ms()
        async with self._store.session(LEASE_TTL_S) as session, anyio.create_task_group() as group:
            await group.start(self._follow)
            # A session node: the lease is put on a key that is there, or the key is made.
            await self._publish(session)
            group.start_soon(self._keep_published, session)
            key = self._key("leaderLatch", f"_{self.name}")
            value = f"_{self.name}".encode()
            await self._store.write(Write(key, value, 0, session.lease_id))
            group.start_soon(self._reap_now_and_then)
            group.start_soon(self._process_vmodels)
            task_status.started()
            await self._wait(lambda: self._shutdown)
            await self._publish(session)
            for model_id in list(self.copies):
                await self.unload(model_id)
            await self._store.write(Write(key, None, None))
            await self._store.write(Write(self._key("instances", self.name), None, None))
            group.cancel_scope.cancel()

    def stop(self) -> None:
        """Begin the shutdown: ``run`` returns when it is over."""
        self._shutdown = True
        self._tell()

    async def _follow(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with self._store.watch(f"{self._prefix}/") as batches:
            for event in await anext(batches):
                self._fold(event)
            task_status.started()
            async for batch in batches:
                for event in batch:
                    self._fold(event)
                self._tell()

    def _fold(self, event: WatchEvent) -> None:
        match event:
            case Resync(items):
                self._items = {item.key: item for item in items}
            case Put(item):
                self._items[item.key] = item
            case Delete(key):
                self._items.pop(key, None)

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._news.wait()

    async def _pause(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._wait(lambda: False)

    async def _publish(self, session: Session) -> None:
        value = java_json(self.record(), INSTANCE)
        lease_id = session.lease_id or await session.wait_change(0)
        await self._store.write(Write(self._key("instances", self.name), value, None, lease_id))

    async def _keep_published(self, session: Session) -> None:
        """Every 40 s, and when the key is gone (spec core 1.5)."""
        while True:
            with anyio.move_on_after(PUBLISH_S):
                await self._wait(lambda: self._key("instances", self.name) not in self._items)
            await self._publish(session)

    # --- its copies ---------------------------------------------------------------------------

    async def load(self, model_id: str) -> bool:
        """Register a copy before its load, which takes no time; False if there is no such model."""
        now_ms = self._now_ms()

        def change(found: Attributes | None) -> Attributes | None:
            if found is not None:
                found.setdefault("instanceIds", {})[self.name] = now_ms
                found.get("failedIn", {}).pop(self.name, None)
                found.get("fails", {}).pop(self.name, None)
                found["lu"] = max(found.get("lu", 0), now_ms)
            return found

        is_there = await self._change("registry", model_id, change) is not None
        if is_there:
            self.copies[model_id] = now_ms
        return is_there

    def refuses(self, model_id: str) -> bool:
        """Answer whether it tries no load for a call: five others have the model, and it reaches
        none of them (spec core 2.4, g).
        """
        copies = self.table("registry")[model_id].get("instanceIds", {})
        return self.name not in copies and len(copies.keys() & self.table("instances")) >= 5

    async def unload(self, model_id: str) -> None:
        """Take its own copy out, and nobody else's."""
        loaded_ms = self.copies.pop(model_id)

        def change(found: Attributes | None) -> Attributes | None:
            copies = {} if found is None else found.get("instanceIds", {})
            if found is not None and copies.get(self.name) == loaded_ms:
                del copies[self.name]
                found["lul"] = self._now_ms() if len(copies) > 2 else 0
            return found

        await self._change("registry", model_id, change)

    async def fail(self, model_id: str, message: str) -> None:
        """Record that a load failed here."""

        def change(found: Attributes | None) -> Attributes | None:
            if found is not None:
                found.get("instanceIds", {}).pop(self.name, None)
                found.setdefault("failedIn", {})[self.name] = self._now_ms()
                found.setdefault("fails", {})[self.name] = {"msg": message}
            return found

        await self._change("registry", model_id, change)

    async def touch(self, model_id: str) -> None:
        """Raise the last use, as its janitor does."""

        def change(found: Attributes | None) -> Attributes | None:
            if found is not None:
                found["lu"] = self._now_ms()
            return found

        await self._change("registry", model_id, change)

    # --- what it registers --------------------------------------------------------------------

    async def set_vmodel(self, vmodel_id: str, target: str, **info: str) -> None:
        """Create a vmodel, or give it a target: the vmodel and its target in one transaction."""
        while True:
            (vmodel, seen), (model, known) = await self._read(
                ("vmodels", vmodel_id), ("registry", target)
            )
            created = {**info, "autoDel": True, "lu": self._now_ms() - HOUR_MS}
            record = created if known is None else known
            record["refs"] = record.get("refs", 0) + 1
            changed = {"amid": target, "o": "ksp"} if seen is None else seen
            changed["tmid"] = target
            writes = [
                self._put("vmodels", vmodel_id, changed, vmodel),
                self._put("registry", target, record, model),
            ]
            if (await self._store.transact(writes))[0]:
                return

    # --- as the leader ------------------------------------------------------------------------

    async def _reap_now_and_then(self) -> None:
        await self._wait(lambda: self.leads)
        await self._pause(REAPER_FIRST_S)
        while True:
            if self.leads:
                await self._reap()
                await self._switch_all()
            await self._pause(REAPER_S)

    async def _reap(self) -> None:
        now_ms, present = self._now_ms(), self.table("instances")
        missed: dict[tuple[str, str], int] = {}
        for model_id, record in self.table("registry").items():
            times = {**record.get("instanceIds", {}), **record.get("failedIn", {})}
            for instance_id, time_ms in times.items():
                if now_ms - time_ms <= PRUNED_AFTER_MS or instance_id in present:
                    continue
                if await self._store.get(self._key("instances", instance_id)) is not None:
                    continue
                since_ms = self._missed_ms.get((model_id, instance_id), now_ms)
                missed[model_id, instance_id] = since_ms
                if now_ms - since_ms > PRUNED_AFTER_MS:
                    await self._prune(model_id, instance_id)
            if record.get("lu") == NEVER_MS:
                await self.touch(model_id)
        self._missed_ms = missed
        for key, item in list(self._items.items()):
            # None of ours is registered in litelinks: only its lease keeps it.
            if key.startswith(self._key("instances", "")) and not item.lease_id:
                await self._store.write(Write(key, None, item.mod_revision))

    async def _prune(self, model_id: str, instance_id: str) -> None:
        def change(found: Attributes | None) -> Attributes | None:
            for name in () if found is None else ("instanceIds", "failedIn", "fails"):
                found.get(name, {}).pop(instance_id, None)
            return found

        await self._change("registry", model_id, change)
        self.pruned.append((model_id, instance_id))

    async def _process_vmodels(self) -> None:
        while True:
            if self.leads:
                await self._switch_all()
            await self._news.wait()

    async def _switch_all(self) -> None:
        for vmodel_id, vmodel in self.table("vmodels").items():
            active, target = vmodel["amid"], vmodel["tmid"]
            if active == target or vmodel.get("failed"):
                continue
            models = self.table("registry")
            needs_load = bool(models.get(active, {}).get("instanceIds"))
            if needs_load and target not in self.copies:
                kind = models.get(target, {}).get("type")
                if self.types is not None and kind not in self.types:
                    await self._block(vmodel_id)
                    continue
                if not await self.load(target):
                    continue
            await self._complete(vmodel_id, active, target)

    async def _block(self, vmodel_id: str) -> None:
        await self._change("vmodels", vmodel_id, lambda found: {**(found or {}), "failed": True})

    async def _complete(self, vmodel_id: str, active: str, target: str) -> None:
        """The vmodel and the model it leaves in one transaction; the last reference takes it."""
        while True:
            (item, vmodel), (old_item, old) = await self._read(
                ("vmodels", vmodel_id), ("registry", active)
            )
            if vmodel is None or (vmodel["amid"], vmodel["tmid"]) != (active, target):
                return
            vmodel.update(amid=target, failed=False)
            parts: list[Part] = [self._put("vmodels", vmodel_id, vmodel, item)]
            if old is not None:
                old["refs"] = max(0, old.get("refs", 0) - 1)
                is_over = old.get("autoDel") and not old["refs"]
                parts.append(self._put("registry", active, None if is_over else old, old_item))
            if (await self._store.transact(parts))[0]:
                self.switched.append(vmodel_id)
                return

    # --- the store ----------------------------------------------------------------------------

    async def _read(self, *names: tuple[str, str]) -> list[tuple[Item | None, Attributes | None]]:
        items = [await self._store.get(self._key(*each)) for each in names]
        return [(each, None if each is None else json.loads(each.value)) for each in items]

    def _put(
        self, table: str, name: str, attributes: Attributes | None, seen: Item | None
    ) -> Write:
        value = None if attributes is None else java_json(attributes, _ORDERS[table])
        return Write(self._key(table, name), value, 0 if seen is None else seen.mod_revision)

    async def _change(self, table: str, name: str, change: Change) -> Attributes | None:
        """By compare-and-set: what stands in the way is read, and the change made to that."""
        while True:
            [(item, found)] = await self._read((table, name))
            changed = change(found)
            if item is None or changed is None:
                return changed
            if (await self._store.write(self._put(table, name, changed, item))).succeeded:
                return changed
