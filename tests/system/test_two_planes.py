"""The differential test: the same random calls through both data planes, answered alike.

By hand for longer:  python -m tests.system.test_two_planes SEED CALLS [FIRST]
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mm.demo.processes import free_ports
from mm.pb import mmesh
from tests.system.meshes import mesh_of
from tests.system.random_calls import MODEL, OTHER, VMODEL, make_call
from tests.system.random_messages import DATAPLANE
from tests.system.two_planes import Plane, describe, differences, new_rng, runtimes

SEED, CALLS = 7, 150
PLANES = ("python", "wire")


@contextmanager
def one_of_each(serving_ports: tuple[int, ...]) -> Iterator[list[int]]:
    """An instance of each kind, alone in its mesh; answers where clients call."""
    with ExitStack() as stack:
        ports = []
        for plane, serving_port in zip(PLANES, serving_ports, strict=True):
            settings = {"MM_DATAPLANE": plane, "MM_DATAPLANE_CONFIG": DATAPLANE}
            mesh = stack.enter_context(mesh_of("memory", settings, "two-planes"))
            own = {"INTERNAL_SERVING_GRPC_PORT": str(serving_port)}
            instance = mesh.add("same", settings=own)
            for model_id in (MODEL, OTHER):
                instance.register(model_id.decode(), "SIZE_1000_0_0", load_now=True, sync=True)
            vmodel = mmesh.SetVModelRequest(
                v_model_id=VMODEL.decode(), target_model_id=MODEL.decode(), sync=True
            )
            instance.call("/mmesh.ModelMesh/setVModel", vmodel, mmesh.VModelStatusInfo)
            ports.append(instance.port)
        yield ports


async def compare(ports: list[int], serving_ports: list[int], seed: int, numbers: range) -> int:
    """Send calls to both; answers how many were answered differently, and prints them."""
    wrong = 0
    async with runtimes(serving_ports) as behind:
        planes = [Plane(*each) for each in zip(PLANES, ports, behind, strict=True)]
        for number in numbers:
            call = make_call(new_rng(seed, number))
            one, other = await asyncio.gather(*(plane.do(call) for plane in planes))
            if found := differences(call, one, other):
                wrong += 1
                print(f"--- seed {seed}, call {number}", describe(call), *found, sep="\n")
        for plane in planes:
            await plane.close()
    return wrong


def test_both_planes_answer_the_same_calls_alike() -> None:
    serving_ports = free_ports(len(PLANES))
    with one_of_each(serving_ports) as ports:
        wrong = asyncio.run(compare(ports, list(serving_ports), SEED, range(CALLS)))
    assert wrong == 0, "see what was printed"


if __name__ == "__main__":
    seed_, calls_, *first_ = map(int, sys.argv[1:])
    at = first_[0] if first_ else 0
    ports_ = free_ports(len(PLANES))
    with one_of_each(ports_) as clients_:
        sys.exit(asyncio.run(compare(clients_, list(ports_), seed_, range(at, at + calls_))) > 0)
