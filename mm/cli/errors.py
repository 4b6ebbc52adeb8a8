"""How a command ends: exit codes, and errors that are told in one line, never with a traceback."""

from __future__ import annotations

from typing import Final

from mm.errors import ConfigError, MeshError, StartupError, StatusCode

#: Exit codes beside 0; scripts rely on them. 130 is what shells say of Ctrl-C, and 141 of a
#: program whose output nobody reads any more.
FAILED: Final = 1
MISUSED: Final = 2
NOT_FOUND: Final = 3
REFUSED: Final = 4
TIME_LIMIT: Final = 5
UNREACHABLE: Final = 6
TRY_LATER: Final = 7
UNWRITTEN: Final = 8
INTERRUPTED: Final = 130
READER_LEFT: Final = 141

#: What `--help` says of those that a command which asks a mesh may end with.
EXIT_CODES_HELP: Final = (
    "Exit codes: 0 done; 1 it failed, or the model cannot be loaded; 2 the call is wrong, or"
    " that port takes no such calls; 3 there is no such model or vmodel; 4 refused, because"
    " something else is registered there or it is in use, or the mesh does not know who calls or"
    " has not given the role; 5 not within --timeout; 6 the instance cannot be reached; 7 it"
    " answers that it cannot do it now, for lack of room or of etcd, because of a limit, or"
    " because it only reads (KV_READ_ONLY): try later; 8 the output cannot be written; 130"
    " Ctrl-C. What -o json and -o yaml say: docs/command-line.md."
)

_CODES: Final = {
    StatusCode.INVALID_ARGUMENT: MISUSED,
    StatusCode.NOT_FOUND: NOT_FOUND,
    StatusCode.ALREADY_EXISTS: REFUSED,
    StatusCode.FAILED_PRECONDITION: REFUSED,
    StatusCode.ABORTED: REFUSED,
    StatusCode.PERMISSION_DENIED: REFUSED,
    StatusCode.UNAUTHENTICATED: REFUSED,
    StatusCode.DEADLINE_EXCEEDED: TIME_LIMIT,
    StatusCode.UNAVAILABLE: TRY_LATER,
    # A limit of the mesh, which the text names.
    StatusCode.RESOURCE_EXHAUSTED: TRY_LATER,
}


def exit_code_of(status: int) -> int:
    """Answer the exit code for a gRPC status that the mesh answered."""
    return _CODES.get(StatusCode(status), FAILED)


class CommandError(Exception):
    """A command cannot do what it was asked for; the text is the whole message.

    ``details`` are printed below it as they are: the end of a log, for example.
    """

    def __init__(self, message: str, *, exit_code: int = FAILED, details: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.details = details


class AccessError(CommandError):
    """The mesh does not know who calls, or the caller has not the role: whatever else may be done
    about a refusal is not to be said.
    """


class ExistsError(CommandError):
    """Something else is registered under the id, or a vmodel is somebody else's."""


#: Everything else is a bug.
EXPECTED = (CommandError, ConfigError, StartupError, MeshError)


def expected_error(exc: BaseException) -> Exception | None:
    """Answer the error to tell of; None if ``exc`` is, or holds, anything that is a bug.

    Task groups wrap what ends them: a group counts as expected if everything in it is.
    """
    if isinstance(exc, BaseExceptionGroup):
        found = [expected_error(inner) for inner in exc.exceptions]
        return found[0] if all(found) else None
    return exc if isinstance(exc, EXPECTED) else None
