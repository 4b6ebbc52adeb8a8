"""Sockets that listen: bound here, accepted from in ``accepting.py`` or by the wire."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

BACKLOG = 1024
#: A client that is gone without a word (its machine, or the way to it) is asked for a sign of life
#: by the kernel: after as long as the Python data plane pings, and then this often.
CLIENT_IDLE_S = 300
CLIENT_PROBES_S = 10
CLIENT_PROBES = 3
#: And nothing that was sent to it may be left without acknowledgement, or before a closed window,
#: for longer. Above any pause of a client that lives, below the 15 minutes that the kernel tries.
CLIENT_UNREAD_MS = 120_000


def listening_socket(host: str | None, port: int) -> socket.socket:
    """Bind one socket: every address of both families without a host. Connections that are accepted
    have its options.
    """
    sock = _bound_socket(host, port)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, CLIENT_IDLE_S),
        (socket.TCP_KEEPINTVL, CLIENT_PROBES_S),
        (socket.TCP_KEEPCNT, CLIENT_PROBES),
        (socket.TCP_USER_TIMEOUT, CLIENT_UNREAD_MS),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


def unix_socket(path: str) -> socket.socket:
    """Bind a path, in place of what a process that is gone may have left there."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    return sock


def _bound_socket(host: str | None, port: int) -> socket.socket:
    if not host or host in ("0.0.0.0", "::"):
        if host != "0.0.0.0" and socket.has_dualstack_ipv6():
            try:
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
                )
            except OSError as error:
                # A kernel booted without IPv6 says so only now.
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
        return socket.create_server(("", port), backlog=BACKLOG)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
