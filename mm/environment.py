"""Reading settings from environment variables, with errors that help.

Every error names the variable, its value and what is allowed, and all are told at once: a reader
notes what is wrong and answers something that can be gone on with. Names of variables and their
meaning are ``mm.config``'s affair. A variable may have older names: the first that is set counts,
and all count as known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mm.errors import ConfigError

#: Longest piece of a value that an error repeats.
_SHOWN_LENGTH_MAX = 120

#: More digits than any limit has.
_DIGITS_MAX = 20


@dataclass(frozen=True, slots=True)
class Kind:
    """What a variable may be, and what it stands for when it is not set."""

    default: str
    allowed: str
    unit: str = ""


class Environment:
    """A view on the environment that remembers what was asked for, and what was wrong."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        #: Every name that was asked for.
        self.known: set[str] = set()
        #: By first name: of those that are not just text.
        self.kinds: dict[str, Kind] = {}
        self._complaints: dict[str, None] = {}

    def refuse(self, error: ConfigError) -> None:
        """Note that something is wrong; ``check`` tells."""
        self._complaints.update(dict.fromkeys(error.complaints))

    def check(self) -> None:
        """Raise one ``ConfigError`` with everything that is wrong."""
        if self._complaints:
            raise ConfigError(*self._complaints)

    def find(self, *names: str) -> tuple[str, str] | None:
        """Answer (name, value) of the first of ``names`` that is set, even to nothing."""
        self.known.update(names)
        for name in names:
            value = self._variables.get(name)
            if value is not None:
                return name, value
        return None

    def is_set(self, name: str) -> bool:
        """Answer whether ``name`` is there, even if empty."""
        return self.find(name) is not None

    def text(self, *names: str) -> str | None:
        """Answer the trimmed value, None when unset; empty is wrong."""
        found = self.find(*names)
        if found is None:
            return None
        name, value = found
        if not value.strip():
            self.refuse(wrong(name, value, "anything but empty; unset it for the default"))
        return value.strip()

    def text_or_nothing(self, *names: str) -> str | None:
        """Answer the trimmed value; None when unset or empty."""
        found = self.find(*names)
        return (found[1].strip() or None) if found else None

    def integer(
        self, *names: str, default: int, minimum: int, maximum: int, meaning: str = ""
    ) -> int:
        """Answer a decimal integer within [``minimum``, ``maximum``]."""
        allowed = f"an integer from {minimum} to {maximum}"
        self.kinds[names[0]] = Kind(str(default), allowed, meaning)
        found = self.find(*names)
        if found is None:
            return default
        name, value = found
        allowed += f" ({meaning})" if meaning else ""
        digits = value.strip()
        # `int` alone would also take "1_000" and the digits of every script.
        plain = digits.isascii() and digits.removeprefix("-").isdigit()
        if not plain or len(digits) > _DIGITS_MAX or not minimum <= int(digits) <= maximum:
            self.refuse(wrong(name, value, allowed))
            return default
        return int(digits)

    def port(self, *names: str, default: int, free_allowed: bool = False) -> int:
        """Answer a TCP port; 0, "choose a free one", only where ``free_allowed``."""
        port = self.integer(
            *names,
            default=default,
            minimum=0 if free_allowed else 1,
            maximum=65535,
            meaning="a TCP port" + ("; 0 chooses a free one" if free_allowed else ""),
        )
        self._describe_port(names[0])
        return port

    def port_or_none(self, name: str, *, default: int | None) -> int | None:
        """Answer a TCP port, 0 for a free one; None for the word NONE."""
        found = self.find(name)
        wants_none = default is None if found is None else found[1].strip().upper() == "NONE"
        if wants_none:
            return None
        port = self.integer(
            name,
            default=default or 0,
            minimum=0,
            maximum=65535,
            meaning="a TCP port; 0 chooses a free one, NONE does without",
        )
        self._describe_port(name)
        return port

    def _describe_port(self, name: str) -> None:
        """What an error says of a port is a rule, and no unit."""
        kind = self.kinds.get(name)
        if kind is not None:
            self.kinds[name] = Kind(kind.default, kind.unit)

    def boolean(self, *names: str, default: bool) -> bool:
        """Answer ``true`` or ``false``, in any case."""
        self.kinds[names[0]] = Kind(str(default).lower(), "true or false")
        found = self.find(*names)
        if found is None:
            return default
        name, value = found
        answer = {"true": True, "false": False}.get(value.strip().lower())
        if answer is None:
            self.refuse(wrong(name, value, "true or false"))
            return default
        return answer

    def choice(self, *names: str, default: str, allowed: tuple[str, ...]) -> str:
        """Answer one of ``allowed`` (lower case), in any case."""
        self.kinds[names[0]] = Kind(default, " or ".join(allowed))
        found = self.find(*names)
        if found is None:
            return default
        name, value = found
        answer = value.strip().lower()
        if answer not in allowed:
            self.refuse(wrong(name, value, " or ".join(allowed)))
            return default
        return answer

    def not_both(self, first: str, second: str, why: str) -> None:
        """Refuse two variables that exclude each other."""
        if self.is_set(first) and self.is_set(second):
            self.refuse(
                ConfigError(f"{first} and {second} are both set; set at most one of them: {why}")
            )

    def unknown(self, prefix: str) -> tuple[str, ...]:
        """Answer the variables with ``prefix`` that nobody asked for, sorted."""
        return tuple(
            sorted(
                name
                for name in self._variables
                if name.startswith(prefix) and name not in self.known
            )
        )


def wrong(name: str, value: str, allowed: str) -> ConfigError:
    """Answer the error for one wrong value, in the form that all of them have."""
    shown = value if len(value) <= _SHOWN_LENGTH_MAX else f"{value[:_SHOWN_LENGTH_MAX]}..."
    return ConfigError(f'{name}="{shown}" is not valid; allowed: {allowed}')
