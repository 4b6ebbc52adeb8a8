"""Where a runtime listens: the text of its command line, and the socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass

from mm.errors import StartupError


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a TCP port, 0 for a free one, or the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``PORT``, ``HOST:PORT``, ``unix:PATH`` or ``unix://PATH``."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:").removeprefix("//")
            if not path:
                raise StartupError(f"address {text!r} has no path; write unix:///run/some.sock")
            return cls(path=path)
        host, _, port = text.rpartition(":")
        if not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
            raise StartupError(
                f"address {text!r}; allowed are PORT, HOST:PORT (0-65535) and unix://PATH"
            )
        return cls(host=host.strip("[]") or "127.0.0.1", port=int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def bind(self) -> socket.socket:
        """Answer a socket that listens here; ``StartupError`` says why not."""
        try:
            if self.path:
                return self._bind_path()
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            return socket.create_server((self.host, self.port), family=family, backlog=512)
        except OSError as exc:
            why = "in use" if exc.errno == errno.EADDRINUSE else exc.strerror or exc
            raise StartupError(f"cannot listen on {self}: {why}") from exc

    def _bind_path(self) -> socket.socket:
        with socket.socket(socket.AF_UNIX) as probe:
            # A socket file outlives a killed process: it is in the way, but nobody answers.
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                if not stat.S_ISSOCK(os.stat(self.path).st_mode):
                    raise OSError(errno.EEXIST, "there is a file that is no socket") from None
                os.unlink(self.path)
            except FileNotFoundError:
                pass
            else:
                raise OSError(errno.EADDRINUSE, "in use")
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(self.path)
            listener.listen(512)
        except OSError:
            listener.close()
            raise
        return listener


def address_of(listener: socket.socket) -> Address:
    """Answer where a listening socket really is (port 0 has become a number)."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return Address(path=name)
    return Address(host=name[0], port=name[1])
