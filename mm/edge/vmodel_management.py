"""The calls of ``mmesh.ModelMesh`` that manage vmodels: messages in, ``mesh.vmodel_manager``
called, messages out (around 5, 9).

A controller sends setVModel again and again for all of its predictors, and nearly all of them are
as they should be: then most of the time would go into the messages. So these are read and written
by protobuf's own classes, which take a tenth of the time that betterproto2's do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from mm.core.headers import is_balanced
from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.core.vmodel_changes import SetVModel
from mm.edge.h2 import IncomingCall
from mm.edge.management import LEGACY_SERVICE, SERVICE
from mm.edge.protobuf import NotAMessageError, message_class, parse
from mm.edge.status_messages import fill_status
from mm.edge.unary import ServiceTable, read_request, send_reply
from mm.errors import InvalidRequestError
from mm.mesh.vmodel_manager import VModelManager, VModelStatus
from mm.pb import mmesh

Method = Callable[[Any, IncomingCall], Awaitable[bytes]]

_SetRequest: Final = message_class("mmesh.SetVModelRequest")
_DeleteRequest: Final = message_class("mmesh.DeleteVModelRequest")
_StatusRequest: Final = message_class("mmesh.GetVModelStatusRequest")
_VModelStatusInfo: Final = message_class("mmesh.VModelStatusInfo")


class VModelManagement:
    """Serves setVModel, deleteVModel and getVModelStatus to clients."""

    def __init__(self, manager: VModelManager) -> None:
        self._manager = manager

    def add_to(self, services: ServiceTable) -> None:
        """Serve every method under each of its names."""
        for service in (SERVICE, LEGACY_SERVICE):
            _add(services, service + "setVModel", _SetRequest, self.set_vmodel)
            _add(services, service + "deleteVModel", _DeleteRequest, self.delete_vmodel)
            _add(services, service + "getVModelStatus", _StatusRequest, self.get_vmodel_status)

    async def set_vmodel(self, request: Any, call: IncomingCall) -> bytes:
        """Create or change a vmodel."""
        info = ModelInfo(request.modelInfo.type, request.modelInfo.path, request.modelInfo.key)
        # One that says nothing counts as none (spec core 6.2).
        is_given = info.model_type or info.path or info.key
        status = await self._manager.set(
            SetVModel(
                request.vModelId,
                ModelId(request.targetModelId),
                info=info if is_given else None,
                owner=request.owner,
                expected_target_id=request.expectedTargetModelId,
                update_only=request.updateOnly,
                auto_delete=request.autoDeleteTargetModel,
                force=request.force,
                load_now=request.loadNow,
            ),
            sync=request.sync,
            balanced=is_balanced(call.head.mesh),
            deadline_s=call.deadline_s,
        )
        return encode_status(status)

    async def delete_vmodel(self, request: Any, call: IncomingCall) -> bytes:
        """Delete a vmodel; an unknown one is a success."""
        await self._manager.delete(request.vModelId, request.owner, deadline_s=call.deadline_s)
        return b""

    async def get_vmodel_status(self, request: Any, _call: IncomingCall) -> bytes:
        """Answer what a vmodel stands for; of an unknown one everything is empty."""
        return encode_status(await self._manager.status(request.vModelId, request.owner))


def _add(services: ServiceTable, path: str, request_class: Any, method: Method) -> None:
    async def serve(call: IncomingCall) -> None:
        try:
            request = parse(request_class, await read_request(call))
        except NotAMessageError as error:
            raise InvalidRequestError(f"the request is {error}") from error
        send_reply(call, await method(request, call))

    services.add(path, serve)


def encode_status(status: VModelStatus) -> bytes:
    """Answer the encoded ``VModelStatusInfo`` for a status."""
    message = _VModelStatusInfo(
        status=mmesh.VModelStatusInfoVModelStatus[status.status].value,
        activeModelId=status.active_model_id,
        targetModelId=status.target_model_id,
        owner=status.owner,
    )
    if status.active is not None:
        fill_status(message.activeModelStatus, status.active)
    if status.target is not None:
        fill_status(message.targetModelStatus, status.target)
    encoded: bytes = message.SerializeToString()
    return encoded
