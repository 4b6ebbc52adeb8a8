"""The calls of ``mmesh.ModelMesh`` that manage vmodels: messages in, ``mesh.vmodel_manager``
called, messages out (around 5, 9).
"""

from __future__ import annotations

from typing import Any

from mm.core.headers import is_balanced
from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.core.vmodel_changes import SetVModel
from mm.edge.h2 import IncomingCall
from mm.edge.management import LEGACY_SERVICE, SERVICE, status_message
from mm.edge.unary import ServiceTable
from mm.mesh.vmodel_manager import VModelManager, VModelStatus
from mm.pb import mmesh


class VModelManagement:
    """Serves setVModel, deleteVModel and getVModelStatus to clients."""

    def __init__(self, manager: VModelManager) -> None:
        self._manager = manager

    def add_to(self, services: ServiceTable) -> None:
        """Serve every method under each of its names."""
        methods: tuple[tuple[str, type[Any], Any], ...] = (
            ("setVModel", mmesh.SetVModelRequest, self.set_vmodel),
            ("deleteVModel", mmesh.DeleteVModelRequest, self.delete_vmodel),
            ("getVModelStatus", mmesh.GetVModelStatusRequest, self.get_vmodel_status),
        )
        for name, request_type, method in methods:
            for service in (SERVICE, LEGACY_SERVICE):
                services.add_unary(service + name, request_type, method)

    async def set_vmodel(
        self, request: mmesh.SetVModelRequest, call: IncomingCall
    ) -> mmesh.VModelStatusInfo:
        """Create or change a vmodel."""
        info = request.model_info
        # One that says nothing counts as none (spec core 6.2).
        is_given = info is not None and (info.type or info.path or info.key)
        status = await self._manager.set(
            SetVModel(
                request.v_model_id,
                ModelId(request.target_model_id),
                info=ModelInfo(info.type, info.path, info.key) if info and is_given else None,
                owner=request.owner,
                expected_target_id=request.expected_target_model_id,
                update_only=request.update_only,
                auto_delete=request.auto_delete_target_model,
                force=request.force,
                load_now=request.load_now,
            ),
            sync=request.sync,
            balanced=is_balanced(call.head.mesh),
            deadline_s=call.deadline_s,
        )
        return vmodel_status_message(status)

    async def delete_vmodel(
        self, request: mmesh.DeleteVModelRequest, _call: IncomingCall
    ) -> mmesh.DeleteVModelResponse:
        """Delete a vmodel; an unknown one is a success."""
        await self._manager.delete(request.v_model_id, request.owner)
        return mmesh.DeleteVModelResponse()

    async def get_vmodel_status(
        self, request: mmesh.GetVModelStatusRequest, _call: IncomingCall
    ) -> mmesh.VModelStatusInfo:
        """Answer what a vmodel stands for; of an unknown one everything is empty."""
        status = await self._manager.status(request.v_model_id, request.owner)
        return vmodel_status_message(status)


def vmodel_status_message(status: VModelStatus) -> mmesh.VModelStatusInfo:
    """Answer the message for a status."""
    return mmesh.VModelStatusInfo(
        status=mmesh.VModelStatusInfoVModelStatus[status.status],
        active_model_id=status.active_model_id,
        target_model_id=status.target_model_id,
        active_model_status=None if status.active is None else status_message(status.active),
        target_model_status=None if status.target is None else status_message(status.target),
        owner=status.owner,
    )
