"""Which methods of the runtime may be called through the mesh (around 6.4)."""

from __future__ import annotations

from typing import Final

from mm.errors import MethodRefusedError
from mm.mesh.ports import RuntimeParameters

#: The service that manages the runtime is never reachable through the mesh.
MANAGEMENT_SERVICES: Final = (
    "/mmesh.ModelRuntime/",
    "/com.ibm.watson.tas.internal.proto.ModelServer/",
)


class Permissions:
    """What the runtime said of its methods when it became READY."""

    def __init__(self, parameters: RuntimeParameters) -> None:
        self._methods = parameters.methods
        self._allows_any = parameters.allow_any_method or not parameters.methods

    def injection_path(self, method: str) -> tuple[int, ...]:
        """Answer where the id goes in the messages of a method ("/pkg.Service/Method"; empty: a
        load). Raises ``MethodRefusedError``.
        """
        if not method:
            return ()
        name = method[1:]
        path = self._methods.get(name)
        if method.startswith(MANAGEMENT_SERVICES) or (path is None and not self._allows_any):
            raise MethodRefusedError(f"Method not found or not permitted: {name}")
        return path or ()
