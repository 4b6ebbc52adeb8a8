"""The modelmesh-serving controller against three instances: what it relies on holds (interop 1, 2).

Each test is a piece of its life, in one mesh, and ends quiet: nothing changes in etcd any more, and
all instances say the same. The controller itself fails at an answer that it could not digest, or
that contradicts one that it had before (``controller.Observed``).

The long form, by hand, on a machine that does nothing else:

    MM_CONTROLLER_PREDICTORS=200 MM_CONTROLLER_QUIET_S=5 pytest this file
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import grpc
import pytest

from mm.pb import mmesh
from tests.system.controller import Controller, Predictor, predictor_of
from tests.system.etcd import Keys
from tests.system.grpcio_runtime import GrpcioRuntime, Held, grpcio_runtime
from tests.system.meshes import Instance, Mesh, mesh_of, record_of
from tests.system.processes import eventually
from tests.system.yardstick import Yardstick, yardstick_of

pytestmark = pytest.mark.system

ERROR = "the archive is damaged"
PREDICTORS = int(os.environ.get("MM_CONTROLLER_PREDICTORS", "4"))
#: Without a change for so long, nothing goes round in circles: the controller calls at once.
QUIET_S = float(os.environ.get("MM_CONTROLLER_QUIET_S", "0.5"))
LONG_QUIET_S = 5.0
#: What the controller can stand, beside what the machine takes for itself (``yardstick``): each
#: call, and until all instances say the same.
CALL_S = AGREE_S = 1.0
NAMES = ("ctl-a", "ctl-b", "ctl-c")


def load(held: Held) -> None:
    if held.path.startswith("broken"):
        held.context.abort(grpc.StatusCode.INTERNAL, ERROR)


@dataclass(slots=True)
class World:
    """The mesh, its records, and the controller that runs now."""

    mesh: Mesh
    keys: Keys
    runtimes: dict[str, GrpcioRuntime]
    yardstick: Yardstick
    controller: Controller

    def running(self) -> list[Instance]:
        return [each for each in self.mesh.instances if each.serve.process.poll() is None]

    def restart_controller(self, *predictors: Predictor) -> None:
        """End it and start another one, which knows what Kubernetes has: these."""
        self._check_calls()
        self.controller.close()
        self.controller = controller_of(self.mesh, self.keys, *predictors)

    def settle(self, *predictors: Predictor, quiet_s: float = QUIET_S) -> None:
        """See that what the controller heard at one instance all say, and that nothing happens
        any more.
        """
        for predictor in predictors:
            self._agree(predictor)
        self.controller.wait_quiet(quiet_s)
        for predictor in predictors:
            self._agree(predictor)
        self.controller.settled()
        self._check_calls()

    def versions(self) -> list[dict[str, int]]:
        """How many times each model and vmodel was written."""
        return [self.keys.versions(self.mesh.prefix(table)) for table in ("registry", "vmodels")]

    def settle_failed(self, predictor: Predictor) -> None:
        """Settle with one that cannot be loaded, and see that to ask for it again writes nothing:
        each write would be a reason to ask again (interop 2.5).
        """
        self.settle(predictor)

        def is_left_alone() -> bool:
            before, calls_count = self.versions(), len(self.controller.calls)
            self.controller.apply(predictor)
            eventually(lambda: len(self.controller.calls) > calls_count, what="it asks again")
            self.controller.wait_quiet(QUIET_S)
            return self.versions() == before

        # On a busy machine the last writes may come after the silence that was waited for.
        eventually(is_left_alone, what="a call changes nothing")

    def _agree(self, predictor: Predictor) -> None:
        began_s = time.monotonic()

        def do_agree() -> bool:
            answers = [status_of(each, predictor) for each in self.running()]
            return all(answer == answers[0] for answer in answers)

        what = f"all say the same of {predictor}"
        eventually(do_agree, what=what)
        self.yardstick.check(began_s, time.monotonic(), AGREE_S, what)

    def _check_calls(self) -> None:
        for began_s, ended_s, method in list(self.controller.calls):
            self.yardstick.check(began_s, ended_s, CALL_S, method)


def status_of(instance: Instance, predictor: Predictor) -> mmesh.VModelStatusInfo:
    request = mmesh.GetVModelStatusRequest(v_model_id=predictor.name, owner=predictor.source)
    method = "/mmesh.ModelMesh/getVModelStatus"
    answer = instance.call(method, request, mmesh.VModelStatusInfo)
    assert isinstance(answer, mmesh.VModelStatusInfo)
    return answer


def controller_of(mesh: Mesh, keys: Keys, *predictors: Predictor) -> Controller:
    running = [each.port for each in mesh.instances if each.serve.process.poll() is None]
    return Controller(keys, mesh.prefix, running, predictors)


@pytest.fixture(scope="module")
def world(
    dataplane: str, kv_store: str, keys: Keys, new_service_name: Callable[[], str]
) -> Iterator[World]:
    settings = {
        "MM_DATAPLANE": dataplane,
        "MM_TYPE_CONSTRAINTS": json.dumps({"mt:gpu:1": {"required": ["mt:gpu:1"]}}),
    }
    with ExitStack() as stack:
        mesh = stack.enter_context(mesh_of(kv_store, settings, new_service_name()))
        runtimes = {
            name: stack.enter_context(grpcio_runtime(f"unix:{mesh.socket_path(name)}"))
            for name in NAMES
        }

        def add(name: str) -> None:
            runtimes[name].before_load = load
            mesh.add_beside(name, None, {"INTERNAL_GRPC_SOCKET_PATH": mesh.socket_path(name)})

        with ThreadPoolExecutor() as pool:
            list(pool.map(add, NAMES))
        mesh.wait_acquainted()
        yardstick = stack.enter_context(yardstick_of(keys))
        world = World(mesh, keys, runtimes, yardstick, controller_of(mesh, keys))
        yield world
        world.controller.close()


def test_ids_are_taken_apart_as_the_controller_does() -> None:
    model_id = Predictor("my__name", "isvc", "p").model_id
    assert predictor_of(model_id) == ("my__name", "isvc")
    assert predictor_of("name__isvc-6b2eb0b8bf") == ("name", "isvc")
    for foreign in ("name", "name__isvc", "name_isvc-6b2eb0b8bf", "name__isvc+6b2eb0b8bf", "__"):
        assert predictor_of(foreign) is None


def test_create_and_repeat(world: World) -> None:
    """Each is loaded at once, and once all are, every further call leaves etcd alone."""
    predictors = [Predictor(f"made-{number}", "isvc", "ok") for number in range(PREDICTORS)]
    bring_up(world, predictors)
    world.settle(*predictors)
    # On a busy machine the last writes may come after the silence that was waited for.
    eventually(partial(all_are_ready, world, predictors), what="their records say so")
    prefixes = [world.mesh.prefix(table) for table in ("registry", "vmodels")]
    before = [world.keys.table(prefix) for prefix in prefixes]
    versions = world.versions()
    world.restart_controller(*predictors)
    for each in predictors:
        world.controller.wait(each, "UpToDate", "Loaded")
    world.settle(*predictors)
    assert [world.keys.table(prefix) for prefix in prefixes] == before
    assert world.versions() == versions
    record = record_of(before[0], predictors[0].model_id)
    assert (record["refs"], record["autoDel"]) == (1, True)
    assert before[1][predictors[0].name] == (
        f'{{"o":"isvc","amid":"{predictors[0].model_id}","tmid":"{predictors[0].model_id}"}}'
    )


def test_a_model_that_is_broken_from_the_start(world: World) -> None:
    broken = Predictor("born-broken", "ksp", "broken")
    world.controller.apply(broken)
    world.controller.wait(broken, "UpToDate", "FailedToLoad")
    observed = world.controller.observed[broken.name, broken.source]
    assert ERROR in observed.failure
    world.settle_failed(broken)
    world.controller.remove(broken)
    eventually(partial(is_gone, world, broken), what="it is deleted")
    world.settle()


def test_an_update_of_what_is_loaded(world: World) -> None:
    first = Predictor("updated", "isvc", "ok-1")
    second = replace(first, path="ok-2")
    world.controller.apply(first)
    world.controller.wait(first, "UpToDate", "Loaded")
    world.settle(first)  # else the next call may come to an instance that has not heard of it yet
    world.controller.apply(second)
    world.controller.wait(second, "UpToDate", "Loaded")
    eventually(partial(is_gone, world, first), what="the first model is deleted")
    world.settle(second)
    seen = world.controller.observed["updated", "isvc"].seen
    assert ("InProgress", first.model_id, "Loaded", "Loading") in seen


def test_an_update_to_a_broken_model_and_back(world: World) -> None:
    good = Predictor("broken-later", "isvc", "ok-1")
    broken = replace(good, path="broken-2")
    world.controller.apply(good)
    world.controller.wait(good, "UpToDate", "Loaded")
    world.controller.apply(broken)
    world.controller.wait(broken, "BlockedByFailedLoad", "Loaded", "FailedToLoad")
    assert ERROR in world.controller.observed["broken-later", "isvc"].failure
    world.settle_failed(broken)
    world.controller.apply(good)
    world.controller.wait(good, "UpToDate", "Loaded")
    eventually(partial(is_gone, world, broken), what="the broken model is deleted")
    world.settle(good)


def test_a_type_that_no_instance_has(world: World) -> None:
    """The controller asks again and again, in case one comes: that changes nothing in etcd."""
    waiting = Predictor("waiting", "isvc", "ok", model_type="mt:gpu:1")
    world.controller.apply(waiting)
    world.controller.wait(waiting, "UpToDate", "FailedToLoad")
    assert world.controller.observed["waiting", "isvc"].is_waiting
    prefixes = [world.mesh.prefix(table) for table in ("registry", "vmodels")]
    before = [world.keys.table(prefix) for prefix in prefixes]
    versions = world.versions()
    calls = len(world.controller.calls)
    eventually(lambda: len(world.controller.calls) >= calls + 5, what="it asks again")
    assert [world.keys.table(prefix) for prefix in prefixes] == before
    assert world.versions() == versions
    supported = replace(waiting, model_type="mt:example:1")
    world.controller.apply(supported)
    world.controller.wait(supported, "UpToDate", "Loaded")
    world.settle(supported)


def test_delete_and_delete_again(world: World) -> None:
    predictor = Predictor("deleted", "ksp", "ok")
    world.controller.apply(predictor)
    world.controller.wait(predictor, "UpToDate", "Loaded")
    world.controller.remove(predictor)
    eventually(partial(is_gone, world, predictor), what="its model is deleted")
    assert predictor.name not in world.keys.table(world.mesh.prefix("vmodels"))
    world.controller.remove(predictor)
    world.settle()


def test_a_name_of_another_owner(world: World) -> None:
    mine, theirs = Predictor("shared", "isvc", "ok"), Predictor("shared", "ksp", "ok")
    world.controller.apply(mine)
    world.controller.wait(mine, "UpToDate", "Loaded")
    world.controller.apply(theirs)
    world.controller.wait_refused(theirs)
    # Whoever does not own it cannot delete it either.
    world.controller.remove(theirs)
    world.settle(mine)
    assert world.controller.observed["shared", "isvc"].active == "Loaded"


def test_a_long_silence_and_a_killed_instance(world: World) -> None:
    """The last of the module: two instances are left."""
    predictors = [Predictor(f"kept-{number}", "isvc", "ok") for number in range(PREDICTORS)]
    bring_up(world, predictors)
    world.settle(*predictors, quiet_s=LONG_QUIET_S)
    world.controller.check_quiet(LONG_QUIET_S)
    copies = status_of(world.mesh[0], predictors[0]).active_model_status
    assert copies is not None
    holder = copies.model_copy_infos[0].location
    victim = next(each for each in world.mesh.instances if each.instance_id == holder)
    world.controller.disturbed()
    victim.kill()
    # Its lease runs out now, and not in twenty seconds.
    world.keys.revoke(world.keys.lease_of(world.mesh.prefix("instances") + holder))
    changed = replace(predictors[0], path="ok-after")
    world.controller.apply(changed)
    world.controller.wait(changed, "UpToDate", "Loaded")
    assert status_of(world.running()[0], changed).active_model_id == changed.model_id
    # Later the mesh takes out what the killed one had: no silence from here on is the last one.
    world.settle(*predictors[1:], changed)


def is_gone(world: World, predictor: Predictor) -> bool:
    return predictor.model_id not in world.keys.table(world.mesh.prefix("registry"))


def bring_up(world: World, predictors: Sequence[Predictor]) -> None:
    for each in predictors:
        world.controller.apply(each)
    for each in predictors:
        world.controller.wait(each, "UpToDate", "Loaded")


def all_are_ready(world: World, predictors: Sequence[Predictor]) -> bool:
    records = world.keys.table(world.mesh.prefix("registry"))
    return all('"state":"ready"' in records[each.model_id] for each in predictors)
