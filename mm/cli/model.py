"""`mm model …`: the models of a mesh from a terminal or a script.

Owns the commands and what they show of a model; what the calls mean is spec around 5.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mm.cli.client_token import TokenFile, token_option
from mm.cli.errors import (
    EXIT_CODES_HELP,
    INTERRUPTED,
    NOT_FOUND,
    REFUSED,
    TIME_LIMIT,
    AccessError,
    CommandError,
    ExistsError,
)
from mm.cli.listing import Limit, print_changes, print_list, wanted_status
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
    way_to_register,
    ways_out,
)
from mm.cli.model_policy import policy
from mm.cli.model_values import (
    KIND,
    details,
    listed_value,
    model_lines,
    status_name,
    status_value,
)
from mm.cli.output import (
    Format,
    Output,
    emit_one,
    in_one_line,
    quoted,
    shown,
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

if TYPE_CHECKING:
    from grpclib.client import Channel

DEFAULT_TYPE: Final = "sklearn"
#: So many vmodels are named in an error.
REFERENTS_MAX: Final = 5

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
app.callback()(token_option)

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
    token_file: TokenFile = None,
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

    try:
        info = _waited_for(model_id, address, timeout, make, waits=wait)
    except ExistsError as exc:
        shell_id = quoted(model_id)
        raise CommandError(
            f"{exc}: `mm model get {shell_id}` shows them; take another id, or remove the model"
            f" first (`mm model unregister {shell_id}`)",
            exit_code=exc.exit_code,
        ) from exc
    _show(model_id, info, output)


@app.command()
def unregister(
    model_id: Id,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Remove a model and its copies from the mesh. Its files stay.

    One that is not there is no error.

    \b
    Example:
      mm model unregister iris
    """
    request = UnregisterModelRequest(model_id=model_id)

    async def make(stub: ModelMeshStub) -> bool:
        # The API answers the same whether or not there was one.
        wanted = GetStatusRequest(model_id=model_id)
        info = await stub.get_model_status(wanted, timeout=timeout)
        await stub.unregister_model(request, timeout=timeout)
        return info.status != ModelStatusInfoModelStatus.NOT_FOUND

    try:
        existed = ask(address, timeout, make)
    except CommandError as exc:
        if exc.exit_code != REFUSED or isinstance(exc, AccessError):
            raise
        way = _way_to_unregister(model_id, address, timeout)
        raise CommandError(f"{exc}; {way}", exit_code=REFUSED) from exc
    text = "unregistered" if existed else "there is no such model"
    emit_one(output, {"id": model_id, "existed": existed}, f"{shown(model_id)}: {text}")


@app.command()
def status(
    model_id: Id,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
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
    token_file: TokenFile = None,
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

    with ways_out({NOT_FOUND: way_to_register(model_id)}):
        info = _waited_for(model_id, address, timeout, make, waits=wait)
    _show(model_id, info, output)


@app.command()
def get(
    model_id: Id,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Tell all that the mesh knows of a model. Loads nothing; exit codes as of `status`.

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
            return info, await _listed(channel, model_id, timeout)

    info, entry = asyncio.run(find())
    if entry is None:
        _show(model_id, info, output)
        return
    value = listed_value(entry) | status_value(model_id, info)
    emit_one(output, value, _as_text(model_id, info, details(value)))
    exit_by_status(status_name(info.status))


@app.command("list")
def list_models(
    prefix: Annotated[str, typer.Option(help="Only ids that begin with it.")] = "",
    model_type: Annotated[str, typer.Option("--type", help="Only models of this type.")] = "",
    with_status: Annotated[
        str, typer.Option("--status", help="Only models with it: LOADED, for example.")
    ] = "",
    limit: Limit = 0,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """List models by id, as an instance of the mesh knows them.

    They come page by page; --timeout is for each. Loads nothing and asks nobody else. What was
    never called counts as used some hours before it was registered.

    \b
    Examples:
      mm model list
      mm model list --status LOADING_FAILED
      mm model list --prefix fraud- --limit 20 -o json
    """
    request = _request(prefix, model_type, with_status)
    print_list(KIND, request, limit, address, timeout, output)


@app.command()
def watch(
    model_id: Annotated[str | None, typer.Argument(metavar="ID", help="Only this model.")] = None,
    prefix: Annotated[str, typer.Option(help="Only ids that begin with it.")] = "",
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
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
    print_changes(KIND, request, model_id, prefix, address, timeout, output)


app.command()(policy)


# --- asking ---------------------------------------------------------------------------------------


def _request(prefix: str = "", model_type: str = "", status_name: str = "") -> Any:
    from mm.edge.protobuf import message_class

    wanted = wanted_status(ModelStatusInfoModelStatus, status_name)
    return message_class("mmesh.ListModelsRequest")(
        page_size=PAGE_SIZE, id_prefix=prefix, type=model_type, status=int(wanted)
    )


async def _listed(channel: Channel, model_id: str, timeout_s: float) -> Any:
    """Answer the entry of a model in the list; None if there is none."""
    wanted = _request(prefix=model_id)
    wanted.page_size = 1
    async for page in pages(channel, KIND.list_method, KIND.page_name, wanted, timeout_s):
        return next((e for e in page.models if e.model_id == model_id), None)
    raise AssertionError("there is always a first page")


def _way_to_unregister(model_id: str, address: str, timeout: float) -> str:
    """Answer what to do about a model that is in use: the mesh tells of vmodels, but not which."""

    async def find() -> Any:
        async with connected(address, timeout) as channel:
            return await _listed(channel, model_id, timeout)

    entry = asyncio.run(find())
    names = [quoted(each) for each in entry.vmodel_ids] if entry else []
    if not names:  # perhaps they have just gone
        return f"`mm model get {quoted(model_id)}` tells what refers to it"
    told = ", ".join(names[:REFERENTS_MAX]) + (", …" if len(names) > REFERENTS_MAX else "")
    many = len(names) > 1
    return (
        f"vmodel{'s' * many} {told} {'refer' if many else 'refers'} to it: set"
        f" {'each' if many else 'it'} to another model first, or delete it, as by"
        f" `mm vmodel delete {names[0]}`"
    )


def _waited_for(
    model_id: str, address: str, timeout: float, make: Any, *, waits: bool
) -> ModelStatusInfo:
    """Ask for a load, and say how far it is if that takes a while."""

    async def look(stub: ModelMeshStub) -> str:
        info = await stub.get_model_status(GetStatusRequest(model_id=model_id), timeout=timeout)
        return in_one_line(_as_text(model_id, info))

    way = f"the load goes on without this command: `mm model get {quoted(model_id)}` tells how far"
    with ways_out({TIME_LIMIT: way, INTERRUPTED: way} if waits else {}):
        info: ModelStatusInfo = ask_and_look(address, timeout, make, look)
    return info


# --- showing --------------------------------------------------------------------------------------


def _show(model_id: str, info: ModelStatusInfo, output: Format) -> None:
    emit_one(output, status_value(model_id, info), _as_text(model_id, info))
    exit_by_status(status_name(info.status))


def _as_text(model_id: str, info: ModelStatusInfo, details: Sequence[str] = ()) -> str:
    return "\n".join(model_lines(model_id, info, details))
