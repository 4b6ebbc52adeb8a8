"""`mm serve` around the instance: help, settings, log lines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mm.cli import main
from mm.cli.logs import LINE, TIME, JsonFormatter, LineFormatter
from mm.cli.termination import MESSAGE_BYTES_MAX, leave_message, message_path
from mm.config import Config
from mm.errors import StartupError
from mm.settings_reference import SETTINGS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "mm: KV_STORE is not set"),
        ({"KV_STORE": "zookeeper:host"}, 'mm: KV_STORE="zookeeper:..." is not valid'),
        ({"KV_STORE": "etcd:localhost:1"}, "mm: MM_SERVICE_NAME is not set"),
        ({"KV_STORE": "memory", "MM_PEER_PORT": "x"}, "mm: MM_PEER_PORT="),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in SETTINGS:
        for name in setting.names:
            monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(main.app, ["serve"], env=settings)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_log_record_is_one_line() -> None:
    formatter = LineFormatter(LINE, TIME)
    record = logging.LogRecord("mm.x", logging.INFO, "f", 1, "a\nb %s", ("c\rd",), None)
    record.created, record.msecs = 0.0, 7.0
    assert formatter.format(record) == "1970-01-01T00:00:00.007Z INFO mm.x: a\\nb c\\rd"


def test_a_log_record_cannot_command_a_terminal_or_look_like_two() -> None:
    text = "\x1b[2J\0\x7f\x85\u2028\u2029\x0b\ttab \u6a21\U0001f600"
    record = logging.LogRecord("mm.x", logging.INFO, "f", 1, "%s", (text,), None)
    line = LineFormatter(LINE, TIME).format(record)
    assert line.endswith(r": \x1b[2J\x00\x7f\x85\u2028\u2029\x0b" "\ttab \u6a21\U0001f600")
    assert len(line.splitlines()) == 1


def test_a_bug_is_logged_with_its_traceback() -> None:
    try:
        raise KeyError("x")
    except KeyError as exc:
        info = (KeyError, exc, exc.__traceback__)
    record = logging.LogRecord("mm.x", logging.ERROR, "f", 1, "failed", (), info)
    assert LineFormatter(LINE, TIME).format(record).count("\n") >= 3


def test_a_record_as_json() -> None:
    try:
        raise KeyError("x")
    except KeyError as exc:
        info = (KeyError, exc, exc.__traceback__)
    record = logging.LogRecord("mm.x", logging.WARNING, "f", 1, "a\nb %s", ("ä",), info)
    record.created, record.msecs = 0.0, 7.0
    line = JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert "KeyError: 'x'" in told.pop("thrown")
    assert told == {
        "timestamp": "1970-01-01T00:00:00.007Z",
        "level": "WARN",
        "loggerName": "mm.x",
        "thread": "MainThread",
        "message": "a\nb ä",
        "contextMap": {},
    }


# --- the termination message --------------------------------------------------------------------


def end_with(error: Exception, monkeypatch: pytest.MonkeyPatch, path: Path, *, late: bool) -> str:
    """Answer the message of an instance that ends with ``error``, before or after it serves."""

    async def serve(_config: Config, on_started: Callable[[], None]) -> None:
        if late:
            on_started()
        raise error

    monkeypatch.setattr("mm.edge.app.serve", serve)
    settings = {"KV_STORE": "memory", "LL_TERMINATION_MSG_PATH": str(path)}
    monkeypatch.setattr("mm.cli.logs.log_to_stderr", lambda _level, is_json: None)
    # It is set for good where it is absent.
    modules: dict[str, object] = {**sys.modules}
    monkeypatch.setattr(sys, "modules", modules)
    result = CliRunner().invoke(main.app, ["serve"], env=settings)
    assert result.exit_code == 1
    return path.read_text()


def test_a_start_that_fails_leaves_a_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    error = StartupError("etcd does not\nanswer")
    text = end_with(error, monkeypatch, tmp_path / "message", late=False)
    assert text == "Service startup failed: etcd does not answer\n"


def test_a_bug_leaves_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a group with what ended because of it; and after the start it is another message."""
    error = ExceptionGroup("tasks", [StartupError("meanwhile"), KeyError("x" * 5000)])
    text = end_with(error, monkeypatch, tmp_path / "message", late=True)
    assert text.startswith("Service failed post-startup: KeyError: 'xxx")
    assert len(text) == MESSAGE_BYTES_MAX


def test_where_the_message_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubelets = tmp_path / "termination-log"
    monkeypatch.setattr("mm.cli.termination.KUBERNETES_PATH", kubelets)
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert message_path({}) is None
    assert message_path(pod) is None  # it would be a file that nobody reads
    kubelets.touch()
    assert message_path(pod) == kubelets
    assert message_path({}) is None
    assert message_path(pod | {"LL_TERMINATION_MSG_PATH": "/x"}) == Path("/x")


def test_a_message_that_cannot_be_written_changes_nothing(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    settings = {"LL_TERMINATION_MSG_PATH": str(tmp_path / "none" / "message")}
    leave_message(StartupError("x"), settings, has_started=False)
    assert "no termination message: " in caplog.text
