"""MM_METRICS and MM_INFO_METRICS: what is understood, and what ends the start."""

from __future__ import annotations

import pytest

from mm.environment import Environment
from mm.errors import ConfigError
from mm.metrics_settings import InfoMetric, MetricsSettings, metrics_settings


def read(**variables: str) -> MetricsSettings:
    env = Environment(variables)
    settings = metrics_settings(env)
    env.check()
    return settings


def test_statsd_beside_the_instance_is_the_default() -> None:
    assert read() == MetricsSettings() == MetricsSettings(kind="statsd", port=8126)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("disabled", MetricsSettings(kind="disabled", port=0)),
        ("prometheus", MetricsSettings(kind="prometheus", port=2112)),
        (
            "prometheus:port=2112;scheme=https",
            MetricsSettings(kind="prometheus", port=2112, is_https=True),
        ),
        (
            "prometheus:scheme=HTTP;port=0;fq_names=true;per_model_metrics=true",
            MetricsSettings(
                kind="prometheus", port=0, is_https=False, has_full_names=True, is_per_model=True
            ),
        ),
        ("statsd:port=9;legacy=true", MetricsSettings(kind="statsd", port=9, is_legacy=True)),
    ],
)
def test_what_is_understood(text: str, settings: MetricsSettings) -> None:
    assert read(MM_METRICS=text) == settings
    # As `mm config` shows it.
    shown = str(settings)
    assert read(MM_METRICS=shown) == settings


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read(
            MM_METRICS="x",
            MM_INFO_METRICS="y",
            MM_LOG_PROMETHEUS_REQS="z",
            MM_METRICS_CERTIFICATE="a",
        )
    assert len(caught.value.complaints) == 4


def test_the_page_may_show_the_certificate_that_clients_see() -> None:
    serving = {"MM_METRICS": "prometheus", "MM_METRICS_CERTIFICATE": "Serving"}
    with pytest.raises(ConfigError, match="MM_TLS_PRIVATE_KEY_PATH, which is not set"):
        read(**serving)
    found = read(**serving, TAS_SVC_GRPC_PRIVATE_KEY_PATH="/key")
    assert found.shows_serving_certificate
    assert not read(MM_METRICS="prometheus").shows_serving_certificate
    for kind in ("statsd", "disabled", "prometheus:scheme=http"):
        ignored = read(**serving | {"MM_METRICS": kind})
        assert not ignored.shows_serving_certificate
        assert "MM_METRICS_CERTIFICATE is ignored" in ignored.warnings[0]


@pytest.mark.parametrize(
    "text",
    [
        *("graphite", "prometheus:", "prometheus:port", "prometheus:port=", "prometheus:=1"),
        *("prometheus:ports=1", "prometheus:legacy=true", "statsd:scheme=http", "disabled:port=1"),
        *("prometheus:port=x", "prometheus:port=65536", "prometheus:port=-1", "statsd:port=0"),
        *("prometheus:scheme=ftp", "prometheus:fq_names=1", ""),
    ],
)
def test_what_is_not_ends_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match="MM_METRICS"):
        read(MM_METRICS=text)


def test_what_means_nothing_is_named() -> None:
    settings = read(MM_METRICS="prometheus:mem_detail=gc")
    assert [warning.split()[0] for warning in settings.warnings] == ["MM_METRICS:"]
    assert read(MM_INFO_METRICS="a;b=HOME", HOME="/").info is None
    assert read(MM_INFO_METRICS="a;b=HOME", HOME="/").warnings


def test_the_info_metric_takes_its_labels_from_the_environment() -> None:
    settings = read(
        MM_METRICS="prometheus", MM_INFO_METRICS="ns:info;zone=ZONE,slot=SLOT", ZONE="z", SLOT=""
    )
    assert settings.info == InfoMetric("ns:info", (("zone", "z"), ("slot", "")))


@pytest.mark.parametrize(
    "text",
    [
        *("info", "info;", "Info;a=HOME", "info2;a=HOME", "info;a", "info;a=HOME,a=HOME"),
        *("info;a=HOME,b=HOME,c=HOME,d=HOME,e=HOME", "info;a=NOT_SET_AT_ALL", "info;1=HOME"),
    ],
)
def test_info_metrics_that_are_wrong(text: str) -> None:
    with pytest.raises(ConfigError, match="MM_INFO_METRICS"):
        read(MM_METRICS="prometheus", MM_INFO_METRICS=text, HOME="/")
