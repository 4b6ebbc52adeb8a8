"""Payloads over HTTP and HTTPS, to a real server: what is posted, and what is made of answers."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mm.edge.payload_http import DeliveryError, HttpSink
from mm.edge.payloads import Payload
from mm.payload_settings import PayloadSink
from tests.edge.http_sink import http_sink
from tests.identities import Authority

REQUEST = Payload(
    "i-1-7",
    0,
    "m ä",
    "v%1",
    "p.S/M",
    b"\x00\xff",
    [(b"a", b"1"), (b"a", b"2"), (b"b-bin", b"AP8"), (b"c-bin", b"AA==")],
    None,
    is_request=True,
)
RESPONSE = Payload("i-1-7", 0, "m", "", "p.S/M", b"", [], 5, is_request=False)


@contextmanager
def _carrier(
    url: str, *, userinfo: str = "", timeout_s: float = 30.0, trust: Path | None = None
) -> Iterator[HttpSink]:
    sink = PayloadSink(url.partition(":")[0], url, userinfo)
    trust_path = None if trust is None else str(trust)
    with closing(HttpSink(sink, "/mesh/i 1", timeout_s, trust_path)) as carrier:
        yield carrier


def test_the_body_is_that_of_the_java_mesh() -> None:
    with http_sink() as sink, _carrier(f"http://127.0.0.1:{sink.port}/a/b?m%201") as carrier:
        carrier.deliver(REQUEST)
        carrier.deliver(RESPONSE)
        request, response = sink.next(), sink.next()
    assert request.target == response.target == "/a/b?m%201"
    assert request.headers["content-type"] == "application/json"
    assert request.body == {
        "id": "i-1-7",
        "modelid": "m ä",
        "vModelId": "v%1",
        "data": "AP8=",
        "kind": "request",
        "status": "",
        "metadata": {"a": "2", "b-bin": "AP8=", "c-bin": "AA=="},
    }
    assert response.body == {
        "id": "i-1-7",
        "modelid": "m",
        "vModelId": "",
        "data": "",
        "kind": "response",
        "status": "NOT_FOUND",
        "metadata": {},
    }
    assert request.connection == response.connection


def test_each_is_a_cloud_event() -> None:
    with http_sink() as sink, _carrier(f"http://127.0.0.1:{sink.port}") as carrier:
        for payload in (REQUEST, RESPONSE, replace(RESPONSE, number=2, code=77)):
            carrier.deliver(payload)
        events = [
            {name: value for name, value in post.headers.items() if name.startswith("ce-")}
            for post in (sink.next(), sink.next(), sink.next())
        ]
    for event in events:
        told = datetime.datetime.fromisoformat(event.pop("ce-time"))
        assert abs((datetime.datetime.now(datetime.UTC) - told).total_seconds()) < 3600
    assert events[0] == {
        "ce-specversion": "1.0",
        "ce-id": "i-1-7-request",
        "ce-source": "/mesh/i%201",
        "ce-type": "org.kubeflow.serving.inference.request",
        "ce-subject": "m%20%C3%A4",
        "ce-modelid": "m%20%C3%A4",
        "ce-vmodelid": "v%251",
        "ce-method": "p.S/M",
    }
    assert events[1]["ce-id"] == "i-1-7-response"
    assert events[1]["ce-type"] == "org.kubeflow.serving.inference.response"
    assert "ce-vmodelid" not in events[1]
    assert events[2]["ce-id"] == "i-1-7-response-2"


def test_user_and_password_of_the_uri_are_sent() -> None:
    with http_sink() as sink:
        with _carrier(f"http://127.0.0.1:{sink.port}/", userinfo="u:p w") as carrier:
            carrier.deliver(REQUEST)
        assert sink.next().headers["authorization"] == "Basic dTpwIHc="


def test_a_connection_that_was_closed_meanwhile_is_no_fault() -> None:
    with http_sink() as sink, _carrier(f"http://127.0.0.1:{sink.port}") as carrier:
        sink.hangs_up = True
        for _ in range(3):
            carrier.deliver(REQUEST)
        assert [sink.next().connection for _ in range(3)] == [1, 2, 3]


def test_a_long_answer_is_not_waited_for() -> None:
    with http_sink() as sink, _carrier(f"http://127.0.0.1:{sink.port}") as carrier:
        sink.length = 2_000_000
        carrier.deliver(REQUEST)
        carrier.deliver(REQUEST)
        assert [sink.next().connection for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("status", [302, 404, 500])
def test_what_is_not_taken_is_told(status: int) -> None:
    with http_sink() as sink, _carrier(f"http://127.0.0.1:{sink.port}") as carrier:
        sink.status = status
        with pytest.raises(DeliveryError, match=f"it answers {status}"):
            carrier.deliver(REQUEST)
        sink.status = 204
        sink.length = 0
        carrier.deliver(REQUEST)


def test_nobody_there_and_no_answer() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        with _carrier(f"http://127.0.0.1:{port}") as carrier:
            with pytest.raises(DeliveryError, match="Connection refused"):
                carrier.deliver(REQUEST)
        holder.listen()
        with _carrier(f"http://127.0.0.1:{port}", timeout_s=0.05) as carrier:
            with pytest.raises(DeliveryError, match="no answer in time"):
                carrier.deliver(REQUEST)


def test_https_to_whom_is_trusted_and_certificates_are_exchanged(tmp_path: Path) -> None:
    before, after = Authority("before"), Authority("after")
    trust = tmp_path / "trust.pem"
    trust.write_bytes(before.certificate)
    with http_sink(before.issue("sink", ["127.0.0.1"]), tmp_path) as sink:
        url = f"https://127.0.0.1:{sink.port}/x"
        with _carrier(url, trust=trust) as carrier:
            carrier.deliver(REQUEST)
            assert sink.next().target == "/x"
            # Another authority: the next connection is made by what the file says then.
            trust.write_bytes(after.certificate)
            carrier.close()
            with pytest.raises(DeliveryError, match="its certificate is not trusted") as caught:
                carrier.deliver(REQUEST)
            assert "MM_PAYLOAD_PROCESSORS_TRUST_CERT_PATH" in str(caught.value)
            trust.write_bytes(b"hunter2")
            with pytest.raises(DeliveryError, match="holds no certificates in PEM form") as caught:
                carrier.deliver(REQUEST)
            assert f"MM_PAYLOAD_PROCESSORS_TRUST_CERT_PATH={trust}" in str(caught.value)
            assert "hunter2" not in str(caught.value)
            trust.write_bytes(after.certificate + before.certificate)
            carrier.deliver(REQUEST)
        with _carrier(url) as carrier:  # whom the system trusts
            with pytest.raises(DeliveryError, match="its certificate is not trusted"):
                carrier.deliver(REQUEST)
        other = f"https://localhost:{sink.port}"
        with _carrier(other, trust=trust) as carrier:
            with pytest.raises(DeliveryError, match="Hostname mismatch"):
                carrier.deliver(REQUEST)
