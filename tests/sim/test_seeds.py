"""Fifty seeds of the simulator, most of them in a small world, and that a seed is one run.

`make sim SEEDS=1000` runs more of them by hand, each in a world of the usual size. A failing one
prints what led there, and the line that replays it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import anyio
import pytest

from mm.cli.sim import lines_of_failure
from mm.testing.invariants import InvariantError, Invariants
from mm.testing.simulator import Options, simulate

#: These have the usual size, and one of them the long last part (``steadiness``).
WHOLE = (1, 2, 3)
#: Half of the time and of the models: every kind of fault, and as many calls for each model.
HALF = Options(models_count=16, safety_s=25.0)


@pytest.mark.parametrize("seed", range(50))
def test_nothing_is_violated(seed: int) -> None:
    run = simulate(seed, Options() if seed in WHOLE else HALF)
    if run.failure is not None:
        pytest.fail("\n".join(lines_of_failure(run)), pytrace=False)
    assert run.answers["SERVED"] > 0.2 * sum(run.answers.values()), run.answers
    assert run.loads_count > 0
    assert run.faults_count > 0


#: A small world has as many changes of vmodels in a quarter of the time, with less beside them.
SMALL = Options(instances_count=3, models_count=5, safety_s=30.0, vmodels_count=4)


@pytest.mark.parametrize(
    ("seed", "options"), [(1, Options(vmodels_count=4)), *((seed, SMALL) for seed in (2, 3, 4))]
)
def test_vmodels_are_as_they_were_set(seed: int, options: Options) -> None:
    run = simulate(seed, options)
    if run.failure is not None:
        pytest.fail("\n".join(lines_of_failure(run)), pytrace=False)
    assert run.vmodel_answers["DEFINED"] > 10, run.vmodel_answers


_DIGEST = """
from mm.testing.simulator import Options, simulate
print(simulate(100, Options(safety_s=20.0)).digest)
"""


def test_one_seed_is_one_run_in_every_process() -> None:
    short = Options(safety_s=20.0)
    digests = {simulate(100, short).digest}  # whatever ran in this process before
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    assert simulate(101, short).digest not in digests, "another seed is another run"


def test_a_run_can_be_of_another_size() -> None:
    run = simulate(1, Options(instances_count=2, models_count=6, safety_s=5.0))
    assert run.failure is None
    assert run.replay == "mm sim --first-seed 1 --seeds 1 --instances 2 --models 6 --seconds 5"


def test_a_run_that_fails_tells_of_the_faults_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: Invariants) -> None:
        if anyio.current_time() > 20.0:
            raise InvariantError(self._cluster.log, "nothing", "happens after twenty seconds")

    monkeypatch.setattr(Invariants, "look", look)
    run = simulate(1, Options(instances_count=2, models_count=6))
    assert run.failure is not None
    assert run.faults_count > 0
