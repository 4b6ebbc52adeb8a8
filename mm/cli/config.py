"""`mm config`: what the settings of this environment come to, or what there is to set.

Owns both texts. What a setting is for is ``mm.settings_reference``'s, reading them ``mm.config``'s.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Final

import typer

from mm import identity_settings
from mm.cli.output import Format, ListPrinter, Output, emit, remark
from mm.config import Config
from mm.edge import kv_config
from mm.environment import Environment, Kind
from mm.errors import ConfigError
from mm.known_variables import MEANINGLESS, OTHERS
from mm.setting import Setting
from mm.settings_reference import SECTIONS, SETTINGS
from mm.tls_settings import tls_settings

app = typer.Typer(rich_markup_mode=None)

HELP: Final = """\
Show the settings that `mm serve` would have with this environment, and where each comes from.

Secrets are not shown. Wrong settings are told, all of them, also in the files that they name, and
the exit code is 2: so it checks a deployment before it is rolled out. If nothing is wrong but
that KV_STORE is missing, the other settings are shown all the same. --doc explains every setting
instead, in Markdown.

\b
Examples:
  KV_STORE=embedded mm config
  KV_STORE=etcd:etcd:2379 MM_SERVICE_NAME=models mm config -o json
  kubectl exec deploy/models -c mm -- mm config
"""
#: Of a value, a table shows this much.
_SHOWN_MAX: Final = 60


def read_config(variables: Mapping[str, str]) -> Config:
    """Read all settings; ``ConfigError`` has all that is wrong, also behind ``KV_STORE=etcd:`` and
    in the files of TLS.
    """
    tls_complaints = _tls_complaints(variables)
    try:
        found = Config.from_environment(variables)
    except ConfigError as exc:
        complaints = (*exc.complaints, *tls_complaints, *_store_complaints(variables))
        raise ConfigError(*complaints) from None
    if tls_complaints:
        raise ConfigError(*tls_complaints)
    return found


def _checked(variables: Mapping[str, str]) -> tuple[Config, tuple[str, ...]]:
    """Answer all settings, and what is odd; raises ``ConfigError``, also for what `mm serve` finds
    only when it waits for a file to be put right.
    """
    complaints: tuple[str, ...] = ()
    try:
        found = read_config(variables)
        complaints = _store_complaints(variables)
    except ConfigError as exc:
        complaints = exc.complaints
        found = Config.read(Environment(variables))
    from mm.edge.settings_files import SettingsFiles

    odd = list(SettingsFiles(found).look(found))
    complaints += tuple(f"{name}: {text}" for name, text, is_fatal in odd if is_fatal)
    if complaints:
        raise ConfigError(*complaints)
    remarks = [f"{name}: {text}" for name, text, _ in odd]
    if found.tls.key_path:
        from mm.edge.tls_files import read_files, warnings_of

        remarks += warnings_of(read_files(found.tls), time.time())
    return found, (*found.warnings, *found.dataplane_config.remarks, *remarks)


def _tls_complaints(variables: Mapping[str, str]) -> tuple[str, ...]:
    env = Environment(variables)
    settings, _ = tls_settings(env)
    try:
        env.check()
    except ConfigError:
        return ()  # told already
    if not settings.key_path:
        return ()
    # Takes a tenth of a second to import, which most instances have no use for.
    from mm.edge.tls import make_contexts
    from mm.edge.tls_files import read_files

    try:
        make_contexts(settings, read_files(settings))
    except ConfigError as exc:
        return exc.complaints
    return ()


def _store_complaints(variables: Mapping[str, str]) -> tuple[str, ...]:
    try:
        # What is wrong with the variable itself is told already, and read as "memory".
        kv_config.parse(identity_settings.kv_store(Environment(variables)))
    except ConfigError as exc:
        return exc.complaints
    return ()


@app.command(help=HELP)
def config(
    doc: Annotated[bool, typer.Option("--doc", help="Explain every setting.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Print settings."""
    if doc:
        emit(reference().removesuffix("\n"))
        return
    found, remarks, missing = _without_store(os.environ)
    kinds = _kinds()
    printer = ListPrinter(output, ("VARIABLE", "VALUE", "UNIT", "SOURCE"))
    printer.page(_row(setting, found, kinds.get(setting.names[0])) for setting in SETTINGS)
    printer.end("settings")
    for each in remarks:
        remark(f"mm: {each}")
    if missing:
        raise missing


def _without_store(
    variables: Mapping[str, str],
) -> tuple[Config, tuple[str, ...], ConfigError | None]:
    """Answer all settings and what is odd, also where nothing is wrong but that ``KV_STORE`` is not
    set: then with the complaint about it. Raises ``ConfigError``.
    """
    try:
        return *_checked(variables), None
    except ConfigError as exc:
        if "KV_STORE" not in variables:
            with contextlib.suppress(ConfigError):
                return *_checked({**variables, "KV_STORE": "memory"}), exc
        raise


def _kinds() -> Mapping[str, Kind]:
    """What readers take, and their defaults; the same whatever is set."""
    env = Environment({"KV_STORE": "memory"})
    Config.read(env)
    return env.kinds


# --- one setting --------------------------------------------------------------------------------


def _row(
    setting: Setting, found: Config, kind: Kind | None
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    name = setting.names[0]
    source = next((each for each in setting.names if each in os.environ), None)
    if name == "KV_STORE" and source is None:
        source, text = "missing", ""
    elif setting.value is not None:
        text = _shown(name, setting.value(found))
    elif source is not None:
        text = os.environ[source]
    else:
        text = kind.default if kind else ""
    value = {
        "variable": name,
        "value": text,
        "unit": kind.unit if kind else "",
        "source": source or "default",
    }
    short = text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."
    return value, tuple({**value, "value": short}.values())


def _shown(name: str, value: object) -> str:
    match value:
        case str() if name == "KV_STORE":
            return kv_config.masked(value)
        case None:
            return "NONE"
        case bool():
            return str(value).lower()
        case tuple():
            return ",".join(map(str, value))
        case _:
            return str(value)


# --- the reference ------------------------------------------------------------------------------


def reference() -> str:
    """Answer docs/configuration.md."""
    return "\n".join(_lines(_kinds())) + "\n"


_OPENING: Final = """\
# Configuration

<!-- Made by `mm config --doc`: change mm/settings_reference.py, and make it anew. -->

`mm serve` is configured by environment variables, with the names of the Java mesh. `mm config`
shows what they come to and where each comes from, with secrets hidden, and ends with 2 if one is
wrong; `mm serve` ends so, too. All that is wrong is told at once, a line each with the variable,
its value and what is allowed.

Where a variable has several names, the first that is set counts. Spaces around a value do not. An
empty value is wrong where something has to be said, and counts as unset where a text may be
absent. Some settings can be changed [while instances run](operating.md#settings-in-etcd)."""

_IGNORED: Final = """
## Known and not read

Deployments of the Java mesh may set these. None of them keeps an instance from starting, and
those that are set are named in the log at the start, in one line; so
are unknown variables that begin with `MM_`, for they are most likely misspelt.

Has no meaning here, where there is no JVM, no litelinks and no shell script around the process:
{meaningless}.

System properties of the Java mesh (`-Dtas.…`, `-Dmm.…`) have the variables `MM_MIN_CHURN_AGE_MS`,
`MM_MIN_SECOND_COPY_AGE_SECS` and `MM_MAX_SECOND_COPY_AGE_SECS`; the others are not needed.

## Read elsewhere
"""


def _lines(kinds: Mapping[str, Kind]) -> Iterator[str]:
    yield _OPENING
    for title, settings in SECTIONS:
        yield f"\n## {title}\n"
        yield "| variable | default | allowed | meaning |"
        yield "| --- | --- | --- | --- |"
        for setting in settings:
            yield _line(setting, kinds.get(setting.names[0]))
    yield _IGNORED.format(meaningless=_names(MEANINGLESS))
    for name, meaning in OTHERS.items():
        yield f"* `{name}`: {meaning}."


def _line(setting: Setting, kind: Kind | None) -> str:
    first, *others = setting.names
    names = f"`{first}`" + (f", else {_names(others)}" if others else "")
    default = setting.default or (kind.default if kind else "")
    allowed = setting.allowed or (kind.allowed if kind else "")
    unit = kind.unit if kind else ""
    if " " not in default:
        default = f"`{default}`" if default not in ("", "none", "required") else default
    default += f" {unit}" if unit else ""
    return f"| {names} | {default} | {allowed.replace('|', '&#124;')} | {setting.meaning} |"


def _names(names: Iterator[str] | list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
