"""The management of models to the letter, over gRPC and as etcd shows it (around 5, 12; core 2.10).

What the tests of the Java mesh say of it is in ``test_conformance_single``; the clock's part (last
uses, expiry) is held in virtual time by ``tests/mesh``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import grpc
import pytest

from mm.pb import mmesh
from tests.system.conftest import Pair
from tests.system.etcd import Keys
from tests.system.meshes import Instance, mesh_of, record_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Code = grpc.StatusCode
Status = mmesh.ModelStatusInfoModelStatus
MANAGEMENT = "/mmesh.ModelMesh/"
LEGACY = "/com.ibm.watson.tas.proto.TasRuntime/"
PATH = "SIZE_1000000_10_0"
HOUR_MS = 3600 * 1000
#: Far more than passes between a call and its record, far less than an hour.
SLACK_MS = 10 * 60 * 1000


def test_what_is_registered_is_what_stands_in_etcd(pair: Pair, keys: Keys) -> None:
    prefix = pair.mesh.prefix("registry")
    pair.holder.register("plain", "", model_type="t")
    pair.other.register("full", "p", model_type="t", key='{"k": "v"}')
    records = keys.table(prefix)
    plain = record_of(records, "plain")
    assert set(plain) == {"type", "lu"}, "an empty path and key are absent"
    full = record_of(records, "full")
    assert (full["type"], full["mPath"], full["encKey"]) == ("t", "p", '{"k": "v"}')
    for name in ("plain", "full"):
        pair.other.unregister(name)
        pair.other.unregister(name)
        assert keys.get(prefix + name) is None


def test_last_used_times(pair: Pair, keys: Keys) -> None:
    now_ms = time.time() * 1000
    key = pair.mesh.prefix("registry") + "used"

    def age_ms(last_used_ms: float) -> float:
        pair.other.register("used", PATH, last_used_ms=int(last_used_ms))
        return float(now_ms - record_of({"used": keys.get(key) or ""}, "used")["lu"])

    assert age_ms(0) == pytest.approx(6 * HOUR_MS, abs=SLACK_MS)
    assert age_ms(now_ms - 5.5 * HOUR_MS) == pytest.approx(6 * HOUR_MS, abs=SLACK_MS)
    assert age_ms(now_ms - 3 * HOUR_MS) == pytest.approx(3 * HOUR_MS, abs=1)
    assert age_ms(now_ms - 4 * HOUR_MS) == pytest.approx(3 * HOUR_MS, abs=1)
    assert age_ms(now_ms + 99 * HOUR_MS) == pytest.approx(0, abs=SLACK_MS)
    pair.other.unregister("used")


def test_registering_again(pair: Pair, keys: Keys) -> None:
    """Whoever asks: the same is no news, anything else a conflict, whatever else is asked for."""
    prefix = pair.mesh.prefix("registry")
    first = pair.holder.register("again", PATH, model_type="held", key="k")
    assert (first.status, first.errors, first.model_copy_infos) == (Status.NOT_LOADED, [], [])
    written = keys.get(prefix + "again")
    for instance in (pair.holder, pair.other):
        same = instance.register("again", PATH, model_type="held", key="k")
        assert same.status == Status.NOT_LOADED
        for path, model_type, key in (
            ("SIZE_2_0_0", "held", "k"),
            (PATH, "other", "k"),
            (PATH, "held", ""),
        ):
            register = partial(instance.register, "again", path, model_type=model_type, key=key)
            for load_now in (False, True):
                code, text = refusal(partial(register, load_now=load_now))
                assert code == Code.ALREADY_EXISTS
                assert text.startswith("Model already exists with different")
    assert keys.get(prefix + "again") == written
    loaded = pair.other.ensure_loaded("again", sync=True)
    (copy,) = loaded.model_copy_infos
    assert (loaded.status, copy.location) == (Status.LOADED, pair.holder.instance_id)
    assert copy.time == pytest.approx(time.time() * 1000, abs=SLACK_MS)
    real = pair.other.register("again", PATH, model_type="held", key="k")
    assert (real.status, real.errors) == (Status.LOADED, [])
    pair.holder.unregister("again")


def test_unknown_models(pair: Pair) -> None:
    for instance in (pair.holder, pair.other):
        assert instance.status("unknown") == mmesh.ModelStatusInfo()
        unknown = refusal(partial(instance.ensure_loaded, "unknown"))
        assert unknown == (Code.NOT_FOUND, "model not found")
        instance.unregister("unknown")


@pytest.mark.parametrize(
    "model_id", ["/", "a/b", "..", "../registry/echo", "mø日本 🙂", "x" * 4096, "ø" * 2048]
)
def test_any_text_may_be_an_id(pair: Pair, keys: Keys, model_id: str) -> None:
    prefix = pair.mesh.prefix("registry")
    pair.holder.register(model_id, PATH, model_type="held")
    assert keys.get(prefix + model_id) is not None, "the key is the id as it is"
    for instance in (pair.other, pair.holder):
        reply = instance.predict("", metadata=[("mm-model-id-bin", model_id.encode())])
        assert reply.results[0].category == f"classification for hello by model {model_id}"
        assert instance.status(model_id).status == Status.LOADED
    pair.other.unregister(model_id)
    assert keys.get(prefix + model_id) is None
    assert pair.other.status(model_id).status == Status.NOT_FOUND
    eventually(lambda: pair.holder.status(model_id).status == Status.NOT_FOUND)


@pytest.mark.parametrize(
    ("model_id", "text"),
    [
        ("", "must provide non-empty modelId"),
        ("***GETSTATE***", "***GETSTATE*** is a debug id of the Java model-mesh"),
        ("***LOGCACHE***", "***LOGCACHE*** is a debug id of the Java model-mesh"),
        ("x" * 4097, "an id has at most 4096 bytes, this one 4097"),
        ("ø" * 2049, "an id has at most 4096 bytes, this one 4098"),
    ],
)
def test_ids_that_nothing_can_have(pair: Pair, model_id: str, text: str) -> None:
    calls: list[Callable[[Instance], object]] = [
        lambda instance: instance.register(model_id, PATH),
        lambda instance: instance.ensure_loaded(model_id),
        lambda instance: instance.status(model_id),
        lambda instance: instance.unregister(model_id),
    ]
    for instance in (pair.holder, pair.other):
        for call in calls:
            code, found = refusal(partial(call, instance))
            assert code == Code.INVALID_ARGUMENT
            assert found.startswith(text)


@pytest.mark.parametrize("service", [MANAGEMENT, LEGACY])
def test_every_method_has_its_older_names(pair: Pair, service: str) -> None:
    for register, unregister in (
        ("registerModel", "unregisterModel"),
        ("addModel", "deleteModel"),
    ):
        pair.other.register("named", PATH, method=service + register)
        request = mmesh.GetStatusRequest(model_id="named")
        status = pair.other.call(service + "getModelStatus", request, mmesh.ModelStatusInfo)
        assert status.status == Status.NOT_LOADED
        pair.other.unregister("named", method=service + unregister)
    ensure = mmesh.EnsureLoadedRequest(model_id="echo")
    status = pair.other.call(service + "ensureLoaded", ensure, mmesh.ModelStatusInfo)
    assert status.status == Status.LOADED


def test_read_only_mode(dataplane: str, new_service_name: Callable[[], str]) -> None:
    """While a store moves: nothing is written, and what writes nothing is answered as ever."""
    settings = {"MM_DATAPLANE": dataplane, "KV_READ_ONLY": "true"}
    with mesh_of("memory", settings, new_service_name()) as mesh:
        only = mesh.add("only")
        code, text = refusal(partial(only.register, "m", PATH))
        assert (code, text) == (Code.UNAVAILABLE, "model-mesh read-only mode")
        only.unregister("m")
        assert only.status("m").status == Status.NOT_FOUND
        request = mmesh.SetVModelRequest(
            v_model_id="v", target_model_id="m", model_info=mmesh.ModelInfo(type="t")
        )
        call = partial(only.call, MANAGEMENT + "setVModel", request, mmesh.VModelStatusInfo)
        assert refusal(call) == (Code.UNAVAILABLE, "model-mesh is in read-only mode")
