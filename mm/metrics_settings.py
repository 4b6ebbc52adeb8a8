"""What operators say of metrics: ``MM_METRICS`` and what goes with it (around 19.1, 13.2).

A part of ``Config``. What is not understood ends the start: a mesh that nobody can watch, because
of a letter, would be noticed when it is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final

from mm.environment import Environment, wrong
from mm.errors import ConfigError
from mm.limits import Limits
from mm.tls_settings import KEY, NAMES

#: Labels of the information metric at most, as in Java.
INFO_LABELS_MAX: Final = 4
CERTIFICATE: Final = "MM_METRICS_CERTIFICATE"
_KINDS: Final = ("disabled", "prometheus", "statsd")
_PARAMETERS: Final = {
    "disabled": frozenset[str](),
    "prometheus": frozenset(("port", "scheme", "fq_names", "per_model_metrics", "mem_detail")),
    "statsd": frozenset(("port", "fq_names", "legacy")),
}
_PORTS: Final = {"disabled": 0, "prometheus": 2112, "statsd": 8126}
_GRAMMAR: Final = "disabled, or prometheus or statsd, with :<name>=<value>[;<name>=<value>...]"
_INFO_NAME: Final = re.compile(r"[a-z_:]+")
_LABEL: Final = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)=([A-Za-z_][A-Za-z0-9_]*)")
_INFO_GRAMMAR: Final = (
    "<name>;<label>=<VARIABLE>[,<label>=<VARIABLE>...], the name of lower-case letters, _ and :, "
    f"with 1 to {INFO_LABELS_MAX} labels"
)


@dataclass(frozen=True, slots=True)
class InfoMetric:
    """A gauge that is always 1, and whose labels tell something of the deployment."""

    name: str
    labels: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSettings:
    """How metrics are told."""

    #: "disabled", "prometheus" or "statsd".
    kind: str = "statsd"
    #: To listen on (prometheus; 0 chooses a free one), or to send to (statsd).
    port: int = 8126
    #: prometheus: over TLS,
    is_https: bool = True
    #: and with the certificate that clients are shown, not with one of its own
    #: (MM_METRICS_CERTIFICATE).
    shows_serving_certificate: bool = False
    #: The label `method` is "pkg.Service/Method" instead of "Method".
    has_full_names: bool = False
    #: prometheus: labels `modelId` and `vModelId`.
    is_per_model: bool = False
    #: statsd: the names from before the Java mesh was public.
    is_legacy: bool = False
    #: MM_INFO_METRICS.
    info: InfoMetric | None = None
    #: MM_LOG_PROMETHEUS_REQS.
    logs_requests: bool = False
    #: What was odd about the settings.
    warnings: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        """What ``MM_METRICS`` would say for all of it."""
        flags = {
            "fq_names": self.has_full_names,
            "per_model_metrics": self.is_per_model,
            "legacy": self.is_legacy,
        }
        parts = [f"port={self.port}"]
        if self.kind == "prometheus":
            parts.append(f"scheme={'https' if self.is_https else 'http'}")
        parts += [f"{name}=true" for name, is_set in flags.items() if is_set]
        return self.kind if self.kind == "disabled" else f"{self.kind}:{';'.join(parts)}"

    def models_max(self, limits: Limits) -> int:
        """Answer how many models are measured one by one; 0: none."""
        return limits.metric_models_max if self.is_per_model else 0


def metrics_settings(env: Environment) -> MetricsSettings:
    """Read them all; what is wrong ``env`` knows."""
    settings = MetricsSettings()
    try:
        settings = _settings(env.text("MM_METRICS") or "statsd")
    except ConfigError as exc:
        env.refuse(exc)
    info: InfoMetric | None = None
    try:
        info = _info(env)
    except ConfigError as exc:
        env.refuse(exc)
    warnings = settings.warnings
    if info is not None and settings.kind != "prometheus":
        warnings = (*warnings, "MM_INFO_METRICS is ignored: only prometheus shows it")
        info = None
    shows_serving, more = _shows_serving_certificate(env, settings)
    return replace(
        settings,
        info=info,
        logs_requests=env.boolean("MM_LOG_PROMETHEUS_REQS", default=False),
        shows_serving_certificate=shows_serving,
        warnings=(*warnings, *more),
    )


def _shows_serving_certificate(
    env: Environment, settings: MetricsSettings
) -> tuple[bool, tuple[str, ...]]:
    """Read ``MM_METRICS_CERTIFICATE``: a name of its own, for Java refuses parameters that it does
    not know, and has no metrics then.
    """
    chosen = env.choice(CERTIFICATE, default="own", allowed=("own", "serving"))
    if chosen == "own":
        return False, ()
    if settings.kind != "prometheus" or not settings.is_https:
        return False, (f"{CERTIFICATE} is ignored: only prometheus with scheme=https has one",)
    if env.find(*NAMES[KEY]) is None:
        env.refuse(
            ConfigError(
                f"{CERTIFICATE}=serving asks for the certificate of {KEY}, which is not set"
            )
        )
    return True, ()


def _settings(value: str) -> MetricsSettings:
    """Read ``MM_METRICS``; raises ``ConfigError``."""
    kind, colon, rest = value.partition(":")
    kind = kind.strip().lower()
    if kind not in _KINDS or (colon and not rest.strip()):
        raise wrong("MM_METRICS", value, _GRAMMAR)
    parameters = _Parameters(value, kind, rest)
    warnings = []
    if parameters.mentions("mem_detail"):
        warnings.append("MM_METRICS: mem_detail has no meaning here: there is no JVM")
    return MetricsSettings(
        kind=kind,
        port=parameters.port(),
        is_https=parameters.choice("scheme", "https", ("https", "http")) == "https",
        has_full_names=parameters.boolean("fq_names"),
        is_per_model=parameters.boolean("per_model_metrics"),
        is_legacy=parameters.boolean("legacy"),
        warnings=tuple(warnings),
    )


class _Parameters:
    """What stands behind the kind, ``name=value;name=value``."""

    def __init__(self, whole: str, kind: str, text: str) -> None:
        self._whole = whole
        self._kind = kind
        self._given: dict[str, str] = {}
        for part in text.split(";") if text.strip() else ():
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not (name and equals and value):
                raise wrong("MM_METRICS", whole, _GRAMMAR)
            if name not in _PARAMETERS[kind]:
                allowed = ", ".join(sorted(_PARAMETERS[kind])) or "none"
                raise ConfigError(f'MM_METRICS="{whole}": no parameter {name}; allowed: {allowed}')
            self._given[name] = value

    def mentions(self, name: str) -> bool:
        """Answer whether it was given."""
        return name in self._given

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """Answer one of ``allowed``, in any case."""
        value = self._given.get(name, default).lower()
        if value not in allowed:
            raise ConfigError(f'MM_METRICS="{self._whole}": {name} is {" or ".join(allowed)}')
        return value

    def boolean(self, name: str) -> bool:
        """Answer true or false; without a word, false."""
        return self.choice(name, "false", ("true", "false")) == "true"

    def port(self) -> int:
        """Answer the port; only one to listen on may be 0, "a free one"."""
        text = self._given.get("port", str(_PORTS[self._kind]))
        minimum = 1 if self._kind == "statsd" else 0
        is_number = text.isascii() and text.isdigit() and len(text) <= 5
        if not is_number or not minimum <= int(text) <= 65535:
            raise ConfigError(f'MM_METRICS="{self._whole}": port is a number to 65535')
        return int(text)


def _info(env: Environment) -> InfoMetric | None:
    value = env.text("MM_INFO_METRICS")
    if not value:
        return None
    name, _, rest = value.partition(";")
    pairs = [_LABEL.fullmatch(part.strip()) for part in rest.split(",")]
    if not _INFO_NAME.fullmatch(name) or len(pairs) > INFO_LABELS_MAX:
        raise wrong("MM_INFO_METRICS", value, _INFO_GRAMMAR)
    labels: dict[str, str] = {}
    for pair in pairs:
        if pair is None or pair[1] in labels:
            raise wrong("MM_INFO_METRICS", value, _INFO_GRAMMAR)
        found = env.find(pair[2])
        if found is None:
            raise ConfigError(
                f"MM_INFO_METRICS takes label {pair[1]} from {pair[2]}: it is not set"
            )
        labels[pair[1]] = found[1]
    return InfoMetric(name, tuple(labels.items()))
