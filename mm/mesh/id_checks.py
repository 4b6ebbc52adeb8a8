"""What may be an id of a model or vmodel, said in one place and with one text each (around 5).

An id is any text that is not empty, up to a length: "/", "..", spaces and letters of any script are
as good as others, for a key of the store is the id as it is (interop 2.2).
"""

from __future__ import annotations

from typing import Final

from mm.errors import InvalidRequestError
from mm.limits import Limits
from mm.mesh.mirror import Mirror

#: With these the Java mesh tells anybody who asks for their status what an instance holds.
DEBUG_IDS: Final = frozenset({"***LOGCACHE***", "***GETSTATE***"})


def check_model_id(model_id: str) -> None:
    """Raise ``InvalidRequestError`` for what cannot be the id of a model."""
    if not model_id:
        raise InvalidRequestError("must provide non-empty modelId")
    if model_id in DEBUG_IDS:
        raise InvalidRequestError(
            f"{model_id} is a debug id of the Java model-mesh, which is not supported and cannot be"
            " a model: ask for the status of models by their own ids"
        )


def check_vmodel_id(vmodel_id: str) -> None:
    """Raise ``InvalidRequestError`` for what cannot be the id of a vmodel."""
    if not vmodel_id:
        raise InvalidRequestError("must provide non-empty vModelId")


def check_length_of_new(key_id: str, mirror: Mirror, limits: Limits) -> None:
    """Raise ``InvalidRequestError`` for an id that is not there, and too long to be."""
    if mirror.get(key_id) is None:
        check_id_length(key_id, limits)


def check_id_length(key_id: str, limits: Limits) -> None:
    """Raise ``InvalidRequestError`` for an id that is too long to be registered.

    Apart from the rest because one that is there already is served, whatever its length.
    """
    bytes_max = limits.id_bytes_max
    if 4 * len(key_id) > bytes_max and (length := len(key_id.encode())) > bytes_max:
        raise InvalidRequestError(
            f"an id has at most {bytes_max} bytes, this one {length}: use a shorter one, or a hash"
        )
