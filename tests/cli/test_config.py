"""`mm config`: what settings come to, and a reference that says what the program does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mm.cli import main
from mm.cli.config import reference
from mm.config import Config
from mm.environment import Environment
from mm.known_variables import ELSEWHERE, MEANINGLESS, OTHERS
from mm.settings_reference import SETTINGS
from mm.tls_settings import NAMES
from tests.identities import make

ROOT = Path(__file__).parents[2]
ETCD = {"KV_STORE": "etcd:h:2379", "MM_SERVICE_NAME": "s", "MM_ADVERTISE_ADDRESS": "10.0.0.1"}


def run(*args: str, **settings: str) -> Result:
    nothing = dict.fromkeys(read_names())
    return CliRunner().invoke(main.app, ["config", *args], env={**nothing, **settings})


def read_names() -> set[str]:
    """Every variable that is asked for, whatever is set."""
    names: set[str] = set()
    for variables in ({"KV_STORE": "memory"}, {}, {"INTERNAL_GRPC_PORT": "1"}):
        env = Environment(variables)
        Config.read(env)
        names |= env.known
    return names


# --- the reference ------------------------------------------------------------------------------


def test_the_reference_is_current() -> None:
    path = ROOT / "docs/configuration.md"
    assert path.read_text() == reference(), f"make it anew: mm config --doc > {path}"
    assert run("--doc").stdout == reference()


def test_the_reference_has_every_variable_once() -> None:
    listed = [name for setting in SETTINGS for name in setting.names]
    listed += [name for name in OTHERS if name not in listed]
    listed += MEANINGLESS
    assert len(listed) == len(set(listed))
    assert set(listed) == read_names()
    assert set(ELSEWHERE) < set(listed)


def test_the_readme_and_the_help_name_what_there_is() -> None:
    """They have the most used alone; a name that there is not would mislead."""
    help_text = CliRunner().invoke(main.app, ["serve", "--help"]).stdout
    for text in (help_text, (ROOT / "README.md").read_text()):
        named = set(re.findall(r"\b(?:MM|KV|INTERNAL|TAS|WKUBE|LL)_[A-Z_]+[A-Z]\b", text))
        assert len(named) > 5
        assert named <= read_names()


def test_older_names_come_after_the_name(tmp_path: Path) -> None:
    """The first of the names in the reference is the one that counts, whatever else is set."""
    files = (str(tmp_path / "new.json"), str(tmp_path / "old.json"))
    for each in files:
        Path(each).write_text("[]")
    values = {
        "MM_SERVICE_NAME": ("new", "old"),
        "MM_SVC_GRPC_PORT": ("1001", "1002"),
        "MM_INSTANCE_ID": ("new", "a-pod-name-0123456789ab"),
        "MM_ADVERTISE_ADDRESS": ("10.0.0.1", "10.0.0.2", "10.0.0.3"),
        "MM_AUTO_REGISTER_MODELS": ("[]", '[{"modelId": "m", "modelInfo": {"type": "t"}}]'),
        "MM_AUTO_REGISTER_MODEL_PATH": files,
    }
    shown = {
        "a-pod-name-0123456789ab": "0123456789ab",
        "[]": "",
        values["MM_AUTO_REGISTER_MODELS"][1]: "models: 1",
    }
    # Those of TLS name files that have to fit together: tests/test_tls_settings.py.
    apart = set(NAMES)
    several = [each for each in SETTINGS if len(each.names) > 1 and each.names[0] not in apart]
    assert {setting.names[0] for setting in several} == set(values)
    for setting in several:
        given = dict(zip(setting.names, values[setting.names[0]], strict=True))
        for name in setting.names:
            row = rows(**{"KV_STORE": "memory", **given})[setting.names[0]]
            assert (row["value"], row["source"]) == (shown.get(given[name], given[name]), name)
            del given[name]


# --- what it came to ----------------------------------------------------------------------------


def test_tls_is_shown_without_its_secret_and_checked(tmp_path: Path) -> None:
    own = make("server").write(tmp_path, passphrase=b"secret")
    old = {
        "MM_SVC_GRPC_PRIVATE_KEY_PATH": own["MM_TLS_PRIVATE_KEY_PATH"],
        "MM_SVC_GRPC_CA_CERT_PATH": own["MM_TLS_KEY_CERT_PATH"],
        "MM_SVC_GRPC_PRIVATE_KEY_PASSPHRASE": "secret",
        "KV_STORE": "memory",
    }
    found = rows(**old)
    assert found["MM_TLS_PRIVATE_KEY_PASSPHRASE"]["value"] == "(hidden)"
    assert found["MM_TLS_KEY_CERT_PATH"]["source"] == "MM_SVC_GRPC_CA_CERT_PATH"
    assert found["MM_ENABLE_SSL"]["value"] == "true"
    refused = run(**old | {"MM_SVC_GRPC_PRIVATE_KEY_PASSPHRASE": "other"})
    assert refused.exit_code == 2
    assert refused.stderr.startswith("mm: MM_TLS_PRIVATE_KEY_PASSPHRASE does not open ")


@pytest.mark.parametrize(
    ("variable", "content", "told"),
    [
        ("MM_ACCESS_CONFIG_PATH", '{"identities": {}}', '"identities" is empty'),
        ("MM_DATAPLANE_CONFIG_PATH", "{", "data-plane configuration file "),
        ("MM_AUTO_REGISTER_MODEL_PATH", '{"a": 1}', "static models file "),
    ],
)
def test_files_that_serve_refuses_are_refused(
    variable: str, content: str, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.json"
    file.write_text(content)
    alone = run(KV_STORE="memory", **{variable: str(file)})
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert alone.stderr.startswith(f"mm: {variable}: ")
    assert told in alone.stderr
    beside = run(KV_STORE="memory", MM_PROBE_PORT="x", **{variable: str(file)})
    assert [line.split()[1].rstrip(":") for line in beside.stderr.splitlines()] == [
        'MM_PROBE_PORT="x"',
        variable,
    ]


def test_files_that_serve_starts_with_are_remarked_on(tmp_path: Path) -> None:
    constraints, access = tmp_path / "constraints.json", tmp_path / "access.json"
    constraints.write_text("{")
    access.write_text('{"identities": {"a": {"roles": ["read"], "certificateNames": ["CN:a"]}}}')
    own = make("server", days=-1).write(tmp_path)
    found = run(
        KV_STORE="memory",
        MM_TYPE_CONSTRAINTS_PATH=str(constraints),
        MM_ACCESS_CONFIG_PATH=str(access),
        **own,
    )
    assert found.exit_code == 0
    assert "mm: MM_TYPE_CONSTRAINTS_PATH: type constraints file " in found.stderr
    assert "mm: MM_ACCESS_CONFIG_PATH: certificateNames say nothing" in found.stderr
    assert "mm: MM_TLS_KEY_CERT_PATH: the certificate ended at " in found.stderr


def rows(**settings: str) -> dict[str, dict[str, str]]:
    result = run("-o", "json", **settings)
    assert result.exit_code == 0, result.stderr
    return {row["variable"]: row for row in json.loads(result.stdout)}


def test_values_have_a_source_and_a_unit() -> None:
    found = rows(
        **ETCD,
        SHUTDOWN_TIMEOUT_MS="90000",
        TAS_SVC_GRPC_PORT="9000",
        MM_PROBE_PORT="none",
        MM_LABELS="b,a",
        LL_TERMINATION_MSG_PATH="/x",
        BOOTSTRAP_CLEARANCE_PERIOD_MS="5",
        MM_FAILFAST_UPGRADE_ENABLED="FALSE",
    )
    told = {name: (row["value"], row["unit"], row["source"]) for name, row in found.items()}
    assert told["SHUTDOWN_TIMEOUT_MS"] == ("90000", "milliseconds", "SHUTDOWN_TIMEOUT_MS")
    assert told["MM_SVC_GRPC_PORT"] == ("9000", "", "TAS_SVC_GRPC_PORT")
    assert told["MM_SVC_GRPC_MAX_MSG_SIZE"] == ("16777216", "bytes", "default")
    assert told["MM_SCALEUP_RPM_THRESHOLD"] == ("2000", "calls a minute", "default")
    assert told["MM_PROBE_PORT"] == ("NONE", "", "MM_PROBE_PORT")
    assert told["MM_LABELS"] == ("a,b", "", "MM_LABELS")
    assert told["KV_READ_ONLY"] == ("false", "", "default")
    assert told["LL_TERMINATION_MSG_PATH"] == ("/x", "", "LL_TERMINATION_MSG_PATH")
    assert told["MM_DATAPLANE"] == ("wire", "", "default")
    # Off by the other setting: what counts is what it came to.
    assert told["BOOTSTRAP_CLEARANCE_PERIOD_MS"][0] == "0"
    assert len(told) == len(SETTINGS)


def test_without_a_store_the_other_settings_are_shown() -> None:
    result = run("-o", "json", SHUTDOWN_TIMEOUT_MS="90000")
    assert result.exit_code == 2
    assert result.stderr.startswith("mm: KV_STORE is not set; allowed: ")
    assert result.stderr.count("\n") == 1
    told = {row["variable"]: (row["value"], row["source"]) for row in json.loads(result.stdout)}
    assert told["KV_STORE"] == ("", "missing")
    assert told["SHUTDOWN_TIMEOUT_MS"] == ("90000", "SHUTDOWN_TIMEOUT_MS")
    assert run("-o", "json", SHUTDOWN_TIMEOUT_MS="x").stdout == "", "something else is wrong"


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "etcd.json"
    file.write_text('{"endpoints": "http://h:2379", "userid": "u", "password": "hunter2"}')
    models = '[{"modelId": "m", "modelInfo": {"type": "t", "key": "hunter2"}}]'
    for form in ("table", "json", "yaml"):
        settings = {**ETCD, "KV_STORE": f"etcd:{file}", "MM_AUTO_REGISTER_MODELS": models}
        settings["MM_PAYLOAD_PROCESSORS"] = "https://u:hunter2@sink/path?hunter2"
        result = run("-o", form, **settings)
        assert result.exit_code == 0
        assert "models: 1" in result.stdout
        assert "https://sink/path" in result.stdout
        assert "hunter2" not in result.output
    result = run(**{**ETCD, "KV_STORE": "etcd:http://u:hunter2@h:2379"})
    assert result.exit_code == 2
    assert "hunter2" not in result.output


def test_what_is_ignored_is_told_beside_it() -> None:
    result = run(**ETCD, HEAP_SIZE_MB="1", MM_TYPO="1")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "mm: has no meaning here, and is ignored: HEAP_SIZE_MB",
        "mm: unknown, and ignored (misspelt?): MM_TYPO",
    ]


@pytest.mark.parametrize("command", ["config", "serve"])
def test_everything_that_is_wrong_is_told_at_once(command: str, tmp_path: Path) -> None:
    settings = dict.fromkeys(read_names()) | {
        "KV_STORE": f"etcd:{tmp_path}/none.json",
        "MM_SVC_GRPC_PORT": "x",
        "MM_PROBE_PORT": "70000",
        "KV_READ_ONLY": "yes",
        "MM_EVICTION": "fifo",
        "MM_INSTANCE_ID": "a,b",
        "MM_ADVERTISE_ADDRESS": "h:1",
        "MM_TLS_PRIVATE_KEY_PATH": "/k",
        "MM_TLS_KEY_CERT_PATH": "/c",
        "MM_TLS_TRUST_CERT_PATH": "/t",
        "INTERNAL_GRPC_PORT": "1",
        "INTERNAL_GRPC_SOCKET_PATH": "",
        "MM_TYPE_CONSTRAINTS": "{",
        "MM_DATAPLANE_CONFIG_PATH": "/none",
        "MM_AUTO_REGISTER_MODELS": "1",
        "MM_MIN_SECOND_COPY_AGE_SECS": "9",
        "MM_MAX_SECOND_COPY_AGE_SECS": "8",
    }
    result = CliRunner().invoke(main.app, [command], env=settings)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert all(line.startswith("mm: ") for line in lines)
    named = [re.split(r"[ =]", line.removeprefix("mm: "))[0] for line in lines]
    assert sorted(named) == sorted(
        [
            "INTERNAL_GRPC_PORT",  # and INTERNAL_GRPC_SOCKET_PATH are both set
            *(name for name in settings if settings[name] is not None and name not in _ONCE),
            "MM_SERVICE_NAME",  # is not set
        ]
    )


#: The first of them is named for both.
_ONCE = {"INTERNAL_GRPC_PORT", "MM_MAX_SECOND_COPY_AGE_SECS"}
