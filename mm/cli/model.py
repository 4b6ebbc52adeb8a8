"""`mm model …`: the models of a mesh from a terminal or a script.

Owns the commands and what they show of a model; what the calls mean is spec around 5.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from operator import attrgetter
from typing import Annotated, Any, Final

import typer

from mm.cli.errors import EXIT_CODES_HELP, REFUSED
from mm.cli.listing import Kind, Limit, name_of, print_changes, print_list, wanted_status
from mm.cli.mesh import (
    ADDRESS_HELP,
    DEFAULT_ADDRESS,
    PAGE_SIZE,
    Address,
    Timeout,
    ask,
    ask_and_look,
    connected,
    exit_by_status,
    pages,
    ways_out,
)
from mm.cli.model_policy import policy
from mm.cli.output import (
    Format,
    Output,
    emit_one,
    in_one_line,
    quoted,
    shown,
    shown_size,
    shown_time,
)
from mm.cli.values import count
from mm.pb.mmesh import (
    EnsureLoadedRequest,
    GetStatusRequest,
    ModelInfo,
    ModelMeshStub,
    ModelStatusInfo,
    ModelStatusInfoModelStatus,
    RegisterModelRequest,
    UnregisterModelRequest,
)

DEFAULT_TYPE: Final = "sklearn"
COLUMNS: Final = ("MODEL", "STATUS", "COPIES", "SIZE", "LAST USED", "TYPE", "POLICY", "VMODELS",
                  "PATH")  # fmt: skip

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Register, unregister, load and look at models of a mesh.\n\n"
    f"{ADDRESS_HELP} {EXIT_CODES_HELP}\n\n"
    "\b\n"
    "Examples:\n"
    "  mm model register iris --path iris.joblib --wait\n"
    "  mm model get iris\n"
    "  mm model list --prefix i -o json\n"
    "  MM_ADDRESS=mesh.example:8033 mm model ensure-loaded iris\n"
    "  mm model policy iris --min-copies 2 --pinned\n"
    "  mm model unregister iris",
)

Id = Annotated[str, typer.Argument(metavar="ID", help="The model's id.")]


@app.command()
def register(
    model_id: Id,
    path: Annotated[
        str, typer.Option(help="Where the runtime finds the model: for it to understand.")
    ] = "",
    model_type: Annotated[
        str, typer.Option("--type", help="The model's type: for the runtime to understand.")
    ] = DEFAULT_TYPE,
    key: Annotated[str, typer.Option(help="Anything else that the runtime needs to know.")] = "",
    load: Annotated[bool, typer.Option("--load", help="Load it now, not at its first call.")] = (
        False
    ),
    wait: Annotated[bool, typer.Option("--wait", help="Load it now and wait until it is.")] = False,
    min_copies: Annotated[
        int,
        typer.Option(
            metavar="N", parser=count, help="Keep at least so many copies, called or not."
        ),
    ] = 0,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Never evict its copies for other models.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 120.0,
    output: Output = Format.TABLE,
) -> None:
    """Register a model, so that it can be called. Registering it again the same way is no error.

    \b
    Examples:
      mm model register iris --path iris.joblib
      mm model register iris --path iris.joblib --type sklearn --wait -o json
    """
    request = RegisterModelRequest(
        model_id=model_id,
        model_info=ModelInfo(type=model_type, path=path, key=key),
        load_now=load or wait,
        sync=wait,
        min_copies=min_copies,
        pinned=pinned,
    )

    async def make(stub: ModelMeshStub) -> ModelStatusInfo:
        return await stub.register_model(request, timeout=timeout)

    _show(model_id, _waited_for(model_id, address, timeout, make), output)


@app.command()
def unregister(
    model_id: Id,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Remove a model and its copies from the mesh. Its files stay; an unknown id is no error.

    \b
    Example:
      mm model unregister iris
    """
    request = UnregisterModelRequest(model_id=model_id)
    way = f"set or delete the vmodels first that `mm model get {quoted(model_id)}` tells of"
    with ways_out({REFUSED: way}):
        ask(address, timeout, lambda stub: stub.unregister_model(request, timeout=timeout))
    emit_one(output, {"id": model_id}, f"{shown(model_id)}: unregistered")


@app.command()
def status(
    model_id: Id,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Tell where a model stands, without loading it. Exit code 3 if it is unknown, 1 if it failed.

    \b
    Examples:
      mm model status iris
      mm model status iris -o json
    """
    request = GetStatusRequest(model_id=model_id)
    info = ask(address, timeout, lambda stub: stub.get_model_status(request, timeout=timeout))
    _show(model_id, info, output)


@app.command("ensure-loaded")
def ensure_loaded(
    model_id: Id,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the load has ended.")
    ] = True,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 120.0,
    output: Output = Format.TABLE,
) -> None:
    """Load a model somewhere in the mesh, unless it is loaded. Exit code 1 if that failed.

    \b
    Example:
      mm model ensure-loaded iris
    """
    request = EnsureLoadedRequest(model_id=model_id, sync=wait)

    async def make(stub: ModelMeshStub) -> ModelStatusInfo:
        return await stub.ensure_loaded(request, timeout=timeout)

    _show(model_id, _waited_for(model_id, address, timeout, make), output)


@app.command()
def get(
    model_id: Id,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Tell all that the mesh knows of a model, without loading it. Exit codes as of `status`.

    \b
    Examples:
      mm model get iris
      mm model get iris -o yaml
    """

    async def find() -> tuple[ModelStatusInfo, Any]:
        async with connected(address, timeout) as channel:
            request = GetStatusRequest(model_id=model_id)
            # This first: the instance looks up what it does not know yet.
            info = await ModelMeshStub(channel).get_model_status(request, timeout=timeout)
            wanted = _request(prefix=model_id)
            wanted.page_size = 1
            async for page in pages(channel, _KIND.list_method, _KIND.page_name, wanted, timeout):
                return info, next((e for e in page.models if e.model_id == model_id), None)
        raise AssertionError("there is always a first page")

    info, entry = asyncio.run(find())
    if entry is None:
        _show(model_id, info, output)
        return
    value = {**_value(entry), **model_value(info)}
    emit_one(output, value, _as_text(model_id, info, _details(value)))
    exit_by_status(_name_of(info.status))


@app.command("list")
def list_models(
    prefix: Annotated[str, typer.Option(help="Only ids that begin with it.")] = "",
    model_type: Annotated[str, typer.Option("--type", help="Only models of this type.")] = "",
    with_status: Annotated[
        str, typer.Option("--status", help="Only models with it: LOADED, for example.")
    ] = "",
    limit: Limit = 0,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """List the models of the mesh by id, page by page, as an instance knows them.

    Loads nothing and asks nobody else. What was never called counts as used some hours before it
    was registered. --timeout is for each page.

    \b
    Examples:
      mm model list
      mm model list --status LOADING_FAILED
      mm model list --prefix fraud- --limit 20 -o json
    """
    request = _request(prefix, model_type, with_status)
    print_list(_KIND, request, limit, address, timeout, output)


@app.command()
def watch(
    model_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this model.")] = None,
    prefix: Annotated[str, typer.Option(help="Only ids that begin with it.")] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Print models as they are, then each change, until Ctrl-C.

    Several changes in a row may be printed as one; the last one always is. --timeout is for the
    answers before the first change. JSON comes as one object a line, YAML as one document each.

    \b
    Examples:
      mm model watch iris
      mm model watch --prefix fraud- -o json
    """
    request = _request(model_id or prefix)
    print_changes(_KIND, request, model_id, prefix, address, timeout, output)


app.command()(policy)


# --- asking ---------------------------------------------------------------------------------------


def _request(prefix: str = "", model_type: str = "", status_name: str = "") -> Any:
    from mm.edge.protobuf import message_class

    wanted = wanted_status(ModelStatusInfoModelStatus, status_name)
    return message_class("mmesh.ListModelsRequest")(
        page_size=PAGE_SIZE, id_prefix=prefix, type=model_type, status=int(wanted)
    )


def _waited_for(model_id: str, address: str, timeout: float, make: Any) -> ModelStatusInfo:
    """Ask for a load, and say how far it is if that takes a while."""

    async def look(stub: ModelMeshStub) -> str:
        info = await stub.get_model_status(GetStatusRequest(model_id=model_id), timeout=timeout)
        return in_one_line(_as_text(model_id, info))

    info: ModelStatusInfo = ask_and_look(address, timeout, make, look)
    return info


# --- showing --------------------------------------------------------------------------------------


def _show(model_id: str, info: ModelStatusInfo, output: Format) -> None:
    emit_one(output, {"id": model_id, **model_value(info)}, _as_text(model_id, info))
    exit_by_status(_name_of(info.status))


def _name_of(status: int) -> str:
    return name_of(ModelStatusInfoModelStatus, status)


def model_value(info: ModelStatusInfo) -> dict[str, Any]:
    """Answer a status as JSON and YAML tell it."""
    return {
        "status": _name_of(info.status),
        "errors": list(info.errors),
        "copies": [
            {"instance": c.location, "status": _name_of(c.copy_status), "time_ms": c.time}
            for c in info.model_copy_infos
        ],
    }


def _value(entry: Any) -> dict[str, Any]:
    """Answer a listed model as JSON and YAML tell it."""
    info = entry.status
    return {
        "id": entry.model_id,
        "type": entry.type,
        "path": entry.path,
        "status": _name_of(info.status),
        "errors": list(info.errors),
        "copies": [
            {"instance": c.location, "status": _name_of(c.copyStatus), "time_ms": c.time}
            for c in info.modelCopyInfos
        ],
        "last_used_ms": entry.last_used_ms,
        "size_bytes": entry.size_bytes,
        "min_copies": entry.min_copies,
        "pinned": entry.pinned,
        "references": entry.references,
        "vmodels": list(entry.vmodel_ids),
    }


def _entry(entry: Any) -> tuple[dict[str, Any], Sequence[str]]:
    value = _value(entry)
    return value, (
        value["id"],
        value["status"],
        _copies_text(value),
        shown_size(value["size_bytes"]),
        shown_time(value["last_used_ms"]) if value["last_used_ms"] else "",
        value["type"],
        _policy_text(value),
        _vmodels_text(value),
        value["path"],
    )


_KIND: Final = Kind(
    plural="models",
    list_method="listModels",
    watch_method="watchModels",
    page_name="mmesh.ListModelsResponse",
    entry_name="mmesh.ListedModel",
    columns=COLUMNS,
    change_columns_count=4,
    id_of=attrgetter("model_id"),
    shown_as=_entry,
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


def _details(value: dict[str, Any]) -> list[str]:
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


def _as_text(model_id: str, info: ModelStatusInfo, details: Sequence[str] = ()) -> str:
    return "\n".join(model_lines(model_id, info, details))


def model_lines(model_id: str, info: ModelStatusInfo, details: Sequence[str] = ()) -> list[str]:
    """Answer a status as people read it."""
    lines = [f"{shown(model_id)}: {_name_of(info.status)}", *details]
    for copy in info.model_copy_infos:
        # Of a Java mesh, whose records do not tell loading from loaded: it would only alarm people.
        is_told = copy.copy_status != ModelStatusInfoModelStatus.UNKNOWN
        state = f": {_name_of(copy.copy_status)}" if is_told else ""
        # The load's begin is what records hold of a copy; of a failure, when it was.
        has_failed = copy.copy_status == ModelStatusInfoModelStatus.LOADING_FAILED
        when = f"{' since' if has_failed else ', load begun'} {shown_time(copy.time)}"
        lines.append(f"  copy on {shown(copy.location)}{state}{when}")
    lines.extend(f"  error: {shown(error)}" for error in info.errors)
    return lines
