"""The calls of the modelmesh-serving controller, and those of clients, as the tests make them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from mm.pb import inference, mmesh
from tests.pod.pods import CALL_TIMEOUT_S, Cluster, Pod
from tests.system.controller import Predictor
from tests.system.processes import eventually

MANAGEMENT: Final = "/mmesh.ModelMesh/"
INFER: Final = "/inference.GRPCInferenceService/ModelInfer"
Status = mmesh.ModelStatusInfoModelStatus
VStatus = mmesh.VModelStatusInfoVModelStatus


@dataclass(frozen=True, slots=True)
class Service:
    """An InferenceService, or a Predictor, of a cluster."""

    cluster: Cluster
    predictor: Predictor

    @classmethod
    def of(cls, cluster: Cluster, name: str, path: str = "ok", kind: str = "sklearn:0") -> Service:
        """Answer one that nobody knows yet."""
        return cls(cluster, Predictor(name, "isvc", path, f"mt:{kind}"))

    def with_path(self, path: str) -> Service:
        """Answer what a user makes of it who changes the path of the model."""
        return replace(self, predictor=replace(self.predictor, path=path))

    @property
    def name(self) -> str:
        """The id of the vmodel."""
        return self.predictor.name

    @property
    def model_id(self) -> str:
        """The id of the model."""
        return self.predictor.model_id

    def set(self, pod: Pod | None = None, *, load_now: bool = True) -> mmesh.VModelStatusInfo:
        """``setVModel``, with what the controller gives and nothing else."""
        request = mmesh.SetVModelRequest(
            v_model_id=self.name,
            owner=self.predictor.source,
            target_model_id=self.model_id,
            auto_delete_target_model=True,
            load_now=load_now,
            model_info=mmesh.ModelInfo(
                type=self.predictor.model_type, path=self.predictor.path, key=self.predictor.key
            ),
        )
        return self._call("setVModel", request, mmesh.VModelStatusInfo, pod)

    def delete(self, pod: Pod | None = None) -> None:
        """``deleteVModel``."""
        request = mmesh.DeleteVModelRequest(v_model_id=self.name, owner=self.predictor.source)
        self._call("deleteVModel", request, mmesh.DeleteVModelResponse, pod)

    def status(self, pod: Pod | None = None) -> mmesh.VModelStatusInfo:
        """``getVModelStatus``."""
        request = mmesh.GetVModelStatusRequest(v_model_id=self.name, owner=self.predictor.source)
        return self._call("getVModelStatus", request, mmesh.VModelStatusInfo, pod)

    def _call(self, method: str, request: Any, reply_type: Any, pod: Pod | None) -> Any:
        return (pod or self.cluster.pods[0]).call(MANAGEMENT + method, request, reply_type)

    def active(self) -> mmesh.ModelStatusInfo:
        """The active model's status."""
        active = self.status().active_model_status
        assert active is not None
        return active

    def wait(self, status: Status) -> mmesh.ModelStatusInfo:
        """Return when the active model is so, at every pod."""
        for pod in self.cluster.pods:

            def is_so(at: Pod = pod) -> bool:
                active = self.status(at).active_model_status
                return active is not None and active.status == status

            eventually(is_so, what=f"{self.name} is {status.name} at {pod.name}")
        return self.active()

    def bring_up(self) -> None:
        """Create it, and wait until it is loaded."""
        self.set()
        self.wait(Status.LOADED)

    def record(self) -> str | None:
        """The model's record in etcd."""
        return self.cluster.keys.get(self.cluster.key("registry", self.model_id))

    def infer(self, pod: Pod | None = None, text: str = "") -> tuple[str, bytes]:
        """``ModelInfer`` as clients call it: the id that the server saw, and the request."""
        return infer(pod or self.cluster.pods[0], self.name, text)


def infer(pod: Pod, name: str, text: str = "") -> tuple[str, bytes]:
    """Call ``ModelInfer`` for a vmodel that stands in the message."""
    request = inference.ModelInferRequest(model_name=name, id=text)
    answer: bytes = pod.call(INFER, request)
    model_id, _, seen = answer.partition(b"\n")
    return model_id.decode(), seen


__all__ = ["CALL_TIMEOUT_S", "Service", "Status", "VStatus", "infer"]
