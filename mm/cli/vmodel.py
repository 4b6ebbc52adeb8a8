"""`mm vmodel …`: names that stay while the model behind them is exchanged.

Owns the commands and what they show of a vmodel; what the calls mean is spec core 6.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mm.cli.client_token import TokenFile, token_option
from mm.cli.errors import (
    EXIT_CODES_HELP,
    INTERRUPTED,
    MISUSED,
    NOT_FOUND,
    REFUSED,
    TIME_LIMIT,
    CommandError,
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
    exit_by_status,
    ways_out,
)
from mm.cli.model import DEFAULT_TYPE
from mm.cli.output import Format, Output, emit_one, in_one_line, quoted, shown
from mm.cli.vmodel_values import KIND, status_name, vmodel_text, vmodel_value
from mm.pb.mmesh import (
    DeleteVModelRequest,
    EnsureLoadedRequest,
    GetVModelStatusRequest,
    ModelInfo,
    ModelMeshStub,
    SetVModelRequest,
    VModelStatusInfo,
    VModelStatusInfoVModelStatus,
)
from mm.pb.mmesh import ModelStatusInfoModelStatus as ModelStatus

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Give models a name that stays when the model is exchanged.\n\n"
    "Calls name the vmodel in the header mm-vmodel-id. When it is set to another model, that is "
    "loaded as much as the one that serves, and then takes over; no call fails for it. If it "
    "cannot be loaded, the one that served goes on.\n\n"
    f"{ADDRESS_HELP} {EXIT_CODES_HELP}\n\n"
    "\b\n"
    "Examples:\n"
    "  mm vmodel set flowers iris-1\n"
    "  mm vmodel set flowers iris-2 --path iris-2.joblib --wait\n"
    "  mm vmodel get flowers\n"
    "  mm vmodel list --status TRANSITION_FAILED -o json\n"
    "  mm vmodel delete flowers",
)
app.callback()(token_option)

Id = Annotated[str, typer.Argument(metavar="ID", help="The vmodel's id.")]
Owner = Annotated[
    str, typer.Option(help="Whose vmodel it is; one of somebody else is left alone. Empty: any.")
]
Expected = Annotated[
    str,
    typer.Option(
        metavar="CURRENT",
        help="Only if CURRENT or MODEL is the target now, else exit code 4. One that does not"
        " exist is made only if CURRENT is MODEL, and not with --update-only.",
    ),
]


@app.command("set")
def set_vmodel(
    vmodel_id: Id,
    target_id: Annotated[str, typer.Argument(metavar="MODEL", help="The model's id.")],
    path: Annotated[str, typer.Option(help="Register the model, too: where it is.")] = "",
    model_type: Annotated[
        str, typer.Option("--type", help=f"Register it: its type; {DEFAULT_TYPE} unless given.")
    ] = "",
    key: Annotated[str, typer.Option(help="Register it: what else the runtime needs.")] = "",
    auto_delete: Annotated[
        bool,
        typer.Option("--auto-delete", help="Registered here, it goes when no vmodel names it."),
    ] = False,
    owner: Owner = "",
    expect: Expected = "",
    update_only: Annotated[
        bool, typer.Option("--update-only", help="Only if there is such a vmodel, else code 3.")
    ] = False,
    load: Annotated[bool, typer.Option("--load", help="Load the model now in any case.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Switch at once, loaded or not: calls may wait.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the model serves, or cannot.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 240.0,
    output: Output = Format.TABLE,
) -> None:
    """Have a vmodel stand for a model. It is made if there is none; setting it again is no error.

    With --path, --type or --key the model is registered, too; else it has to be. Exit code 1 if the
    model cannot be loaded: then the one that served before goes on; and with --wait 4 if the vmodel
    was set to another model meanwhile.

    \b
    Examples:
      mm vmodel set flowers iris-1
      mm vmodel set flowers iris-2 --path iris-2.joblib --auto-delete --wait
      mm vmodel set flowers iris-3 --expect iris-2
    """
    info = None
    if path or model_type or key:
        info = ModelInfo(type=model_type or DEFAULT_TYPE, path=path, key=key)
    elif auto_delete:
        raise CommandError(
            "--auto-delete is for a model that is registered here: give its --path, too",
            exit_code=MISUSED,
        )
    request = SetVModelRequest(
        v_model_id=vmodel_id,
        target_model_id=target_id,
        model_info=info,
        auto_delete_target_model=auto_delete,
        owner=owner,
        expected_target_model_id=expect,
        update_only=update_only,
        load_now=load or wait,
        force=force,
        sync=wait,
    )

    with ways_out(_ways_out(request)):
        status = _set(request, address, timeout)
    if wait:
        _show_end(vmodel_id, target_id, status, output)
    else:
        _show(vmodel_id, status, output)


def _ways_out(request: SetVModelRequest) -> dict[int, str]:
    vmodel, target = quoted(request.v_model_id), quoted(request.target_model_id)
    ways = {REFUSED: f"`mm vmodel get {vmodel}` and `mm model get {target}` tell what is there"}
    if request.model_info is None and not request.update_only:
        ways[NOT_FOUND] = f"register it (`mm model register {target}`), or give its --path, too"
    if request.sync:
        way = f"what is set goes on without this command: `mm vmodel get {vmodel}` tells how far"
        ways[TIME_LIMIT] = ways[INTERRUPTED] = way
    return ways


def _set(request: SetVModelRequest, address: str, timeout: float) -> VModelStatusInfo:
    """Set it, and with ``sync`` wait until the model serves; says meanwhile how far it is."""
    from grpclib.exceptions import GRPCError

    vmodel_id, target_id = request.v_model_id, request.target_model_id
    wanted = GetVModelStatusRequest(v_model_id=vmodel_id, owner=request.owner)

    async def make(stub: ModelMeshStub) -> VModelStatusInfo:
        status = await stub.set_v_model(request, timeout=timeout)
        active = status.active_model_status
        if not request.sync or active is None or status.active_model_id != target_id:
            return status
        if active.status not in (ModelStatus.LOADED, ModelStatus.LOADING_FAILED):
            # The API waits for transitions, and for models that it registers.
            ensure = EnsureLoadedRequest(model_id=target_id, sync=True)
            try:
                await stub.ensure_loaded(ensure, timeout=timeout)
            except GRPCError as exc:
                text = f"the vmodel is set, but {target_id} is not loaded: {exc.message}"
                raise GRPCError(exc.status, text, exc.details) from exc
            status = await stub.get_v_model_status(wanted, timeout=timeout)
        return status

    async def look(stub: ModelMeshStub) -> str:
        status = await stub.get_v_model_status(wanted, timeout=timeout)
        return in_one_line(vmodel_text(vmodel_id, status))

    return ask_and_look(address, timeout, make, look)


@app.command()
def get(
    vmodel_id: Id,
    owner: Owner = "",
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Tell what a vmodel stands for. Exit code 3 if there is none, 1 if a model cannot be loaded.

    \b
    Examples:
      mm vmodel get flowers
      mm vmodel get flowers -o yaml
    """
    request = GetVModelStatusRequest(v_model_id=vmodel_id, owner=owner)
    status = ask(address, timeout, lambda stub: stub.get_v_model_status(request, timeout=timeout))
    _show(vmodel_id, status, output)


@app.command()
def delete(
    vmodel_id: Id,
    owner: Owner = "",
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Delete a vmodel, and its --auto-delete models that no other names.

    One that is not there is no error. One of another owner than --owner stays: exit code 4.

    \b
    Example:
      mm vmodel delete flowers
    """
    request = DeleteVModelRequest(v_model_id=vmodel_id, owner=owner)

    async def make(stub: ModelMeshStub) -> tuple[bool, VModelStatusInfo]:
        # The API answers the same whether or not there was one, and whether or not it was theirs.
        wanted = GetVModelStatusRequest(v_model_id=vmodel_id)
        before = await stub.get_v_model_status(wanted, timeout=timeout)
        await stub.delete_v_model(request, timeout=timeout)
        left = VModelStatusInfo()
        if owner:
            left = await stub.get_v_model_status(wanted, timeout=timeout)
        return before.status != VModelStatusInfoVModelStatus.NOT_FOUND, left

    existed, left = ask(address, timeout, make)
    if left.active_model_id and left.owner != owner:
        theirs, way = (
            (repr(left.owner), "give that one, or no --owner")
            if left.owner
            else ("nobody", "give no --owner")
        )
        raise CommandError(
            f"vmodel {shown(vmodel_id)} stays: its owner is {theirs}, not {owner!r}; {way}",
            exit_code=REFUSED,
        )
    text = "deleted" if existed else "there is no such vmodel"
    emit_one(output, {"id": vmodel_id, "existed": existed}, f"{shown(vmodel_id)}: {text}")


@app.command("list")
def list_vmodels(
    prefix: Annotated[str, typer.Option(help="Only ids that begin with it.")] = "",
    owner: Annotated[str, typer.Option(help="Only vmodels of this owner.")] = "",
    with_status: Annotated[
        str, typer.Option("--status", help="Only vmodels with it: TRANSITIONING, for example.")
    ] = "",
    limit: Limit = 0,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """List vmodels by id, as an instance of the mesh knows them.

    They come page by page; --timeout is for each page.

    \b
    Examples:
      mm vmodel list
      mm vmodel list --owner ksp --status TRANSITION_FAILED
      mm vmodel list --prefix fraud- -o yaml
    """
    request = _request(prefix, owner, with_status)
    print_list(KIND, request, limit, address, timeout, output)


@app.command()
def watch(
    vmodel_id: Annotated[str | None, typer.Argument(metavar="ID", help="Only this vmodel.")] = None,
    prefix: Annotated[str, typer.Option(help="Only ids that begin with it.")] = "",
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Print vmodels as they are, then each change, until Ctrl-C.

    Several changes in a row may be printed as one; the last one always is. --timeout is for the
    answers before the first change. JSON comes as one object a line, YAML as one document each.

    \b
    Examples:
      mm vmodel watch flowers
      mm vmodel watch --prefix fraud- -o json
    """
    request = _request(vmodel_id or prefix)
    print_changes(KIND, request, vmodel_id, prefix, address, timeout, output)


# --- asking and showing ---------------------------------------------------------------------------


def _request(prefix: str = "", owner: str = "", status_name: str = "") -> Any:
    from mm.edge.protobuf import message_class

    wanted = wanted_status(VModelStatusInfoVModelStatus, status_name)
    return message_class("mmesh.ListVModelsRequest")(
        page_size=PAGE_SIZE, id_prefix=prefix, owner=owner, status=int(wanted)
    )


def _show(vmodel_id: str, status: VModelStatusInfo, output: Format) -> None:
    _emit(vmodel_id, status, output)
    exit_by_status(status_name(status.status))
    exit_by_status("LOADING_FAILED" if _cannot_load(status) else "")


def _show_end(vmodel_id: str, target_id: str, status: VModelStatusInfo, output: Format) -> None:
    """Show how a wait for ``target_id`` ended: well only if that serves."""
    is_gone = status.status == VModelStatusInfoVModelStatus.NOT_FOUND
    has_failed = status.status == VModelStatusInfoVModelStatus.TRANSITION_FAILED
    is_ours = target_id == status.active_model_id or (
        has_failed and target_id == status.target_model_id
    )
    if has_failed and is_ours:
        _emit(vmodel_id, status, output)
        active_id = status.active_model_id
        raise CommandError(
            f"vmodel {shown(vmodel_id)} stays with {shown(active_id)}: {shown(target_id)} cannot be"
            " loaded; the mesh goes on trying, and"
            f" `mm vmodel set {quoted(vmodel_id)} {quoted(active_id)}` has it give up"
        )
    if is_gone or is_ours:
        _show(vmodel_id, status, output)
        return
    _emit(vmodel_id, status, output)
    raise CommandError(
        f"overtaken by another set: vmodel {shown(vmodel_id)} was to stand for {shown(target_id)},"
        f" and is set to {shown(status.target_model_id)} now",
        exit_code=REFUSED,
    )


def _emit(vmodel_id: str, status: VModelStatusInfo, output: Format) -> None:
    emit_one(output, vmodel_value(vmodel_id, status), vmodel_text(vmodel_id, status))


def _cannot_load(status: VModelStatusInfo) -> bool:
    active = status.active_model_status
    return active is not None and active.status == ModelStatus.LOADING_FAILED
