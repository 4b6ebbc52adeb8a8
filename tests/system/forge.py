"""Starts `mm` processes in a hundredth of the time: forks of one that has imported everything.

Owns that process, which is Python with a socket for orders, and its children as their users see
them. Each is a process of its own, with its own environment, output, session and exit code. What a
start of the program itself takes and says is tested where it is started as users start it: two in
``test_failed_start``, the demo and the README.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mm.demo.processes import environment

_ORDER_BYTES_MAX: Final = 2**20
#: What `mm serve` and `mm runtime example` import, without what would start threads.
_MODULES: Final = ("mm.cli.runtime", "mm.cli.serve", "pydantic", "uvloop")


class Forked:
    """One process; what the tests use of ``subprocess.Popen``."""

    def __init__(
        self, module: str, args: Sequence[str], environment: Mapping[str, str], forge: Forge
    ) -> None:
        self._forge = forge
        reader, writer = os.pipe()
        try:
            order = {"module": module, "args": list(args), "environment": dict(environment)}
            self.pid: int = forge.ask(order, writer)
        finally:
            os.close(writer)
        self.stdout = io.TextIOWrapper(open(reader, "rb"), errors="replace")  # noqa: SIM115
        self.returncode: int | None = None
        # Names this process also when it is gone: no signal hits another one.
        self._handle = os.pidfd_open(self.pid)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Answer the exit code, if it has ended."""
        return self._collect(0.0)

    def wait(self, timeout: float) -> int:
        """Answer the exit code; raises ``subprocess.TimeoutExpired``."""
        code = self._collect(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def _collect(self, timeout_s: float) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._handle, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                return None
        with self._lock:
            if self.returncode is None:
                self.returncode = self._forge.ask({"collect": self.pid})
            return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it, if it still runs."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Release what is held of it, once it has ended."""
        assert self.returncode is not None
        self.stdout.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class Forge:
    """The process that is forked. It ends, with all its children, when whoever has it does."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.system.forge"],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                env=environment(os.environ),
                start_new_session=True,
            )
        self._lock = threading.Lock()

    def ask(self, order: Mapping[str, Any], *files: int) -> int:
        """Answer the number that answers an order."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(order).encode()], files)
            return int(self._socket.recv(_ORDER_BYTES_MAX))

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.wait(10)


@functools.cache
def forge() -> Forge:
    """Answer the one of this test process."""
    made = Forge()
    atexit.register(made.close)
    return made


# --- the process itself -----------------------------------------------------------------------


def _serve(orders: socket.socket) -> dict[str, Any] | None:
    """Carry out orders until there are no more; a child returns from here with its own."""
    children: set[int] = set()
    while True:
        data, files, _, _ = socket.recv_fds(orders, _ORDER_BYTES_MAX, 1)
        if not data:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            return None
        order: dict[str, Any] = json.loads(data)
        if "collect" in order:
            children.discard(order["collect"])
            _, status = os.waitpid(order["collect"], 0)
            orders.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if not pid:
            _become(files[0])
            return order
        os.close(files[0])
        children.add(pid)
        orders.send(str(pid).encode())


def _become(output: int) -> None:
    """Have the files and the session of a new process."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)


def main() -> None:
    """Be the forge, or one of its children."""
    # As `mm serve` imports it; typer wants pydantic all the same.
    sys.modules["pydantic"] = None  # type: ignore[assignment]
    importlib.import_module("mm.edge.app")
    del sys.modules["pydantic"]
    for module in _MODULES:
        importlib.import_module(module)
    # A thread would be missing in the children.
    assert len(os.listdir("/proc/self/task")) == 1
    gc.freeze()
    with socket.socket(fileno=os.dup(0)) as orders:
        order = _serve(orders)
    if order is not None:
        # Who runs the tests in the background may ignore it, and children of theirs as well.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv[1:] = order["args"]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
