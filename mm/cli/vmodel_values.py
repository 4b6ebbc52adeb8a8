"""What commands tell of a vmodel: to people, and to programs.

Owns the fields of JSON and YAML, which docs/command-line.md documents for all commands in one
table, and the lines and cells of tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Final

from mm.cli.listing import Kind, name_of
from mm.cli.model_values import model_lines, status_value
from mm.cli.output import shown
from mm.pb.mmesh import ModelStatusInfo, VModelStatusInfo, VModelStatusInfoVModelStatus

COLUMNS: Final = ("VMODEL", "STATUS", "ACTIVE", "TARGET", "OWNER")


def status_name(status: int) -> str:
    """Answer the name of a vmodel's status."""
    return name_of(VModelStatusInfoVModelStatus, status)


def vmodel_value(vmodel_id: str, status: VModelStatusInfo) -> dict[str, Any]:
    """Answer a vmodel with what is told of its models."""
    return {
        "id": vmodel_id,
        "status": status_name(status.status),
        "owner": status.owner,
        "active": _model_value(status.active_model_id, status.active_model_status),
        "target": _model_value(status.target_model_id, status.target_model_status),
    }


def _model_value(model_id: str, info: ModelStatusInfo | None) -> dict[str, Any]:
    return {"id": model_id} if info is None else status_value(model_id, info)


def vmodel_text(vmodel_id: str, status: VModelStatusInfo) -> str:
    """Answer a vmodel as people read it."""
    owner = f", owner {shown(status.owner)}" if status.owner else ""
    lines = [f"{shown(vmodel_id)}: {status_name(status.status)}{owner}"]
    models = (
        ("active", status.active_model_id, status.active_model_status),
        ("target", status.target_model_id, status.target_model_status),
    )
    for role, model_id, info in models:
        # Of one that is not in transition the target is the active.
        if info is not None and model_id:
            first, *rest = model_lines(model_id, info)
            lines += [f"  {role} {first}", *(f"  {line}" for line in rest)]
    return "\n".join(lines)


def _cells(entry: Any) -> tuple[dict[str, Any], Sequence[str]]:
    name = status_name(entry.status)
    value = {
        "id": entry.vmodel_id,
        "status": name,
        "owner": entry.owner,
        "active": {"id": entry.active_model_id},
        "target": {"id": entry.target_model_id},
    }
    target = entry.target_model_id if name != "DEFINED" else ""
    return value, (entry.vmodel_id, name, entry.active_model_id, target, entry.owner)


KIND: Final = Kind(
    plural="vmodels",
    list_method="listVModels",
    watch_method="watchVModels",
    page_name="mmesh.ListVModelsResponse",
    entry_name="mmesh.ListedVModel",
    columns=COLUMNS,
    change_columns_count=len(COLUMNS),
    id_of=attrgetter("vmodel_id"),
    shown_as=_cells,
)
