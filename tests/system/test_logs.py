"""Lines of real instances: headers of calls in them, on either data plane and at whichever instance
a call comes to; JSON; the level while it runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.system.etcd import Keys
from tests.system.meshes import Mesh, mesh_of

pytestmark = [pytest.mark.system, pytest.mark.etcd]


@pytest.fixture
def mesh(dataplane: str, kv_store: str, new_service_name: Callable[[], str]) -> Iterator[Mesh]:
    settings = {
        "MM_DATAPLANE": dataplane,
        "MM_LOG_EACH_INVOKE": "true",
        "MM_LOG_REQUEST_HEADERS": '{"ascii": "ah", "utf8-bin": "uh", "absent": "no"}',
    }
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        yield mesh


def test_header_logging_at_the_instance_that_has_the_model(mesh: Mesh, keys: Keys) -> None:
    mesh.add_all("i-1", "i-2")
    one, two = mesh.instances
    one.register("m", load_now=True, sync=True)
    [holder] = json.loads(keys.table(one.prefix("registry"))["m"])["instanceIds"]
    there = one if holder == "i-1" else two
    for number, instance in enumerate(mesh.instances):
        metadata = [
            ("mm-model-id", "m"),
            ("ascii", f"a{number}"),
            ("utf8-bin", "ä".encode()),
            ("other", "1"),
        ]
        instance.predict("m", metadata=metadata)
        there.serve.wait_line(
            r"model m: invoking model runtime gRPC method: mmesh.ExamplePredictor/predict"
            rf" \{{ah=a{number}, uh=ä\}}$"
        )


def test_lines_are_json_and_the_level_changes_while_it_runs(
    kv_store: str, new_service_name: Callable[[], str], keys: Keys
) -> None:
    settings = {"MM_LOG_FORMAT": "json", "MM_LOG_EACH_INVOKE": "true"}
    with mesh_of(kv_store, settings, new_service_name()) as mesh:
        instance = mesh.add("i-1")
        instance.register("m", load_now=True, sync=True)
        instance.predict("m")
        line = instance.serve.wait_line(r".*invoking model runtime.*")[0]
        told = json.loads(line)
        assert told["level"] == "INFO"
        assert told["contextMap"] == {}

        config = instance.prefix("config")
        keys.put(config + "logger_level", "warn")
        # What is told of a wrong value comes after what was set before it.
        keys.put(config + "scaleup_rpm_threshold", "wrong-1")
        instance.serve.wait_line("wrong-1")
        before = instance.serve.output().count("invoking model runtime")
        instance.predict("m")
        keys.put(config + "scaleup_rpm_threshold", "wrong-2")
        instance.serve.wait_line("wrong-2")
        assert instance.serve.output().count("invoking model runtime") == before
        keys.delete(config + "logger_level")
        keys.put(config + "scaleup_rpm_threshold", "wrong-3")
        instance.serve.wait_line("wrong-3")
        after = len(instance.serve.lines)
        instance.predict("m")
        instance.serve.wait_line("invoking model runtime", after=after - 1)
