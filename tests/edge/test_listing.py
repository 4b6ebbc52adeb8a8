"""Lists and watches on the wire: every field, what is refused, and a server that stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from grpclib.client import Channel
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.events import ResponseReceived

from mm.core.copy_record import CopyStage
from mm.core.ids import InstanceId, ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.records import ModelInfo, ModelRecord, VModelRecord
from mm.edge.h2 import EXTERNAL_LIMITS, GrpcServer
from mm.edge.h2.messages import frame_message
from mm.edge.listing import add_listing
from mm.edge.memory_store import MemoryStore
from mm.edge.unary import ServiceTable
from mm.limits import Limits
from mm.mesh.ports import Delete, Item, Put
from mm.mesh.registry import Registry
from mm.mesh.statistics import Counters
from mm.mesh.vmodels import VModels
from mm.pb import mmesh
from mm.testing.cluster import running_cluster, until
from tests.edge.raw_h2 import REQUEST, connect
from tests.edge.upstream import PATIENCE_S

pytestmark = pytest.mark.anyio
GONE = InstanceId("gone")
S, V = mmesh.ModelStatusInfoModelStatus, mmesh.VModelStatusInfoVModelStatus


@dataclass(slots=True)
class Served:
    """The lists of one instance, over tables that nobody but the test changes, and a client."""

    registry: Registry
    vmodels: VModels
    server: GrpcServer
    port: int
    stub: mmesh.ModelMeshStub
    counters: Counters
    revision: int = 1

    def store(self, table: str, name: str, value: bytes | None) -> None:
        """Tell of a change, as the watch of the store does."""
        self.revision += 1
        mirror = self.vmodels.mirror if table == "vmodels" else self.registry.mirror
        key = mirror.key(name)
        if value is None:
            mirror.fold([Delete(key, self.revision)])
        else:
            mirror.fold([Put(Item(key, value, self.revision))])


@asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    registry = Registry(MemoryStore(), "/registry/", Limits())
    vmodels = VModels(MemoryStore(), "/vmodels/", Limits())
    async with running_cluster("a") as cluster:
        table = ServiceTable()
        parts = cluster["a"].node.parts
        add_listing(table, replace(parts, registry=registry, vmodels=vmodels))
        server = GrpcServer(table, limits=EXTERNAL_LIMITS, external=True)
        port = await server.start("127.0.0.1", 0)
        channel = Channel("127.0.0.1", port)
        try:
            stub = mmesh.ModelMeshStub(channel)
            yield Served(registry, vmodels, server, port, stub, parts.counters)
        finally:
            channel.close()
            await server.stop(0)


async def test_every_field_of_a_model() -> None:
    async with serving() as served:
        record = ModelRecord(ModelInfo("t", "a/pfäd", "secret"), references=2, last_used_ms=7)
        record = record.with_policy(ModelPolicy(3, pinned=True))
        record = record.with_copy(GONE, 5, 1)
        record = record.with_copy_state(GONE, CopyStage.READY, 6, 3)
        record = record.with_failure(InstanceId("b"), 2**63 - 1, "broken")
        served.store("registry", "m ü", record.encode())
        served.store("vmodels", "v", VModelRecord(ModelId("m ü"), ModelId("x")).encode())
        reply = await served.stub.list_models(mmesh.ListModelsRequest())
        (model,) = reply.models
        assert model.status is not None
        copies = [(c.location, c.copy_status) for c in model.status.model_copy_infos]
        assert (model.model_id, model.type, model.path) == ("m ü", "t", "a/pfäd")
        assert (model.last_used_ms, model.size_bytes) == (7, 3 * 8192)
        assert (model.references, model.vmodel_ids) == (2, ["v"])
        assert (model.min_copies, model.pinned) == (3, True)
        assert model.status.status == S.LOADING_FAILED
        assert model.status.errors == ["broken"]
        assert copies == [("b", S.LOADING_FAILED), (GONE, S.UNKNOWN)]
        assert b"secret" not in bytes(reply)
        assert reply.next_page_token == ""


async def test_numbers_that_no_field_can_hold() -> None:
    """Anything may stand in a record: it is told as far as it goes."""
    async with serving() as served:
        record = ModelRecord(ModelInfo("t"), references=-(2**40), last_used_ms=-1)
        served.store("registry", "m1", record.encode())
        record = ModelRecord(ModelInfo("t"), references=2**40, copies={GONE: -1})
        served.store("registry", "m2", record.encode())
        one, two = (await served.stub.list_models(mmesh.ListModelsRequest())).models
        assert (one.references, one.last_used_ms) == (0, 0)
        assert (two.references, two.vmodel_ids) == (2**31 - 1, [])


async def test_pages_and_filters_of_vmodels() -> None:
    async with serving() as served:
        for number in range(5):
            owner = "isvc" if number % 2 else "ksp"
            record = VModelRecord(ModelId("m1"), ModelId(f"m{number}"), owner)
            served.store("vmodels", f"v{number}", record.encode())
        first = await served.stub.list_v_models(mmesh.ListVModelsRequest(page_size=2))
        assert [v.vmodel_id for v in first.vmodels] == ["v0", "v1"]
        rest = await served.stub.list_v_models(
            mmesh.ListVModelsRequest(page_token=first.next_page_token, owner="ksp")
        )
        (two, four) = rest.vmodels
        assert (two.vmodel_id, two.owner, two.active_model_id, two.target_model_id) == (
            ("v2", "ksp", "m1", "m2")
        )
        assert (two.status, four.vmodel_id) == (V.TRANSITIONING, "v4")
        found = await served.stub.list_v_models(mmesh.ListVModelsRequest(status=V.DEFINED))
        assert [v.vmodel_id for v in found.vmodels] == ["v1"]


async def test_what_is_refused() -> None:
    async with serving() as served:
        with pytest.raises(GRPCError, match="page_size is -1"):
            await served.stub.list_models(mmesh.ListModelsRequest(page_size=-1))
        with pytest.raises(GRPCError, match="there is no status 77"):
            await served.stub.list_v_models(mmesh.ListVModelsRequest(status=V(77)))


async def test_a_watch_tells_changes_until_the_server_stops() -> None:
    async with serving() as served:
        told: asyncio.Queue[mmesh.ListedModel] = asyncio.Queue()

        async def watch() -> None:
            async for model in served.stub.watch_models(mmesh.WatchRequest(id_prefix="m")):
                told.put_nowait(model)

        task = asyncio.create_task(watch())
        record = ModelRecord(ModelInfo("t", "p"))
        # Until the watch is there, its news are lost: it does not begin with what there is.
        async with asyncio.timeout(PATIENCE_S):
            while told.empty():
                served.store("registry", "m", None)
                served.store("registry", "m", record.encode())
                await asyncio.wait({task}, timeout=0.01)
        while not told.empty():
            first = told.get_nowait()
        assert (first.model_id, first.path, first.status) == (
            ("m", "p", mmesh.ModelStatusInfo(status=S.NOT_LOADED))
        )
        served.store("registry", "n", record.encode())
        served.store("registry", "m", None)
        async with asyncio.timeout(PATIENCE_S):
            gone = await told.get()
        assert gone.status is not None
        assert (gone.model_id, gone.path, gone.status.status) == ("m", "", S.NOT_FOUND)
        async with asyncio.timeout(PATIENCE_S):
            await served.server.stop(PATIENCE_S)
        # grpclib tells of the end of the connection if that comes before it has read the status.
        with pytest.raises((GRPCError, StreamTerminatedError)):
            await task


async def test_a_client_that_never_reads_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.edge.listing.SEND_MAX_S", 0.1)
    path = b"/mmesh.ModelMesh/watchModels"
    headers = [(name, path if name == b":path" else value) for name, value in REQUEST]
    async with serving() as served, connect(served.port) as client:
        stream_id = client.begin(headers)
        client.send(stream_id, frame_message(bytes(mmesh.WatchRequest(id_prefix="m"))), end=True)
        await client.wait_on(ResponseReceived, stream_id)
        for number in range(30):  # more than its window and what may be ahead of it
            record = ModelRecord(ModelInfo("t", "p" * 10_000))
            served.store("registry", f"m{number}", record.encode())
        await until(lambda: served.counters.watches_ended == 1)
        assert served.counters.watches_behind == 1
        told, _ = await client.wait_answer(stream_id)
        assert told[b"grpc-status"] == b"8"
        assert b"took nothing for 0.1 s" in told[b"grpc-message"]


async def test_a_watch_of_vmodels() -> None:
    async with serving() as served:
        began = asyncio.Event()
        told: asyncio.Queue[mmesh.ListedVModel] = asyncio.Queue()

        async def watch() -> None:
            began.set()
            async for vmodel in served.stub.watch_v_models(mmesh.WatchRequest(id="v")):
                told.put_nowait(vmodel)

        task = asyncio.create_task(watch())
        await began.wait()
        number = 0
        async with asyncio.timeout(PATIENCE_S):
            while told.empty():
                number += 1
                record = VModelRecord(ModelId("m1"), ModelId(f"m{number}"), "o")
                served.store("vmodels", "v", record.encode())
                await asyncio.wait({task}, timeout=0.01)
        first = told.get_nowait()
        assert (first.vmodel_id, first.owner, first.active_model_id) == ("v", "o", "m1")
        task.cancel()
