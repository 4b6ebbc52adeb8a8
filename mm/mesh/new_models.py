"""What a model must be like to be registered: what is registered goes into one request to the
store, and into every instance's memory.
"""

from __future__ import annotations

from mm.config import Config
from mm.core.ids import ModelId
from mm.core.records import ModelInfo
from mm.errors import InvalidRequestError, LimitError
from mm.limits import Limits
from mm.mesh.id_checks import check_id_length
from mm.mesh.registry import Registry


def check_type(info: ModelInfo) -> None:
    """Raise ``InvalidRequestError`` for a model without a type."""
    if not info.model_type:
        raise InvalidRequestError("Must provide non-empty model type string")


def check_new_model(model_id: ModelId, info: ModelInfo, registry: Registry, config: Config) -> None:
    """Raise ``LimitError`` or ``InvalidRequestError`` if it cannot be registered."""
    # First what no setting could allow.
    check_id_length(model_id, config)
    _check_sizes(info, config)
    if config.models_max and len(registry) >= config.models_max:
        raise LimitError(
            f"{len(registry)} models are registered, the limit is {config.models_max}:"
            " unregister some, or set MM_MAX_MODELS higher on all instances"
        )


def _check_sizes(info: ModelInfo, limits: Limits) -> None:
    for name, value, bytes_max in (
        ("type", info.model_type, limits.type_bytes_max),
        ("path", info.path, limits.path_bytes_max),
        ("key", info.key, limits.key_bytes_max),
    ):
        length = len(value.encode())
        if length > bytes_max:
            raise InvalidRequestError(
                f"the {name} of a model has at most {bytes_max} bytes, this one {length}"
            )
