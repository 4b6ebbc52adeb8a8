"""Records that are none, written straight into etcd: named in the log, skipped, never a crash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

import grpc
import pytest

from mm.pb import mmesh
from tests.system.etcd import Keys
from tests.system.meshes import Instance, Mesh, mesh_of, record_of, refusal
from tests.system.processes import eventually

pytestmark = pytest.mark.system

Code = grpc.StatusCode
Status = mmesh.ModelStatusInfoModelStatus
SIZE = "SIZE_1000000_10_0"

#: Name -> what is no record in any of the three tables.
CORRUPT: dict[str, bytes] = {
    "no-json": b"this is not JSON",
    "cut-off": b'{"instanceIds":{"ghost":17',
    "empty": b"",
    "array": b"[1,2,3]",
    "null": b"null",
    "bytes": b"\xff\xfe\x00\x01",
    "deep": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
}
#: What is wrong with one of the kinds only.
CORRUPT_MODELS = CORRUPT | {
    "wrong-type": b'{"type":17,"instanceIds":{"corrupt-a":1}}',
    "wrong-copies": b'{"type":"example","instanceIds":"everywhere"}',
    "wrong-time": b'{"type":"example","instanceIds":{"ghost":"yesterday"}}',
    "huge-time": b'{"type":"example","instanceIds":{"ghost":99999999999999999999999999}}',
}
CORRUPT_INSTANCES = CORRUPT | {"wrong-count": b'{"cap":"much","used":0,"addr":"127.0.0.1:1"}'}
CORRUPT_VMODELS = CORRUPT | {"no-active": b'{"o":"owner"}', "wrong-active": b'{"amid":3,"tmid":3}'}
TABLES = {
    "registry": CORRUPT_MODELS,
    "instances": CORRUPT_INSTANCES,
    "vmodels": CORRUPT_VMODELS,
}


#: Keys that are nobody's, below a table's prefix; the values are good ones of either kind.
ODD_KEYS = [b"\xff\xfe", b"", b"x" * 70_000]
ODD_VALUE = b'{"type":"example","instanceIds":{"corrupt-a":1,"corrupt-b":1},"addr":"127.0.0.1:1"}'


def put_odd_keys(mesh: Mesh, keys: Keys, age: bytes) -> None:
    for table in ("registry", "instances"):
        for odd in ODD_KEYS:
            key = mesh.prefix(table).encode() + odd
            keys.put(key + age if odd else key, ODD_VALUE)


@pytest.fixture(scope="module")
def mesh(
    dataplane: str, kv_store: str, new_service_name: Callable[[], str], keys: Keys
) -> Iterator[Mesh]:
    """Two instances; some records are corrupt before they start, under names with "old-"."""
    with mesh_of(kv_store, {"MM_DATAPLANE": dataplane}, new_service_name()) as mesh:
        for table, values in TABLES.items():
            for name, value in values.items():
                keys.put(f"{mesh.prefix(table)}old-{name}", value)
        put_odd_keys(mesh, keys, b"-old")
        mesh.add_all("corrupt-a", "corrupt-b")
        mesh[0].register("good", SIZE, load_now=True, sync=True)
        yield mesh


@pytest.fixture(scope="module", params=["old", "new"])
def age(request: pytest.FixtureRequest, mesh: Mesh, keys: Keys) -> str:
    """Whether a record was there first, or came while the instances watched."""
    if request.param == "new":
        for table, values in TABLES.items():
            for name, value in values.items():
                keys.put(f"{mesh.prefix(table)}new-{name}", value)
        put_odd_keys(mesh, keys, b"-new")
    return str(request.param)


@pytest.fixture(autouse=True)
def _all_goes_on(mesh: Mesh) -> Iterator[None]:
    yield
    for instance in mesh.instances:
        assert instance.serve.process.poll() is None, instance.serve.output()
        assert "Traceback" not in instance.serve.output()
        assert instance.predict("good").results[0].confidence == 1.0


def wait_named(instance: Instance, key: str) -> None:
    instance.serve.wait_line(rf"ERROR .*record {key} skipped: \S+")


@pytest.mark.parametrize("name", CORRUPT_MODELS)
def test_models(mesh: Mesh, age: str, name: str) -> None:
    """To clients such a model is not there; it is named once somebody asks, or sooner."""
    model_id = f"{age}-{name}"
    for instance in mesh.instances:
        assert refusal(partial(instance.predict, model_id)) == (Code.NOT_FOUND, "model not found")
        wait_named(instance, mesh.prefix("registry") + model_id)


@pytest.mark.parametrize("name", CORRUPT_VMODELS)
def test_vmodels(mesh: Mesh, age: str, name: str) -> None:
    header = [("mm-vmodel-id", f"{age}-{name}")]
    for instance in mesh.instances:
        refused = refusal(partial(instance.predict, "", metadata=header))
        assert refused == (Code.NOT_FOUND, "vmodel not found")
        wait_named(instance, f"{mesh.prefix('vmodels')}{age}-{name}")


@pytest.mark.parametrize("name", CORRUPT_INSTANCES)
def test_instances(mesh: Mesh, age: str, name: str) -> None:
    for instance in mesh.instances:
        wait_named(instance, f"{mesh.prefix('instances')}{age}-{name}")


def test_odd_keys(mesh: Mesh, age: str) -> None:
    """Of both tables; they are no records at all, whatever their values say."""
    for instance in mesh.instances:
        for line in (rf"'\\udcff\\udcfe-{age}', is no id", "of 0 characters", "of 70004 char"):
            instance.serve.wait_line(f"a key .*{line}")
        assert instance.statistics().instances == len(mesh.instances)


def test_placement_does_not_see_them(mesh: Mesh, age: str) -> None:
    """Loads go to those who are there, and succeed at once."""
    for number in range(6):
        status = mesh[number % 2].register(f"{age}-placed-{number}", SIZE, load_now=True, sync=True)
        assert status.status == Status.LOADED
        assert {copy.location for copy in status.model_copy_infos} <= {"corrupt-a", "corrupt-b"}


def test_a_corrupt_model_is_registered_anew(mesh: Mesh, keys: Keys) -> None:
    """Not over it, as nobody knows what it was; unregistering clears the way."""
    key = mesh.prefix("registry") + "mended"
    keys.put(key, b"{broken")
    code, text = refusal(partial(mesh[0].register, "mended", SIZE))
    assert code == Code.FAILED_PRECONDITION
    assert "unreadable" in text
    mesh[0].unregister("mended")
    assert keys.get(key) is None
    mesh[0].register("mended", SIZE, load_now=True, sync=True)
    eventually(partial(predicts, mesh[1], "mended"))


def test_a_record_that_breaks_while_its_model_is_loaded(mesh: Mesh, keys: Keys) -> None:
    """The model cannot be served by a record that nobody can read; whole again, it is."""
    key = mesh.prefix("registry") + "breaking"
    mesh[0].register("breaking", SIZE, load_now=True, sync=True)
    whole = record_of(keys.table(mesh.prefix("registry")), "breaking")
    keys.put(key, b"{broken")
    for instance in mesh.instances:
        wait_named(instance, key)
    keys.put(key, json.dumps({name: whole[name] for name in ("type", "mPath")}))
    for instance in mesh.instances:
        eventually(partial(predicts, instance, "breaking"))


def predicts(instance: Instance, model_id: str) -> bool:
    """Until the change has come here, the model is not there."""
    future = instance.predict_later(model_id, "hello")
    code: grpc.StatusCode = future.code()
    assert code in (Code.OK, Code.NOT_FOUND), future.details()
    return code == Code.OK


def test_own_record_overwritten(mesh: Mesh, keys: Keys) -> None:
    """An instance puts its own record right, and the others call it again."""
    prefix = mesh.prefix("instances")
    keys.put(prefix + "corrupt-a", b"{broken")
    records = keys.wait(prefix, lambda r: r["corrupt-a"] != "{broken")
    assert record_of(records, "corrupt-a")["addr"] == f"127.0.0.1:{mesh[0].peer_port}"


def test_attributes_that_nobody_knows_are_kept(mesh: Mesh, keys: Keys) -> None:
    """A record of a newer or a Java instance: used as it is, and written back whole."""
    key = mesh.prefix("registry") + "foreign"
    keys.put(key, json.dumps({"type": "example", "mPath": SIZE, "future": {"a": [1, None]}}))
    assert mesh[1].predict("foreign").results[0].confidence == 1.0
    records = keys.wait(mesh.prefix("registry"), lambda r: "instanceIds" in r["foreign"])
    assert record_of(records, "foreign")["future"] == {"a": [1, None]}
