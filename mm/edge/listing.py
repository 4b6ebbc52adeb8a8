"""``listModels``, ``listVModels``, ``watchModels``, ``watchVModels``: messages in and out.

What they tell is ``mesh.listing``'s and ``mesh.watches``'s. Answers are built of protobuf's own
messages: a page has a thousand entries, and with betterproto2 the event loop would stand still for
a tenth of a second for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from mm.core.ids import ModelId, VModelId
from mm.edge.h2 import IncomingCall
from mm.edge.management import SERVICE
from mm.edge.protobuf import message_class
from mm.edge.status_messages import UINT64_MAX, at_most, fill_status
from mm.edge.unary import MessageStream, ServiceTable, parse_message, read_request, send_reply
from mm.edge.wire_words import client_of
from mm.errors import InvalidRequestError
from mm.mesh.composition import Parts
from mm.mesh.listing import IN_A_ROW, ListedModel, ListedVModel, Listing, PageRequest
from mm.mesh.watches import SEND_MAX_S, Watcher, Watches
from mm.pb import mmesh

E = TypeVar("E")

_ModelsResponse: Final = message_class("mmesh.ListModelsResponse")
_VModelsResponse: Final = message_class("mmesh.ListVModelsResponse")
_Model: Final = message_class("mmesh.ListedModel")
_VModel: Final = message_class("mmesh.ListedVModel")
_INT32_MAX: Final = 2**31 - 1
_VModelStatus: Final = mmesh.VModelStatusInfoVModelStatus


def add_listing(services: ServiceTable, parts: Parts) -> None:
    """Serve the four methods."""
    listing = Listing(parts.registry, parts.vmodels, parts.models.statuses)
    ListingService(listing, parts).add_to(services)


class ListingService:
    """The four methods of one instance."""

    def __init__(self, listing: Listing, parts: Parts) -> None:
        self._listing = listing
        registry = parts.registry
        self._models = Watches(
            parts.counters, registry.mirror, parts.members.mirror, registry.held_by
        )
        self._vmodels = Watches(parts.counters, parts.vmodels.mirror)

    def add_to(self, services: ServiceTable) -> None:
        """Serve them under their names."""
        services.add(SERVICE + "listModels", self.list_models)
        services.add(SERVICE + "listVModels", self.list_vmodels)
        services.add(SERVICE + "watchModels", self.watch_models)
        services.add(SERVICE + "watchVModels", self.watch_vmodels)

    async def list_models(self, call: IncomingCall) -> None:
        """Answer a page of models."""
        request = parse_message(mmesh.ListModelsRequest, await read_request(call))
        page = await self._listing.models(
            PageRequest(request.page_size, request.page_token, request.id_prefix),
            model_type=request.type,
            status=_wanted(request.status),
        )
        reply = _ModelsResponse(next_page_token=page.next_after)
        await _fill_page(reply.models, page.entries, _fill_model)
        send_reply(call, reply.SerializeToString())

    async def list_vmodels(self, call: IncomingCall) -> None:
        """Answer a page of vmodels."""
        request = parse_message(mmesh.ListVModelsRequest, await read_request(call))
        page = await self._listing.vmodels(
            PageRequest(request.page_size, request.page_token, request.id_prefix),
            owner=request.owner,
            status=_wanted(request.status),
        )
        reply = _VModelsResponse(next_page_token=page.next_after)
        await _fill_page(reply.vmodels, page.entries, _fill_vmodel)
        send_reply(call, reply.SerializeToString())

    async def watch_models(self, call: IncomingCall) -> None:
        """Tell of each change of models until the client leaves."""

        def tell(key_id: str) -> bytes:
            message = _Model()
            _fill_model(message, self._listing.model(ModelId(key_id)))
            return bytes(message.SerializeToString())

        await _watch(call, self._models, tell)

    async def watch_vmodels(self, call: IncomingCall) -> None:
        """Tell of each change of vmodels until the client leaves."""

        def tell(key_id: str) -> bytes:
            message = _VModel()
            _fill_vmodel(message, self._listing.vmodel(VModelId(key_id)))
            return bytes(message.SerializeToString())

        await _watch(call, self._vmodels, tell)


async def _watch(call: IncomingCall, watches: Watches, tell: Callable[[str], bytes]) -> None:
    request = parse_message(mmesh.WatchRequest, await read_request(call))
    stream = MessageStream(call)
    # An instance that stops does not wait for those who only look on.
    call.holds_stop = False
    who = Watcher(client_of(call), call.caller)
    with watches.open(request.id, request.id_prefix, who) as watch:
        call.send_headers()
        while True:
            message = tell(await watch.next())
            try:
                await stream.send(message, SEND_MAX_S)
            except TimeoutError:
                raise watch.stuck(SEND_MAX_S) from None


def _wanted(status: mmesh.ModelStatusInfoModelStatus | mmesh.VModelStatusInfoVModelStatus) -> str:
    """Answer the name of a status to look for; empty: any. Raises ``InvalidRequestError``."""
    if not status:
        return ""
    if not status.name:
        raise InvalidRequestError(f"there is no status {int(status)}")
    return status.name


async def _fill_page(messages: Any, entries: Sequence[E], fill: Callable[[Any, E], None]) -> None:
    """Add a message for each entry, and let others have their turn meanwhile."""
    for number, entry in enumerate(entries, 1):
        fill(messages.add(), entry)
        if not number % IN_A_ROW:
            await asyncio.sleep(0)


def _fill_model(message: Any, entry: ListedModel) -> None:
    message.model_id = entry.model_id
    message.type = entry.model_type
    message.path = entry.path
    message.last_used_ms = at_most(entry.last_used_ms, UINT64_MAX)
    message.size_bytes = at_most(entry.size_bytes, UINT64_MAX)
    message.references = at_most(entry.references, _INT32_MAX)
    message.vmodel_ids.extend(entry.vmodel_ids)
    message.min_copies = at_most(entry.policy.copies_min, _INT32_MAX)
    message.pinned = entry.policy.pinned
    fill_status(message.status, entry.status)


def _fill_vmodel(message: Any, entry: ListedVModel) -> None:
    message.vmodel_id = entry.vmodel_id
    message.owner = entry.owner
    message.active_model_id = entry.active_model_id
    message.target_model_id = entry.target_model_id
    message.status = _VModelStatus[entry.status]
