"""Observed models on real instances: their calls are shown, on either data plane, and the calls of
others stay where they were.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

import pytest

from mm.pb import mmesh
from tests.edge.http_sink import Post, Sink, http_sink
from tests.system.meshes import Mesh, mesh_of
from tests.system.processes import eventually
from tests.system.test_metrics import Scraper

pytestmark = [pytest.mark.system, pytest.mark.etcd]

METHOD = "mmesh.ExamplePredictor/predict"


@pytest.fixture
def sink() -> Iterator[Sink]:
    with http_sink() as sink:
        yield sink


@pytest.fixture
def mesh(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str], sink: Sink
) -> Iterator[Mesh]:
    settings = {
        "MM_DATAPLANE": dataplane,
        "MM_METRICS": "prometheus:port=0;scheme=http",
        "MM_PAYLOAD_PROCESSORS": f"http://127.0.0.1:{sink.port}/x?seen#{METHOD}",
    }
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        yield mesh


def both(sink: Sink) -> list[Post]:
    """Answer request and answer of a call; they may overtake each other on their way."""
    return sorted((sink.next(), sink.next()), key=lambda post: post.body["kind"])


def test_only_observed_models_are_shown_and_pay(mesh: Mesh, sink: Sink, dataplane: str) -> None:
    mesh.add_all("i-1", "i-2")
    one, two = mesh.instances
    for model_id in ("seen", "other"):
        one.register(model_id, load_now=True, sync=True)
    request = mmesh.SetVModelRequest(v_model_id="v", target_model_id="seen")
    one.call("/mmesh.ModelMesh/setVModel", request, mmesh.VModelStatusInfo)
    scraper = Scraper(one)

    def spliced() -> float:
        return scraper.page().get("mm_wire_spliced_model_total", 0.0)

    def by_itself() -> float:
        page = scraper.page()
        return page["mm_wire_calls_here_total"] + page["mm_wire_calls_there_total"]

    def wire_knows() -> bool:
        one.predict("other")
        return dataplane == "python" or by_itself() > 0

    eventually(wire_knows, what="the wire knows of the copy")
    before = spliced()
    for number in range(5):
        one.predict("other", f"{number}")
    assert spliced() == before
    assert sink.posts.empty()

    # From either instance, whichever has the copy; and behind a vmodel.
    two.predict("seen", "hello")
    direct = both(sink)
    one.predict("", "hello", metadata=[("mm-vmodel-id", "v"), ("a", "1")])
    behind = both(sink)
    assert direct[0].body["id"] == direct[1].body["id"] != behind[0].body["id"]
    for post in (*direct, *behind):
        assert post.target == "/x?seen"
        assert post.body["modelid"] == "seen"
        assert post.headers["ce-method"] == METHOD
    for request, response in (direct, behind):
        given = mmesh.PredictRequest.parse(base64.b64decode(request.body["data"]))
        answer = mmesh.PredictResponse.parse(base64.b64decode(response.body["data"]))
        assert given.text == "hello"
        assert answer != mmesh.PredictResponse()
        assert response.body["status"] == "OK"
    assert (direct[0].body["vModelId"], behind[0].body["vModelId"]) == ("", "v")
    assert behind[0].body["metadata"]["a"] == "1"
    if dataplane == "wire":
        assert spliced() == before + 1
    eventually(
        lambda: scraper.page()["mm_payloads_delivered_total"] == 2, what="deliveries counted"
    )
