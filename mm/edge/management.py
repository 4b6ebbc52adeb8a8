"""The service ``mmesh.ModelMesh``: messages in, ``mesh.models`` called, messages out (around 5, 9).

Owns the mapping of field names and the legacy spellings of the service. What the calls mean is
``mesh.models``'s.
"""

from __future__ import annotations

from typing import Any, Final

from mm.core.calls import Call, Hop
from mm.core.headers import is_balanced
from mm.core.hop_headers import read_hop_request
from mm.core.ids import InstanceId, ModelId
from mm.core.model_policy import ModelPolicy
from mm.core.records import ModelInfo
from mm.edge.h2 import IncomingCall
from mm.edge.status_messages import UINT64_MAX, at_most
from mm.edge.unary import ServiceTable
from mm.mesh.models import EnsureRequest, Models
from mm.mesh.ports import CopyStatus, ModelStatus
from mm.pb import mmesh

SERVICE: Final = "/mmesh.ModelMesh/"
#: The names that clients of the first generation use; the messages are field-compatible.
LEGACY_SERVICE: Final = "/com.ibm.watson.tas.proto.TasRuntime/"
LEGACY_METHODS: Final = {"registerModel": "addModel", "unregisterModel": "deleteModel"}


class Management:
    """Serves the management methods of one listener.

    ``external`` listeners ignore hop headers: only a peer may say that a call came from a peer.
    """

    def __init__(self, models: Models, *, external: bool) -> None:
        self._models = models
        self._external = external

    def add_to(self, services: ServiceTable) -> None:
        """Serve every method under each of its names."""
        self._add(services, "registerModel", mmesh.RegisterModelRequest, self.register_model)
        self._add(services, "unregisterModel", mmesh.UnregisterModelRequest, self.unregister_model)
        self._add(services, "getModelStatus", mmesh.GetStatusRequest, self.get_model_status)
        self._add(services, "ensureLoaded", mmesh.EnsureLoadedRequest, self.ensure_loaded)

    def _add(self, services: ServiceTable, name: str, request_type: type[Any], method: Any) -> None:
        for service in (SERVICE, LEGACY_SERVICE):
            for spelling in (name, LEGACY_METHODS.get(name, name)):
                services.add_unary(service + spelling, request_type, method)

    async def register_model(
        self, request: mmesh.RegisterModelRequest, call: IncomingCall
    ) -> mmesh.ModelStatusInfo:
        """Register a model, and load it if asked to."""
        info = request.model_info if request.model_info is not None else mmesh.ModelInfo()
        status = await self._models.register(
            ModelId(request.model_id),
            ModelInfo(info.type, info.path, info.key),
            load_now=request.load_now,
            sync=request.sync,
            last_used_ms=request.last_used_time,
            balanced=is_balanced(call.head.mesh),
            policy=ModelPolicy(request.min_copies, request.pinned),
        )
        return status_message(status)

    async def unregister_model(
        self, request: mmesh.UnregisterModelRequest, _call: IncomingCall
    ) -> mmesh.UnregisterModelResponse:
        """Unregister a model; an unknown one is a success."""
        await self._models.unregister(ModelId(request.model_id))
        return mmesh.UnregisterModelResponse()

    async def get_model_status(
        self, request: mmesh.GetStatusRequest, call: IncomingCall
    ) -> mmesh.ModelStatusInfo:
        """Answer the state of a model; a peer asks about our own copy only."""
        model_id = ModelId(request.model_id)
        if self._external:
            return status_message(await self._models.status(model_id))
        hop_call = self._hop_call(model_id, call)
        return status_message(await self._models.status(model_id, ask_peers=hop_call is None))

    async def ensure_loaded(
        self, request: mmesh.EnsureLoadedRequest, call: IncomingCall
    ) -> mmesh.ModelStatusInfo:
        """See that the model is loaded, or loading, somewhere; for a peer, here."""
        model_id = ModelId(request.model_id)
        ensure = EnsureRequest(
            model_id,
            request.sync,
            last_used_ms=request.last_used_time,
            balanced=is_balanced(call.head.mesh),
        )
        hop_call = None if self._external else self._hop_call(model_id, call)
        if hop_call is not None:
            hop_call.last_used_ms = request.last_used_time
        return status_message(await self._models.ensure_loaded(ensure, hop_call))

    def _hop_call(self, model_id: ModelId, call: IncomingCall) -> Call | None:
        hop = read_hop_request(call.head.mesh)
        if hop.hop is Hop.EXTERNAL:
            return None
        return hop.to_call(model_id, "", call.deadline_s)


def status_message(status: ModelStatus) -> mmesh.ModelStatusInfo:
    """Answer the message for a status."""
    return mmesh.ModelStatusInfo(
        status=mmesh.ModelStatusInfoModelStatus[status.status],
        errors=list(status.errors),
        model_copy_infos=[
            mmesh.ModelStatusInfoModelCopyInfo(
                location=copy.instance_id,
                copy_status=mmesh.ModelStatusInfoModelStatus[copy.status],
                time=at_most(copy.time_ms, UINT64_MAX),
            )
            for copy in status.copies
        ],
    )


def status_of(message: mmesh.ModelStatusInfo) -> ModelStatus:
    """Answer the status that a message tells; one that only a newer peer knows is UNKNOWN."""
    return ModelStatus(
        message.status.name or "UNKNOWN",
        tuple(message.errors),
        tuple(
            CopyStatus(InstanceId(info.location), info.copy_status.name or "UNKNOWN", info.time)
            for info in message.model_copy_infos
        ),
    )
