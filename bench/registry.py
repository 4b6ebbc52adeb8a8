"""What one registered model takes of an instance's memory, at 100,000 and 1,000,000 models.

The registry mirror of an instance that holds none of the models, filled as it is at a start: one
listing of the table. Each figure is of a process of its own: resident memory after it less that
before, so everything is counted, the dictionary and Python's own overhead too. "peak" has besides
what the listing itself takes while it is folded. Ids, types, paths and keys are as long as the
modelmesh-serving controller writes them; "stored" is what etcd holds of one model, key and value.
"with copies": one model in twenty has two copies, which is what an instance keeps an index of.

"event" is the time to fold one change of a record: the same however many there are. The times go
with the machine, of which a bare grpclib echo tells that is measured first; memory does not.

    .venv/bin/python bench/registry.py            about a minute
    .venv/bin/python bench/registry.py --quick    10,000 and 100,000 models
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402  (the root must be on the path first)

from bench._goals import Goal, judge  # noqa: E402
from mm.core.copy_record import CopyStage  # noqa: E402
from mm.core.ids import InstanceId  # noqa: E402
from mm.core.records import ModelInfo, ModelRecord  # noqa: E402
from mm.edge.memory_server import MemoryServer  # noqa: E402
from mm.edge.memory_store import MemoryStore  # noqa: E402
from mm.limits import Limits  # noqa: E402
from mm.mesh.ports import Item, Put, Resync  # noqa: E402
from mm.mesh.registry import Registry  # noqa: E402

#: Of each model, with so many: what was asked at first, and what is to be reached.
LIMIT_BYTES, GOAL_BYTES = 1000, 500
GOAL_MODELS = 1_000_000
PREFIX = "/mm/modelmesh-serving/registry/"
#: Changes of records whose time is taken.
EVENTS = 10_000
START_MS = 1_764_000_000_000


@dataclass(frozen=True, slots=True)
class Figures:
    """What one process found, bytes for each model."""

    stored: float
    steady: float
    peak: float
    fold_us: float
    event_us: float


def item(number: int, *, with_copies: bool) -> Item:
    """Answer the stored record of a model, as long as the controller's."""
    name = f"predictor-{number:07d}__isvc-{number * 2654435761 % 2**40:010x}"
    record = ModelRecord(
        ModelInfo(
            "mt:sklearn:0|pv:v2",
            f"models/team-{number % 50}/predictor-{number:07d}/model.joblib",
            f'{{"storage_key":"localMinIO","bucket":"models","disk_size_bytes":{number % 10**6}}}',
        ),
        last_used_ms=START_MS + number,
    )
    if with_copies and number % 20 == 0:
        for copy in (number % 16, (number + 7) % 16):
            instance_id = InstanceId(f"7d9f6b5c8-{copy:05d}")
            record = record.with_copy(instance_id, START_MS + number, START_MS)
            record = record.with_copy_state(instance_id, CopyStage.READY, START_MS + number, 128)
    return Item(PREFIX + name, record.encode(), mod_revision=number + 2, create_revision=number + 2)


def resident_bytes() -> int:
    """Answer what this process has of the machine's memory, with nothing left to give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def measure(count: int, *, with_copies: bool) -> Figures:
    """Fill a registry and answer what that took."""
    registry = Registry(MemoryStore(MemoryServer()), PREFIX, Limits())
    mirror = registry._mirror
    mirror.fold([Put(item(count, with_copies=True))])  # what comes with the first is not counted
    before = resident_bytes()
    items: Sequence[Item] = [item(number, with_copies=with_copies) for number in range(count)]
    stored = sum(len(one.key) + len(one.value) for one in items) / count
    began = time.perf_counter()
    mirror.fold([Resync(items, count + 10)])
    fold_us = (time.perf_counter() - began) / count * 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    changed = [
        Put(replace(one, mod_revision=count + 20 + place))
        for place, one in enumerate(items[:: max(1, count // EVENTS)])
    ]
    items = ()
    steady = resident_bytes()
    gc.freeze()  # as the process does after its start (mm.edge.garbage)
    began = time.perf_counter()
    mirror.fold(changed)
    event_us = (time.perf_counter() - began) / len(changed) * 1e6
    assert len(registry) == count
    return Figures(stored, (steady - before) / count, (peak - before) / count, fold_us, event_us)


def of_own_process(count: int, *, with_copies: bool) -> Figures:
    """Answer ``measure`` of a process that has done nothing else."""
    command = [sys.executable, __file__, "--measure", str(count)]
    if with_copies:
        command.append("--with-copies")
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return msgspec.json.decode(answer, type=Figures)


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller numbers")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--with-copies", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        figures = measure(arguments.measure, with_copies=arguments.with_copies)
        sys.stdout.buffer.write(msgspec.json.encode(figures))
        return 0
    from waiting import measure_echo  # not in the processes that are measured

    goals: list[Goal] = []
    print(f"bare grpclib echo: {measure_echo():.0f} calls/s; bytes for each registered model:")
    print("     models           stored   steady     peak   listing/us   event/us")
    counts = (10_000, 100_000) if arguments.quick else (100_000, GOAL_MODELS)
    for count in counts:
        for with_copies in (False, True):
            found = of_own_process(count, with_copies=with_copies)
            kind = "with copies" if with_copies else ""
            print(
                f"{count:>11,} {kind:<11} {found.stored:>7.0f} {found.steady:>8.0f}"
                f" {found.peak:>8.0f} {found.fold_us:>12.2f} {found.event_us:>10.2f}",
                flush=True,
            )
            what, is_full = f"{count:,} models {kind}".rstrip(), count >= GOAL_MODELS
            if count == counts[-1]:
                goals += [
                    Goal(what, found.steady, "<=", target, "bytes", is_full_size=is_full)
                    for target in (LIMIT_BYTES, GOAL_BYTES)
                ]
    return judge(goals)


if __name__ == "__main__":
    sys.exit(main())
