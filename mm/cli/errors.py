"""Errors that a command may end with: told in one line, never with a traceback."""

from __future__ import annotations

from mm.errors import ConfigError, MeshError, StartupError


class CommandError(Exception):
    """A command cannot do what it was asked for; the text is the whole message.

    ``details`` are printed below it as they are: the end of a log, for example.
    """

    def __init__(self, message: str, *, exit_code: int = 1, details: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.details = details


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
