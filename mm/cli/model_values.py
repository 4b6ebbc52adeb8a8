"""What commands tell of a model: to people, and to programs.

Owns the fields of JSON and YAML, which docs/command-line.md documents for all commands in one
table, and the lines and cells of tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Final

from mm.cli.listing import Kind, name_of
from mm.cli.output import shown, shown_size, shown_time
from mm.pb.mmesh import ModelStatusInfo, ModelStatusInfoModelStatus

COLUMNS: Final = ("MODEL", "STATUS", "COPIES", "SIZE", "LAST USED", "TYPE", "POLICY", "VMODELS",
                  "PATH")  # fmt: skip


def status_name(status: int) -> str:
    """Answer the name of a model's status."""
    return name_of(ModelStatusInfoModelStatus, status)


def status_value(model_id: str, info: ModelStatusInfo) -> dict[str, Any]:
    """Answer a model of which only the status is told, or which there is not."""
    copies = ((each.location, each.copy_status, each.time) for each in info.model_copy_infos)
    return _status_value(model_id, info, copies)


def _status_value(
    model_id: str, info: Any, copies: Iterable[tuple[str, int, int]]
) -> dict[str, Any]:
    return {
        "id": model_id,
        "status": status_name(info.status),
        "errors": list(info.errors),
        "copies": [
            {"instance": location, "status": status_name(status), "time_ms": time_ms}
            for location, status, time_ms in copies
        ],
    }


def listed_value(entry: Any) -> dict[str, Any]:
    """Answer a listed model; of one that went there is nothing but its status."""
    info = entry.status
    # Read by another codec than a status is, with the names as they stand in the proto file.
    copies = ((each.location, each.copyStatus, each.time) for each in info.modelCopyInfos)
    value = _status_value(entry.model_id, info, copies)
    if info.status == ModelStatusInfoModelStatus.NOT_FOUND:
        return value
    return value | {
        "type": entry.type,
        "path": entry.path,
        "last_used_ms": entry.last_used_ms,
        "size_bytes": entry.size_bytes,
        "min_copies": entry.min_copies,
        "pinned": entry.pinned,
        "references": entry.references,
        "vmodels": list(entry.vmodel_ids),
    }


def _cells(entry: Any) -> tuple[dict[str, Any], Sequence[str]]:
    value = listed_value(entry)
    first = (value["id"], value["status"], _copies_text(value))
    if "type" not in value:
        return value, first
    return value, (
        *first,
        shown_size(value["size_bytes"]),
        shown_time(value["last_used_ms"]) if value["last_used_ms"] else "",
        value["type"],
        _policy_text(value),
        _vmodels_text(value),
        value["path"],
    )


KIND: Final = Kind(
    plural="models",
    list_method="listModels",
    watch_method="watchModels",
    page_name="mmesh.ListModelsResponse",
    entry_name="mmesh.ListedModel",
    columns=COLUMNS,
    change_columns_count=4,
    id_of=attrgetter("model_id"),
    shown_as=_cells,
)


def _copies_text(value: dict[str, Any]) -> str:
    states = [copy["status"] for copy in value["copies"]]
    words = {"LOADED": "ready", "LOADING": "loading", "LOADING_FAILED": "failed"}
    counts = {word: states.count(name) for name, word in words.items()}
    counts["unknown"] = len(states) - sum(counts.values())
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def _policy_text(value: dict[str, Any]) -> str:
    copies = f"min-copies {value['min_copies']}" if value["min_copies"] else ""
    return ", ".join(filter(None, (copies, "pinned" if value["pinned"] else "")))


def _vmodels_text(value: dict[str, Any]) -> str:
    told = ", ".join(value["vmodels"])
    return told if len(value["vmodels"]) < 100 else f"{told}, …"


def details(value: dict[str, Any]) -> list[str]:
    """Answer lines about a listed model, to stand below its status."""
    used = shown_time(value["last_used_ms"]) if value["last_used_ms"] else ""
    return [
        f"  {name} {shown(text)}"
        for name, text in (
            ("type", value["type"]),
            ("path", value["path"]),
            ("size", shown_size(value["size_bytes"])),
            ("last used", used),
            ("policy:", _policy_text(value)),
            ("vmodels:", _vmodels_text(value)),
        )
        if text
    ]


def model_lines(model_id: str, info: ModelStatusInfo, details: Sequence[str] = ()) -> list[str]:
    """Answer a status as people read it."""
    lines = [f"{shown(model_id)}: {status_name(info.status)}", *details]
    for copy in info.model_copy_infos:
        # Of a Java mesh, whose records do not tell loading from loaded: it would only alarm people.
        is_told = copy.copy_status != ModelStatusInfoModelStatus.UNKNOWN
        state = f": {status_name(copy.copy_status)}" if is_told else ""
        # The load's begin is what records hold of a copy; of a failure, when it was.
        has_failed = copy.copy_status == ModelStatusInfoModelStatus.LOADING_FAILED
        when = f"{' since' if has_failed else ', load begun'} {shown_time(copy.time)}"
        lines.append(f"  copy on {shown(copy.location)}{state}{when}")
    lines.extend(f"  error: {shown(error)}" for error in info.errors)
    return lines
