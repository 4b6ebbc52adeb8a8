"""The bearer token that a command shows an instance that asks who calls (docs/security.md).

From a file alone: what stands on a command line is there for everybody on the machine.
"""

from __future__ import annotations

import os
import re
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mm.cli.errors import MISUSED, CommandError

if TYPE_CHECKING:
    from grpclib.client import Channel

TOKEN: Final = "MM_ADDRESS_TOKEN_PATH"
_OPTION: Final = "--token-file"
_HELP: Final = "A file with the bearer token to show, where the mesh asks who calls."
#: Of the command that runs.
_path: Final = ContextVar("token_path", default="")


def token_option(
    token_file: Annotated[
        str,
        typer.Option(
            _OPTION,
            envvar=TOKEN,
            metavar="PATH",
            help=_HELP,
        ),
    ] = "",
) -> None:
    """Before the commands of a group: keep where the token is."""
    _path.set(token_file)


def _keep(value: str | None) -> None:
    if value is not None:  # what stands before the command, or the variable, is kept already
        _path.set(value)


#: The same option where ``--address`` is: each command has it, and nothing to do with it.
TokenFile = Annotated[
    str | None,
    typer.Option(
        _OPTION,
        metavar="PATH",
        help=f"{_HELP} Also in {TOKEN}.",
        show_default=False,
        callback=_keep,
    ),
]


def way_to_token() -> str:
    """Answer what may be done if the mesh does not know who calls."""
    path = _path.get()
    if path:
        return f"the token is that of {path!r} ({_OPTION} or {TOKEN})"
    return f"{_OPTION} or {TOKEN} names a file with a bearer token"


def show_token(channel: Channel) -> None:
    """Say with each call who asks, if a token is named. Raises ``CommandError``."""
    from grpclib.events import SendRequest, listen

    value = _authorization()
    if value is None:
        return

    async def show(request: SendRequest) -> None:
        request.metadata["authorization"] = value

    listen(channel, SendRequest, show)


def _authorization() -> str | None:
    from mm.core.access import TOKEN_BYTES_MAX, TOKEN_FORM

    path = _path.get()
    if not path:
        return None
    try:
        # A pipe would be waited for.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            token = file.read(TOKEN_BYTES_MAX + 2).strip()
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        text = f"{_OPTION} (or {TOKEN}): {path!r} cannot be read: {reason}"
        raise CommandError(text, exit_code=MISUSED) from exc
    if len(token) > TOKEN_BYTES_MAX or not re.fullmatch(TOKEN_FORM, token):
        raise CommandError(
            f"{_OPTION} (or {TOKEN}): {path!r} has no bearer token; allowed: one line of letters,"
            f" digits and - . _ ~ + / =, up to {TOKEN_BYTES_MAX} of them",
            exit_code=MISUSED,
        )
    return f"Bearer {token.decode()}"
