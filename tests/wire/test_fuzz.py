"""A few executions of each kind of fuzzing; ``make fuzz`` makes as many as there is time for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.wire.fuzz.mutations import conversations, mutated
from tests.wire.fuzz.stand import KINDS, identities, run, serve

#: Few of those whose answers may never come.
EXECUTIONS = {"clients": 300, "python": 200, "records": 100, "peers": 30, "runtimes": 30}


@pytest.mark.parametrize("kind", KINDS)
def test_some_executions(kind: str, tmp_path: Path) -> None:
    with serve(kind, *identities(tmp_path)) as stand:
        run(stand, kind, range(EXECUTIONS[kind]))
        if stand.upstream is not None:
            assert stand.upstream.spoilt > EXECUTIONS[kind] // 3


def test_a_seed_says_the_same_again() -> None:
    talk, *others = conversations()
    said = [mutated(talk, others[0], random.Random(7)) for _ in range(2)]
    assert said[0] == said[1]
    assert said[0] != talk
