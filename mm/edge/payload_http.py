"""Payloads over HTTP and HTTPS (around 17): the body of the Java mesh, as a CloudEvent.

Owns the request. It blocks, and is called in threads: the standard library's client is well kept,
and an observer is called a few hundred times a second at most.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.client
import json
import ssl
from typing import Final
from urllib.parse import quote, urlsplit

from mm.edge.payloads import Payload
from mm.payload_settings import PayloadSink

#: Of an answer this much is read, so that the connection can be used again.
_ANSWER_BYTES_MAX: Final = 64 * 1024
#: What servers close without a word between two requests.
_WENT_STALE: Final = (http.client.RemoteDisconnected, ConnectionError)
#: The types that KServe's own logger gives its events, so that what reads those reads these.
_EVENT_TYPE: Final = "org.kubeflow.serving.inference."
#: What a header of an event shows as it is (HTTP binding of CloudEvents 1.0, 3.1.3.2).
_PLAIN: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')


class DeliveryError(Exception):
    """A payload did not arrive, or was not wanted; the text holds nothing of it."""


class HttpSink:
    """One connection to an observer, kept open. ``trust_path`` is read for each connection anew, so
    certificates may be exchanged.
    """

    def __init__(
        self, sink: PayloadSink, source: str, timeout_s: float, trust_path: str | None
    ) -> None:
        parts = urlsplit(sink.url)
        assert parts.hostname is not None
        self._is_tls = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._source = source
        self._timeout_s = timeout_s
        self._trust_path = trust_path
        self._authorization = ""
        if sink.userinfo:
            self._authorization = "Basic " + base64.b64encode(sink.userinfo.encode()).decode()
        self._connection: http.client.HTTPConnection | None = None

    def deliver(self, payload: Payload) -> None:
        """Post it; raises ``DeliveryError``."""
        body, headers = body_of(payload), event_headers(payload, self._source)
        if self._authorization:
            headers["Authorization"] = self._authorization
        try:
            status = self._post(body, headers)
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            raise DeliveryError(_reason(exc)) from exc
        if not 200 <= status < 300:
            raise DeliveryError(f"it answers {status}")

    def close(self) -> None:
        """Close the connection; the next payload opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _post(self, body: bytes, headers: dict[str, str]) -> int:
        if self._connection is not None:
            # It may have been closed meanwhile: that says nothing of the observer.
            with contextlib.suppress(*_WENT_STALE):
                return self._request(self._connection, body, headers)
            self.close()
        self._connection = self._connect()
        return self._request(self._connection, body, headers)

    def _connect(self) -> http.client.HTTPConnection:
        if not self._is_tls:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            context = ssl.create_default_context(cafile=self._trust_path)
        except OSError as exc:  # ssl.SSLError is one
            raise DeliveryError(
                f"MM_PAYLOAD_PROCESSORS_TRUST_CERT_PATH={self._trust_path} holds no certificates in"
                f" PEM form that can be read: {_reason(exc)}"
            ) from exc
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=self._timeout_s, context=context
        )

    def _request(
        self, connection: http.client.HTTPConnection, body: bytes, headers: dict[str, str]
    ) -> int:
        connection.request("POST", self._target, body, headers)
        response = connection.getresponse()
        response.read(_ANSWER_BYTES_MAX)
        if not response.isclosed():
            self.close()  # it is longer: the rest is not waited for
        return response.status


def body_of(payload: Payload) -> bytes:
    """Answer the body, as the Java mesh makes it."""
    content = {
        "id": payload.call_id,
        "modelid": payload.model_id,
        "vModelId": payload.vmodel_id,
        "data": base64.b64encode(payload.data).decode("ascii"),
        "kind": payload.kind,
        "status": payload.status,
        "metadata": payload.metadata(),
    }
    return json.dumps(content).encode()


def event_headers(payload: Payload, source: str) -> dict[str, str]:
    """Answer the headers that make the request a CloudEvent (1.0, binary mode)."""
    # Source and id together name one event, so request and answer may not share an id.
    event_id = f"{payload.call_id}-{payload.kind}"
    if payload.number:
        event_id += f"-{payload.number}"
    headers = {
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": _shown(event_id),
        "ce-source": quote(source, safe="/-._~"),
        "ce-type": _EVENT_TYPE + payload.kind,
        "ce-time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "ce-subject": _shown(payload.model_id),
        "ce-method": _shown(payload.method),
        "ce-modelid": _shown(payload.model_id),
    }
    if payload.vmodel_id:
        headers["ce-vmodelid"] = _shown(payload.vmodel_id)
    return headers


def _shown(text: str) -> str:
    return quote(text, safe=_PLAIN)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message});"
            " MM_PAYLOAD_PROCESSORS_TRUST_CERT_PATH may name a file of those that are"
        )
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__
