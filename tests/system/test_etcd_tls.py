"""A real instance by the secret of modelmesh-serving: TLS, a client certificate, a user; all of
them exchanged while it serves, and none of them in its log.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import anyio
import pytest

from mm.edge.etcd_process import EtcdProcess
from tests.edge.test_etcd_tls import AUTHORITY, PASSWORD, enable_users, tls_etcd
from tests.identities import Pair
from tests.system.meshes import mesh_of

pytestmark = [pytest.mark.system, pytest.mark.etcd]


def secret(path: Path, etcd: EtcdProcess, client: Pair, **attributes: str) -> None:
    """Write the JSON as the controller does for a user's namespace: certificates inline."""
    content = {
        "endpoints": f"https://{etcd.endpoint}",
        "root_prefix": "modelmesh-serving/mm_ns/x",
        "userid": "root",
        "password": PASSWORD,
        "certificate": AUTHORITY.certificate.decode(),
        "client_certificate": client.certificate.decode(),
        "client_key": client.key.decode(),
    }
    path.write_text(json.dumps(content | attributes))


def test_an_instance_serves_while_its_credentials_are_exchanged(tmp_path: Path) -> None:
    client, successor = AUTHORITY.issue("root"), AUTHORITY.issue("root")
    path = tmp_path / "etcd_connection"
    with tls_etcd(AUTHORITY.issue("etcd", ["127.0.0.1"]), asks_clients=True) as etcd:
        anyio.run(enable_users, etcd.endpoint)
        secret(path, etcd, client)
        with mesh_of(f"etcd:{path}", {}, "secret") as mesh:
            instance = mesh.add("i-1")
            instance.register("m", load_now=True, sync=True)

            secret(path, etcd, successor, password="hunter3")
            instance.serve.wait_line("so the ones before hold on: user 'root' is refused")
            instance.register("m2", load_now=True, sync=True)

            secret(path, etcd, successor)
            instance.serve.wait_line("the changed settings are in use")
            instance.register("m3", load_now=True, sync=True)
            for model_id in ("m", "m2", "m3"):
                instance.predict(model_id)
            output = instance.serve.output()
    for each in (PASSWORD, "hunter3", *_lines(client.key), *_lines(successor.key)):
        assert each not in output


def _lines(pem: bytes) -> list[str]:
    lines = [line for line in pem.decode().splitlines() if "-----" not in line]
    assert base64.b64decode("".join(lines))
    return lines


def test_a_start_without_the_right_to_tells_what_to_set(tmp_path: Path) -> None:
    path = tmp_path / "etcd_connection"
    with tls_etcd(AUTHORITY.issue("etcd", ["127.0.0.1"]), asks_clients=True) as etcd:
        secret(path, etcd, AUTHORITY.issue("root"), client_certificate="", client_key="")
        with mesh_of(f"etcd:{path}", {}, "secret") as mesh:
            serve = mesh.start_serve("i-1", {"INTERNAL_GRPC_PORT": "1"})
            assert serve.wait_end(60) == 1
            assert "it refuses our client certificate, or wants one" in serve.complaint
            assert "(tried for 2.5 s; see KV_STORE)" in serve.complaint
