"""The grammar of KV_STORE (spec around 4.1): what is read, and how refusals read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mm.edge.etcd_tls import EtcdTls, system_roots
from mm.edge.kv_config import Embedded, Endpoint, EtcdTarget, Memory, parse
from mm.errors import ConfigError


def _file(directory: Path, **attributes: object) -> str:
    path = directory / "etcd.json"
    path.write_text(json.dumps(attributes))
    return f"etcd:{path}"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("etcd:localhost", EtcdTarget((Endpoint("localhost", 2379),))),
        ("etcd:10.0.0.1:1234", EtcdTarget((Endpoint("10.0.0.1", 1234),))),
        ("etcd:http://etcd.svc.local:2379", EtcdTarget((Endpoint("etcd.svc.local"),))),
        ("etcd:http://etcd:2379/", EtcdTarget((Endpoint("etcd"),))),
        ("etcd:[::1]:99", EtcdTarget((Endpoint("::1", 99),))),
        (
            "etcd:a:1, http://b ,c:3;rootPrefix=modelmesh-serving",
            EtcdTarget(
                (Endpoint("a", 1), Endpoint("b"), Endpoint("c", 3)), root_prefix="modelmesh-serving"
            ),
        ),
        ("etcd:a,a:2379", EtcdTarget((Endpoint("a"),))),
        ("etcd:a;rootPrefix=", EtcdTarget((Endpoint("a"),))),
        ("etcd:a;rootPrefix=p/q=r", EtcdTarget((Endpoint("a"),), root_prefix="p/q=r")),
        (
            "etcd:https://a,b:1",
            EtcdTarget((Endpoint("a"), Endpoint("b", 1)), tls=EtcdTls(system_roots())),
        ),
        ("embedded", Embedded()),
        (" memory ", Memory()),
    ],
)
def test_inline(text: str, target: object) -> None:
    assert parse(text) == target


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["KV_STORE is not set", "allowed: etcd:"]),
        ("consul:x", ["KV_STORE=consul:x", "unknown kind", "memory"]),
        ("etcd", ["KV_STORE=etcd", "allowed"]),
        ("etcd:", ["nothing follows", "allowed"]),
        ("zookeeper:zk:2181/x", ["KV_STORE=zookeeper:zk:2181/x", "not supported", "etcd"]),
        ("etcd:a:0", ["port 0", "1 to 65535"]),
        ("etcd:a:70000", ["port 70000", "1 to 65535"]),
        ("etcd:a,,b", ["'' is not an endpoint", "[http://|https://]host[:port]"]),
        ("etcd:a b", ["'a b' is not an endpoint"]),
        ("etcd:ftp://a", ["'ftp://a' is not an endpoint"]),
        ("etcd:a;prefix=x", ["unknown parameter 'prefix'", "rootPrefix=<prefix>"]),
        ("etcd:a;rootPrefix", ["unknown parameter 'rootPrefix'"]),
        ("etcd:a;rootPrefix=x;rootPrefix=y", ["given twice"]),
        ("etcd:/no/such/file", ["KV_STORE=etcd:/no/such/file", "no such file", "JSON file"]),
        ("etcd:" + "x_" * 2500, ["is not an endpoint"]),
        ("etcd:a,https://b", ["https://b:2379 contradicts the first endpoint", "before each"]),
        ("etcd:https://a,http://b", ["http://b:2379 contradicts the first endpoint"]),
    ],
)
def test_inline_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    for text in (
        "etcd:http://root:hunter2@etcd:2379",
        "etcd:root:hunter2@etcd:2379",
        "etcd://root:hunter2@etcd",
        "etcd://root:x/hunter2@etcd",
        "etcd:a,http://root:hunter2@b",
        "etcd:etcd;userid=root;password=hunter2",
        "etcd:etcd:99999;password=hunter2;rootPrefix=a",
        "zookeeper:root:hunter2@etcd",
    ):
        with pytest.raises(ConfigError) as caught:
            parse(text)
        assert "hunter2" not in str(caught.value)
        assert str(caught.value).startswith(f"KV_STORE={text.partition(':')[0]}:")


def test_file(tmp_path: Path) -> None:
    text = _file(
        tmp_path,
        endpoints="http://etcd:2379,other",
        userid="root",
        password="hunter2",
        root_prefix="modelmesh-serving/mm_ns/x",
    )

    target = parse(text)

    assert target == EtcdTarget(
        (Endpoint("etcd"), Endpoint("other")),
        root_prefix="modelmesh-serving/mm_ns/x",
        user="root",
        password="hunter2",
    )
    assert "hunter2" not in repr(target)
    assert str(target) == "etcd at etcd:2379, other:2379"


def test_file_needs_endpoints_only(tmp_path: Path) -> None:
    assert parse(_file(tmp_path, endpoints="etcd")) == EtcdTarget((Endpoint("etcd"),))


def test_file_with_unknown_attributes_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = _file(tmp_path, endpoints="etcd", compose_deployment="x", colour="red")

    with caplog.at_level(logging.WARNING):
        assert parse(text) == EtcdTarget((Endpoint("etcd"),))

    assert "colour, compose_deployment" in caplog.text


@pytest.mark.parametrize(
    ("attributes", "parts"),
    [
        ({}, ['"endpoints" is missing']),
        ({"endpoints": ["a"]}, ['"endpoints" is of type list', "allowed: text"]),
        ({"endpoints": "a:x"}, ["'a:x' is not an endpoint"]),
        ({"endpoints": "a", "userid": "root"}, ['"password" is missing']),
        ({"endpoints": "a", "password": "hunter2"}, ['"userid" is missing']),
        ({"endpoints": "a", "userid": "root", "password": 7}, ['"password" is of type int']),
        ({"endpoints": "http://a,https://b"}, ["https://b:2379 contradicts", '"endpoints"']),
        ({"endpoints": "a", "override_authority": "a b"}, ["\"override_authority\" is 'a b'"]),
        ({"endpoints": "a", "certificate": 7}, ['"certificate" is of type int']),
    ],
)
def test_file_refused(tmp_path: Path, attributes: dict[str, object], parts: list[str]) -> None:
    text = _file(tmp_path, **attributes)
    with pytest.raises(ConfigError) as caught:
        parse(text)
    for part in [*parts, f"KV_STORE={text}"]:
        assert part in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_certificate_beside_plaintext_endpoints_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = _file(tmp_path, endpoints="http://etcd", certificate="PEM")

    with caplog.at_level(logging.WARNING):
        assert parse(text) == EtcdTarget((Endpoint("etcd"),))

    assert "certificate have no effect" in caplog.text


@pytest.mark.parametrize("content", [b"{", b"[1]", b"", b"\xff\xfe"])
def test_file_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "etcd.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="allowed: one JSON object"):
        parse(f"etcd:{path}")
