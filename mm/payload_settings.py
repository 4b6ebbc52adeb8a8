"""Who is shown requests and answers: ``MM_PAYLOAD_PROCESSORS`` (around 17).

A part of ``Config``. A URI says where to (its scheme and address), of which model (its query) and
of which method (its fragment).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from mm.environment import Environment
from mm.errors import ConfigError
from mm.json_settings import existing_file

#: Each has a queue and threads of its own; an operator has two or three.
SINKS_MAX: Final = 16
#: What stands for "all".
_ALL: Final = frozenset(("", "/", "*", "/*"))
_USERINFO: Final = re.compile(r"//[^/?#\s]*@")
_GRAMMAR: Final = (
    "logger:///[?<model id>][#<method>] or http[s]://<host>[:<port>][/<path>][?<model id>]"
    "[#<method>], separated by spaces"
)


@dataclass(frozen=True, slots=True)
class PayloadSink:
    """One observer: where payloads go, and which."""

    #: "logger", "http" or "https".
    scheme: str
    #: Without user and fragment. Not shown: a query may be a token.
    url: str = field(default="", repr=False)
    #: "user:password"; empty: none.
    userinfo: str = field(default="", repr=False)
    #: As the mesh knows it, behind a vmodel too; None: any.
    model_id: str | None = None
    #: "package.Service/Method", or the last part alone; None: any.
    method: str | None = None

    def __str__(self) -> str:
        if self.scheme == "logger":
            return "logger"
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))

    def wants(self, method: str, model_id: str) -> bool:
        """Answer whether a call is to be shown; ``method`` is "package.Service/Method"."""
        if self.model_id is not None and self.model_id != model_id:
            return False
        return self.wants_method(method)

    def wants_method(self, method: str) -> bool:
        """Answer whether calls of a method may be shown."""
        return self.method is None or self.method in (method, method.rpartition("/")[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadSettings:
    """Observers of payloads, and what they may take."""

    sinks: tuple[PayloadSink, ...] = ()
    #: MM_PAYLOAD_PROCESSORS_CAPACITY: payloads that wait for one observer.
    queue_length_max: int = 64
    #: MM_PAYLOAD_PROCESSORS_THREADS: payloads on their way to one observer.
    threads: int = 2
    #: MM_PAYLOAD_PROCESSORS_TRUST_CERT_PATH: whose certificates https observers may have; empty:
    #: whom the system trusts.
    trust_path: str = ""
    #: What is odd about them.
    warnings: tuple[str, ...] = ()

    @property
    def models(self) -> frozenset[str] | None:
        """The models of which something is shown; None: of all."""
        named = {sink.model_id for sink in self.sinks}
        return None if None in named else frozenset(each for each in named if each is not None)


def payload_settings(env: Environment) -> PayloadSettings:
    """Answer the settings; what is wrong ``env`` knows."""
    sinks: list[PayloadSink] = []
    warnings: list[str] = []
    for uri in (env.text_or_nothing("MM_PAYLOAD_PROCESSORS") or "").split():
        sink, complaint = _sink(uri)
        if sink is not None:
            sinks.append(sink)
        elif complaint.startswith("has no scheme"):
            # The controller passes on what has no scheme, and the Java mesh ignores it: a
            # deployment that starts with that one has to start with this one.
            warnings.append(f'MM_PAYLOAD_PROCESSORS: "{shown_uri(uri)}" {complaint}')
        else:
            env.refuse(
                ConfigError(f'MM_PAYLOAD_PROCESSORS: "{shown_uri(uri)}" {complaint}: {_GRAMMAR}')
            )
    if len(sinks) > SINKS_MAX:
        env.refuse(
            ConfigError(f"MM_PAYLOAD_PROCESSORS names {len(sinks)} observers; allowed: {SINKS_MAX}")
        )
    return PayloadSettings(
        sinks=tuple(sinks),
        queue_length_max=env.integer(
            "MM_PAYLOAD_PROCESSORS_CAPACITY", default=64, minimum=1, maximum=100_000
        ),
        threads=env.integer("MM_PAYLOAD_PROCESSORS_THREADS", default=2, minimum=1, maximum=32),
        trust_path=existing_file(env, "MM_PAYLOAD_PROCESSORS_TRUST_CERT_PATH"),
        warnings=tuple(warnings),
    )


def shown_uri(uri: str) -> str:
    """Answer a URI without user and password, and without its query, which may be a token."""
    return _USERINFO.sub("//***@", uri).partition("?")[0]


def _sink(uri: str) -> tuple[PayloadSink | None, str]:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return None, "is no URI; allowed"
    if parts.scheme not in ("logger", "http", "https"):
        if "://" in uri or parts.scheme == "":
            return None, f'has the scheme "{parts.scheme}"; allowed'
        return None, "has no scheme, and is ignored; http:// before it sends payloads there"
    if parts.scheme != "logger" and not host:
        return None, "names no host; allowed"
    userinfo, at, netloc = parts.netloc.rpartition("@")
    url = urlunsplit(SplitResult(parts.scheme, netloc if at else parts.netloc, *parts[2:4], ""))
    model_id, method = unquote(parts.query), unquote(parts.fragment).removeprefix("/")
    return (
        PayloadSink(
            parts.scheme,
            url,
            unquote(userinfo),
            None if model_id in _ALL else model_id,
            None if method in _ALL else method,
        ),
        "",
    )
