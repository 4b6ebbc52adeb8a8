"""Standard streams that are missing, full or read by nobody, and signals that come at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

MM = (sys.executable, "-m", "mm")
MISUSED = b"mm: No such command 'nosuch'. (see `mm --help`)\n"
LIMIT_S = 60


def run(redirection: str, *args: str, **env: str) -> tuple[int, bytes, bytes]:
    """Answer exit code, stdout and stderr of a command that a shell starts."""
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *MM, *args],
        env={**os.environ, "PYTHONUNBUFFERED": "", **env},
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [(">/dev/full", b"no space left on device"), (">&- <&-", b"bad file descriptor")],
)
@pytest.mark.parametrize(("arg", "unbuffered"), [("--help", ""), ("--version", "1")])
def test_an_output_that_cannot_be_written_is_one_line(
    redirection: str, reason: bytes, arg: str, unbuffered: str
) -> None:
    """Not only what commands print themselves: ``test_misuse`` has that."""
    found = run(redirection, arg, PYTHONUNBUFFERED=unbuffered)
    assert found == (8, b"", b"mm: cannot write to standard output: " + reason + b"\n")


def test_an_output_that_nobody_reads_is_told_to_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*MM, "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=LIMIT_S, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_errors_that_cannot_be_told_leave_the_exit_code(redirection: str) -> None:
    assert run(redirection, "nosuch") == (2, b"", b"")


def test_an_event_loop_does_without_what_the_caller_closed() -> None:
    """libuv aborts when it closes a file with one of the first three numbers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        code, _out, err = run("<&- >&-", "runtime", "example", address)
    assert (code, err) == (1, f"mm: cannot listen on {address}: in use\n".encode())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_instance_that_is_still_imported_is_told_to_stop(number: signal.Signals) -> None:
    program = (
        "import os, sys; from mm.__main__ import main\n"
        "class Hold:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mm.cli.main': os.write(1, b'.'); os.read(0, 1)\n"
        "sys.meta_path.insert(0, Hold()); sys.argv[1:] = ['serve']; main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        process.send_signal(number)
        assert process.communicate(timeout=LIMIT_S) == (b"", b"")
        assert process.returncode == 0
