"""`mm model policy`: how many copies of a model the mesh keeps, and whether they are pinned.

Owns the command and what it shows; what a policy means is ``mm.core.model_policy``'s.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mm.cli.client_token import TokenFile
from mm.cli.errors import NOT_FOUND
from mm.cli.mesh import DEFAULT_ADDRESS, Address, Timeout, ask, way_to_register, ways_out
from mm.cli.output import Format, Output, emit_one, shown
from mm.cli.values import count
from mm.pb.mmesh import ModelPolicyInfo, SetModelPolicyRequest


def policy(
    model_id: Annotated[str, typer.Argument(metavar="ID", help="The model's id.")],
    min_copies: Annotated[
        int | None,
        typer.Option(
            metavar="N", parser=count, help="Keep at least so many copies, called or not; 0: none."
        ),
    ] = None,
    pinned: Annotated[
        bool | None,
        typer.Option("--pinned/--unpinned", help="Never evict its copies for other models."),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    token_file: TokenFile = None,
    timeout: Timeout = 30.0,
    output: Output = Format.TABLE,
) -> None:
    """Say how many copies are kept, and whether they are pinned.

    With no option, it tells. What the mesh cannot keep to is refused (exit code 4), with the limit
    and the way out.

    \b
    Examples:
      mm model policy iris
      mm model policy iris --min-copies 2 --pinned
      mm model policy iris --min-copies 0 --unpinned
    """
    request = SetModelPolicyRequest(model_id=model_id, min_copies=min_copies, pinned=pinned)
    with ways_out({NOT_FOUND: way_to_register(model_id)}):
        info = ask(address, timeout, lambda stub: stub.set_model_policy(request, timeout=timeout))
    value = {
        "id": model_id,
        "min_copies": info.min_copies,
        "pinned": info.pinned,
        "ready_copies": info.ready_copies,
        "unmet": info.unmet,
    }
    emit_one(output, value, _as_text(model_id, info))


def _as_text(model_id: str, info: ModelPolicyInfo) -> str:
    words = [f"at least {_copies(info.min_copies)}"] * bool(info.min_copies)
    words += ["pinned"] * info.pinned
    told = ", ".join(words) or "no policy"
    text = f"{shown(model_id)}: {told}; {_copies(info.ready_copies)} ready"
    return f"{text}\n  not met: {shown(info.unmet)}" if info.unmet else text


def _copies(count: int) -> str:
    return "1 copy" if count == 1 else f"{count} copies"
