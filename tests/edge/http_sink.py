"""A real HTTP server that notes what is posted to it; a helper of the tests of payloads."""

from __future__ import annotations

import http.server
import json
import queue
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.identities import Pair


@dataclass
class Post:
    """One request."""

    target: str
    headers: dict[str, str]
    body: dict[str, Any]
    #: Counts the connections.
    connection: int


@dataclass
class Sink:
    """What the server was told, and what it answers."""

    port: int = 0
    posts: queue.Queue[Post] = field(default_factory=queue.Queue)
    status: int = 200
    #: Of the answer.
    length: int = 2
    #: Close the connection after each answer without saying so.
    hangs_up: bool = False
    #: Answers wait for this.
    may_answer: threading.Event = field(default_factory=threading.Event)
    connections: int = 0

    def next(self) -> Post:
        """Answer the next request; one that does not come fails the test."""
        return self.posts.get(timeout=60)


@contextmanager
def http_sink(pair: Pair | None = None, directory: Path | None = None) -> Iterator[Sink]:
    """Run a server; over TLS with a certificate, whose files are put into ``directory``."""
    sink = Sink()
    sink.may_answer.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            sink.connections += 1
            self.number = sink.connections

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            sink.posts.put(Post(self.path, headers, body, self.number))
            sink.may_answer.wait(60)
            self.send_response(sink.status)
            self.send_header("Content-Length", str(sink.length))
            self.end_headers()
            self.wfile.write(b"k" * sink.length)
            self.close_connection = self.close_connection or sink.hangs_up

        def log_message(self, *_args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if pair is not None:
        assert directory is not None
        server.socket = _tls(pair, directory).wrap_socket(server.socket, server_side=True)
    sink.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        sink.may_answer.set()
        server.shutdown()
        server.server_close()


def _tls(pair: Pair, directory: Path) -> ssl.SSLContext:
    chain, key = directory / "sink.pem", directory / "sink.key"
    chain.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    return context
