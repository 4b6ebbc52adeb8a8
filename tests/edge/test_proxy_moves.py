"""Calls that name a vmodel, and what they do when that goes over to another model meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mm.core.calls import Call, NamedBy
from mm.errors import LoadFailedError, LoadTimeoutError, MeshError, ModelMovedError
from tests.edge.test_proxy_ids import VMODEL, Metadata, _fail
from tests.edge.upstream import serve_proxy

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("failure", [LoadFailedError("broken"), LoadTimeoutError("slow")])
@pytest.mark.parametrize("others", [(), (("mm-vmodel-id", "w"),)])
async def test_a_vmodel_that_switches_while_a_load_fails(
    failure: MeshError, others: Metadata
) -> None:
    """Whoever waited for the old model is not told of that, unless it is the model still."""
    async with serve_proxy() as stand, stand.client() as client:
        method, router = client.unary_unary("/t.S/Unary"), stand.router
        router.vmodels = {"v": "old", "w": "other"}

        async def outcome(now: str) -> Any:
            loaded = asyncio.Event()
            router.calls.clear()
            router.answers = [loaded]
            call = method(b"q", metadata=(*VMODEL, *others))
            await router.wait_waiting(1)
            router.vmodels["v"] = now
            router.answers = [failure.another()]
            loaded.set()
            return await call

        assert b"echo:q" in await outcome("new")
        assert {call.model_id for call in router.calls} >= {"old", "new"}
        router.vmodels["v"] = "old"
        error = await _fail(outcome("old"))
        assert (error.code().value[0], error.details()) == (failure.code, failure.message)


@pytest.mark.parametrize("others", [(), (("mm-vmodel-id", "w"),)])
async def test_a_call_that_waits_follows_its_vmodel(others: Metadata) -> None:
    async with serve_proxy() as stand, stand.client() as client:
        method, router = client.unary_unary("/t.S/Unary"), stand.router
        router.vmodels = {"v": "old", "w": "other"}

        async def called(now: str) -> list[Call]:
            moved = asyncio.Event()
            router.calls.clear()
            router.answers = [moved]
            call = method(b"q", metadata=(*VMODEL, *others))
            await router.wait_waiting(1)
            router.vmodels["v"] = now
            router.answers = [ModelMovedError()]
            moved.set()
            assert b"echo:q" in await call
            return [each for each in router.calls if each.model_id != "other"]

        first, second = await called("new")
        assert (first.model_id, second.model_id) == ("old", "new")
        assert first.named_by == second.named_by == NamedBy("v")
        router.vmodels["v"] = "old"
        _, second = await called("old")
        assert second.model_id == "old", "it was told so by somebody who is behind"
        assert second.named_by is None
