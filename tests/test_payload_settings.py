"""``MM_PAYLOAD_PROCESSORS`` (around 17): what a URI says, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.config import Config
from mm.errors import ConfigError
from mm.payload_settings import SINKS_MAX, PayloadSettings, PayloadSink


def _config(processors: str, **variables: str) -> Config:
    environment = {"KV_STORE": "memory", "MM_PAYLOAD_PROCESSORS": processors} | variables
    return Config.from_environment(environment)


def _sink(uri: str) -> PayloadSink:
    [sink] = _config(uri).payloads.sinks
    return sink


@pytest.mark.parametrize(
    ("uri", "sink"),
    [
        ("logger:///", PayloadSink("logger", "logger:/")),
        ("logger:///*?*#*", PayloadSink("logger", "logger:/*?*")),
        ("http://sink:8080", PayloadSink("http", "http://sink:8080")),
        ("https://sink/a/b", PayloadSink("https", "https://sink/a/b")),
        ("http://sink/x?m1", PayloadSink("http", "http://sink/x?m1", model_id="m1")),
        ("http://sink?m%20%C3%A4", PayloadSink("http", "http://sink?m%20%C3%A4", model_id="m ä")),
        ("http://sink#/p.S/M", PayloadSink("http", "http://sink", method="p.S/M")),
        ("http://sink/?/*#/*", PayloadSink("http", "http://sink/?/*")),
        ("http://u:p%40w@sink/", PayloadSink("http", "http://sink/", userinfo="u:p@w")),
    ],
)
def test_what_a_uri_says(uri: str, sink: PayloadSink) -> None:
    found = _sink(uri)
    assert (found.scheme, found.userinfo, found.model_id, found.method) == (
        sink.scheme,
        sink.userinfo,
        sink.model_id,
        sink.method,
    )
    if sink.scheme != "logger":
        assert found.url == sink.url


@pytest.mark.parametrize(
    ("uri", "method", "model_id", "wanted"),
    [
        ("logger:///", "p.S/M", "m", True),
        ("logger:///?m", "p.S/M", "m", True),
        ("logger:///?m", "p.S/M", "mm", False),
        ("logger:///#p.S/M", "p.S/M", "m", True),
        ("logger:///#p.S/M", "q.S/M", "m", False),
        # What the Java mesh's documentation says, and its code never did.
        ("logger:///#M", "p.S/M", "m", True),
        ("logger:///#M", "p.S/MM", "m", False),
        ("logger:///?m#M", "p.S/M", "other", False),
    ],
)
def test_filters_are_exact(uri: str, method: str, model_id: str, wanted: bool) -> None:
    assert _sink(uri).wants(method, model_id) is wanted


def test_several_observers_and_the_models_that_they_name() -> None:
    payloads = _config("http://a?m1  https://b?m2#M ").payloads
    assert [str(sink) for sink in payloads.sinks] == ["http://a", "https://b"]
    assert payloads.models == {"m1", "m2"}
    assert _config("http://a?m1 logger:///").payloads.models is None


def test_none_by_default(tmp_path: Path) -> None:
    assert Config.from_environment({"KV_STORE": "memory"}).payloads == PayloadSettings()
    trust = tmp_path / "ca.pem"
    trust.touch()
    payloads = _config(
        "",
        MM_PAYLOAD_PROCESSORS_CAPACITY="7",
        MM_PAYLOAD_PROCESSORS_THREADS="3",
        MM_PAYLOAD_PROCESSORS_TRUST_CERT_PATH=str(trust),
    ).payloads
    assert payloads == PayloadSettings(queue_length_max=7, threads=3, trust_path=str(trust))


def test_what_has_no_scheme_is_ignored_as_in_the_java_mesh_but_told() -> None:
    config = _config("example:8080/consumer/kserve/v2 logger:///")
    assert len(config.payloads.sinks) == 1
    assert (
        'MM_PAYLOAD_PROCESSORS: "example:8080/consumer/kserve/v2" has no scheme, and is ignored;'
        " http:// before it sends payloads there"
    ) in config.warnings


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("ftp://a", '"ftp://a" has the scheme "ftp"; allowed; logger:///'),
        ("kafka", '"kafka" has the scheme ""; allowed'),
        ("http:///path", '"http:///path" names no host; allowed'),
        ("http://a:port", '"http://a:port" is no URI; allowed'),
        ("http://u:hunter2@a:port?hunter2", '"http://***@a:port" is no URI'),
        (" ".join(["http://a"] * (SINKS_MAX + 1)), f"names 17 observers; allowed: {SINKS_MAX}"),
    ],
)
def test_what_is_refused(uri: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _config(uri)
    assert text.replace("allowed; ", "allowed: ") in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_no_secret_is_shown() -> None:
    sink = _sink("https://u:hunter2@sink/path?hunter3")
    assert "hunter2" not in repr(sink) + str(sink)
    assert str(sink) == "https://sink/path"
