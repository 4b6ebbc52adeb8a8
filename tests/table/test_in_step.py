"""Twin and extension side by side: the same calls, the same answers, the same state after each.

Hypothesis looks for short differences; a long seeded run reaches what needs many models (growth of
the index, tombstones, the sort that replaces re-linking).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mm import _lru, _lru_py
from mm.table import LOCAL, NONE, CopyState

# Ids on both sides of what a slot holds inline, few enough to meet again.
MODEL_IDS = [*"abcdefg", "m" * 40, "m" * 41, "m" * 39 + "é"]
VMODEL_IDS = ["v", "w", "a"]
INSTANCE_IDS = ["i1", "i2", "i3", "i4", "i5"]

model_ids = st.sampled_from(MODEL_IDS)
vmodel_ids = st.sampled_from(VMODEL_IDS)
weights = st.integers(0, 6)
times = st.integers(0, 12)
states = st.sampled_from(CopyState)
readers = st.integers(0, 2)


def outcome(call: Callable[[], Any]) -> object:
    """Answer what the call answers, or which error it raises with which words."""
    try:
        return call()
    except (ValueError, KeyError) as error:
        return type(error), str(error)


class Pair:
    """The two tables behind one method."""

    def __init__(self, capacity_units: int) -> None:
        self.fast = _lru.Table(capacity_units)
        self.plain = _lru_py.Table(capacity_units)

    def do(self, method: str, *arguments: object) -> Any:
        """Call both; answer what both answered."""
        fast = outcome(lambda: getattr(self.fast, method)(*arguments))
        plain = outcome(lambda: getattr(self.plain, method)(*arguments))
        assert fast == plain, f"{method}{arguments}"
        assert type(fast) is type(plain), f"{method}{arguments}"
        return fast

    def compare(self, model_ids: list[str]) -> None:
        """Compare all that can be asked, but for what answering changes."""
        for name in ("capacity_units", "used_units", "count", "kept_units"):
            assert getattr(self.fast, name) == getattr(self.plain, name), name
        self.do("oldest")
        assert len(self.fast) == len(self.plain)
        for model_id in model_ids:
            assert (model_id in self.fast) == (model_id in self.plain), model_id
            for ask in ("state", "weight", "last_used", "in_flight", "flags", "concurrency_max"):
                self.do(ask, model_id)
            self.do("is_kept", model_id)
            self.do("peers", model_id)
            self.do("peer_loads", model_id)
        self.fast.check_invariants()
        self.plain.check_invariants()

    def take_busy(self) -> None:
        """Compare what is busy, which is told in any order."""
        assert sorted(self.fast.take_busy()) == sorted(self.plain.take_busy())

    def compare_order(self) -> None:
        """Compare the whole order; asking for it brings the extension's up to date."""
        assert list(self.fast.cached()) == list(self.plain.cached())


class InStep(RuleBasedStateMachine):
    """Every method of a table, on both."""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[int] = [LOCAL, NONE]

    @initialize(capacity_units=st.integers(0, 15))
    def open(self, capacity_units: int) -> None:
        self.pair = Pair(capacity_units)

    @rule(model_id=model_ids, method=st.sampled_from(["add", "discard"]))
    def know(self, model_id: str, method: str) -> None:
        self.pair.do(method, model_id)

    @rule(model_id=model_ids, weight_units=weights, last_used_ms=times)
    def put(self, model_id: str, weight_units: int, last_used_ms: int) -> None:
        self.pair.do("put", model_id, weight_units, last_used_ms)

    @rule(model_id=model_ids, weight_units=weights)
    def set_weight(self, model_id: str, weight_units: int) -> None:
        self.pair.do("set_weight", model_id, weight_units)

    @rule(model_id=model_ids, kept=st.booleans())
    def keep(self, model_id: str, kept: bool) -> None:
        self.pair.do("keep", model_id, kept)

    @rule(capacity_units=st.integers(0, 15))
    def set_capacity(self, capacity_units: int) -> None:
        self.pair.do("set_capacity", capacity_units)

    @rule(model_id=model_ids)
    def remove(self, model_id: str) -> None:
        self.pair.do("remove", model_id)

    @rule(touches=st.lists(st.tuples(model_ids, times), max_size=8))
    def touch(self, touches: list[tuple[str, int]]) -> None:
        for model_id, now_ms in touches:
            self.pair.do("touch", model_id, now_ms)

    @rule()
    def walk(self) -> None:
        self.pair.compare_order()

    @rule(model_id=model_ids, state=states)
    def set_state(self, model_id: str, state: CopyState) -> None:
        self.pair.do("set_state", model_id, state)

    @rule(model_id=model_ids, method=st.sampled_from(["pin", "unpin", "begin_unload"]))
    def call(self, model_id: str, method: str) -> None:
        self.pair.do(method, model_id)

    @rule()
    def take_busy(self) -> None:
        self.pair.take_busy()

    @rule(
        model_id=model_ids,
        method=st.sampled_from(["set_flags", "set_concurrency_max"]),
        value=st.integers(0, 3),
    )
    def mark(self, model_id: str, method: str, value: int) -> None:
        self.pair.do(method, model_id, value)

    @rule(instance_id=st.sampled_from(INSTANCE_IDS))
    def add_instance(self, instance_id: str) -> None:
        handle = self.pair.do("add_instance", instance_id)
        if handle not in self.handles:
            self.handles.append(handle)

    @rule(data=st.data())
    def remove_instance(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.handles))
        self.pair.do("remove_instance", handle)
        assert self.pair.do("instance_of", handle) is None

    @rule(model_id=model_ids, data=st.data())
    def set_peers(self, model_id: str, data: st.DataObject) -> None:
        handles = data.draw(st.lists(st.sampled_from(self.handles), max_size=6))
        self.pair.do("set_peers", model_id, handles)

    @precondition(lambda self: len(self.handles) > 2)
    @rule(model_id=model_ids, in_flight=st.integers(0, 4), data=st.data())
    def report_load(self, model_id: str, in_flight: int, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.handles))
        self.pair.do("report_load", handle, model_id, in_flight)

    @rule(model_id=model_ids, draw=st.integers(0, 2**64 - 1), data=st.data())
    def choose(self, model_id: str, draw: int, data: st.DataObject) -> None:
        exclude = data.draw(st.lists(st.sampled_from(self.handles), max_size=3))
        chosen = self.pair.do("choose", model_id, draw, exclude)
        assert chosen == NONE or chosen not in exclude

    @rule(vmodel_id=vmodel_ids, model_id=model_ids)
    def set_alias(self, vmodel_id: str, model_id: str) -> None:
        self.pair.do("set_alias", vmodel_id, model_id)
        assert self.pair.do("resolve", vmodel_id) == model_id

    @rule(vmodel_id=vmodel_ids)
    def remove_alias(self, vmodel_id: str) -> None:
        self.pair.do("remove_alias", vmodel_id)

    @rule()
    def register_reader(self) -> None:
        self.pair.do("reader_online", self.pair.do("register_reader"))

    @rule(
        reader=readers,
        method=st.sampled_from(["reader_online", "reader_offline", "unregister_reader"]),
    )
    def pass_quiescent_point(self, reader: int, method: str) -> None:
        self.pair.do(method, reader)

    @rule()
    def reclaim(self) -> None:
        self.pair.do("reclaim")

    @invariant()
    def same(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare(MODEL_IDS)
            for vmodel_id in VMODEL_IDS:
                self.pair.do("resolve", vmodel_id)


# Readers that register without end run into their limit, which is not what is looked for here.
InStep.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestInStep = InStep.TestCase


def test_a_long_run_with_many_models_in_step() -> None:
    chance = random.Random(3)
    ids = [
        f"model-{each:04}__isvc-{chance.getrandbits(40):010x}{'x' * (each % 50)}"
        for each in range(900)
    ]
    pair = Pair(3_000)
    handles = [pair.do("add_instance", f"i{each}") for each in range(8)]
    now_ms = 1_000
    for step in range(12_000):
        now_ms += chance.randrange(3)
        model_id = ids[int(chance.triangular(0, len(ids), 0))]
        match chance.randrange(13):
            case 0 | 1:
                pair.do("put", model_id, chance.randrange(20), now_ms - chance.randrange(400))
            case 2:
                pair.do("set_weight", model_id, chance.randrange(30))
            case 3:
                pair.do("discard", model_id)
            case 4:
                pair.do("set_state", model_id, CopyState(chance.randrange(4)))
            case 5:
                pair.do("set_peers", model_id, chance.sample(handles, chance.randrange(6)))
            case 6:
                pair.do("choose", model_id, chance.getrandbits(64), chance.sample(handles, 2))
            case 7 if step % 40 == 7:
                pair.do("set_capacity", chance.randrange(1_000, 4_000))
            case 9:
                pair.do("keep", model_id, chance.random() < 0.6)
            case 8:
                pair.do("report_load", chance.choice(handles), model_id, chance.randrange(9))
            case _:
                pair.do("touch", model_id, now_ms + chance.randrange(-50, 50))
        if step % 1_000 == 0:
            pair.compare(ids)
    pair.compare(ids)
    pair.compare_order()
