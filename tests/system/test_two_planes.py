"""The differential test: the same random calls through both data planes, answered alike.

By hand for longer:  python -m tests.system.test_two_planes SEED CALLS [FIRST]
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from mm.demo.processes import free_ports
from mm.pb import mmesh
from tests.system.conftest import running_etcd
from tests.system.meshes import Instance, mesh_of
from tests.system.random_calls import (
    FAR,
    FAR_VMODEL,
    HELD,
    HELD_TYPE,
    MODEL,
    OTHER,
    VMODEL,
    make_call,
)
from tests.system.random_messages import DATAPLANE
from tests.system.scripted_runtime import runtimes
from tests.system.two_planes import Plane, describe, differences, new_rng

pytestmark = [pytest.mark.system, pytest.mark.etcd]

SEED, CALLS = 7, 150
PLANES = ("python", "wire")
Pair = tuple[Instance, Instance]
Ports = tuple[int, ...]


@contextmanager
def two_of_each(
    kv_store: str, new_name: Callable[[], str], serving_ports: Sequence[Ports]
) -> Iterator[list[Pair]]:
    """Two instances of each kind, with one runtime for management; answers whom clients call, and
    the other.
    """
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(plane: str, ports: Ports) -> Pair:
            settings = {
                "MM_DATAPLANE": plane,
                "MM_DATAPLANE_CONFIG": DATAPLANE,
                "MM_TYPE_CONSTRAINTS": json.dumps({HELD_TYPE: {"required": ["other"]}}),
            }
            mesh = stack.enter_context(mesh_of(kv_store, settings, new_name()))
            called, other = (
                mesh.add(
                    name,
                    settings={"INTERNAL_SERVING_GRPC_PORT": str(port), "MM_LABELS": name},
                )
                for name, port in zip(("called", "other"), ports, strict=True)
            )
            place_models(called, other)
            return called, other

        yield list(pool.map(start, PLANES, serving_ports))


def serving_ports() -> list[Ports]:
    """Answer two ports for each plane."""
    ports = free_ports(2 * len(PLANES))
    return [ports[at : at + 2] for at in range(0, len(ports), 2)]


def place_models(called: Instance, other: Instance) -> None:
    """Load what the calls are for, each at one place."""
    for model_id, at in ((MODEL, called), (OTHER, called), (FAR, other), (HELD, other)):
        model_type = HELD_TYPE if at is other else "example"
        called.register(model_id.decode(), "SIZE_1000_0_0", model_type=model_type)
        at.load_here(model_id.decode())
    for vmodel_id, model_id in ((VMODEL, MODEL), (FAR_VMODEL, FAR)):
        vmodel = mmesh.SetVModelRequest(
            v_model_id=vmodel_id.decode(), target_model_id=model_id.decode(), sync=True
        )
        called.call("/mmesh.ModelMesh/setVModel", vmodel, mmesh.VModelStatusInfo)


async def compare(
    pairs: list[Pair], serving_ports: Sequence[Ports], seed: int, numbers: range
) -> int:
    """Send calls to both; answers how many were answered differently, and prints them."""
    wrong = 0
    async with runtimes(serving_ports) as behind:
        planes = [
            Plane(name, *pair, runtime)
            for name, pair, runtime in zip(PLANES, pairs, behind, strict=True)
        ]
        for number in numbers:
            wrong += await differs(planes, seed, number)
        for plane in planes:
            await plane.close()
    return wrong


async def differs(planes: list[Plane], seed: int, number: int) -> bool:
    """Answer whether a call is answered differently, and print how."""
    call = make_call(new_rng(seed, number))
    one, other = await asyncio.gather(*(plane.do(call) for plane in planes))
    found = differences(call, one, other)
    if found:
        print(f"--- seed {seed}, call {number}", describe(call), *found, sep="\n")
    return bool(found)


def test_both_planes_answer_the_same_calls_alike(
    kv_store: str, new_service_name: Callable[[], str]
) -> None:
    ports = serving_ports()
    with two_of_each(kv_store, new_service_name, ports) as pairs:
        wrong = asyncio.run(compare(pairs, ports, SEED, range(CALLS)))
    assert wrong == 0, "see what was printed"


def main() -> int:
    """Compare as many as one wants."""
    seed, calls, *rest = map(int, sys.argv[1:])
    first = rest[0] if rest else 0
    ports = serving_ports()
    names = iter(("python-plane", "wire-plane"))
    with (
        running_etcd() as etcd,
        two_of_each(f"etcd:http://{etcd.endpoint}", lambda: next(names), ports) as pairs,
    ):
        return asyncio.run(compare(pairs, ports, seed, range(first, first + calls)))


if __name__ == "__main__":
    sys.exit(main() > 0)
