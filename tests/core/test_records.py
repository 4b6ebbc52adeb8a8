"""The records' JSON: what Java writes is read and written back, what is corrupt is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.ids import NEVER_MS, UNIT_BYTES, InstanceId, ModelId, units_of
from mm.core.records import (
    DEFAULT_MODEL_TYPE,
    InstanceRecord,
    ModelInfo,
    ModelRecord,
    RecordError,
    VModelRecord,
)

A, B, C, D = (InstanceId(name) for name in "abcd")
Record = type[ModelRecord] | type[InstanceRecord] | type[VModelRecord]


def model(**attributes: Any) -> ModelRecord:
    return ModelRecord.decode(json.dumps(attributes).encode())


def written(record: ModelRecord | InstanceRecord | VModelRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = json.loads(record.encode())
    return attributes


def test_a_last_use_that_cannot_be_is_none() -> None:
    record = model(lu=NEVER_MS)
    assert record.last_used_ms == 0
    assert record.used(5).last_used_ms == 5
    assert model(lu=NEVER_MS - 1).last_used_ms == NEVER_MS - 1


# --- as the Java mesh writes them ---------------------------------------------------------------

JAVA_MODEL = b"""{"type":"rt:triton","encKey":"{\\"storage_key\\":\\"s3\\"}","mPath":"models/m",
"instanceIds":{"5bb64-xk2p9":1650000000000},"failedIn":{"5bb64-aaaaa":1650000000500},
"fails":{"5bb64-aaaaa":{"msg":"INTERNAL: no such file"}},"refs":2,"autoDel":true,
"lu":1650000001000,"lul":1650000002000}"""

JAVA_INSTANCE = b"""{"actionable":true,"lruTime":9223372036854775807,"cap":131072,"lThreads":2,
"loc":"10.0.0.7","labels":["mt:tf","rt:triton"],"startTime":1650000000000,
"vers":1640995200001}"""

JAVA_VMODEL = b'{"o":"ksp","amid":"m__isvc-0123456789","tmid":"m__isvc-9876543210","failed":true}'


def test_a_model_of_java() -> None:
    record = ModelRecord.decode(JAVA_MODEL)
    assert record == ModelRecord(
        info=ModelInfo("rt:triton", "models/m", '{"storage_key":"s3"}'),
        copies={InstanceId("5bb64-xk2p9"): 1650000000000},
        failures={InstanceId("5bb64-aaaaa"): 1650000000500},
        failure_details={"5bb64-aaaaa": {"msg": "INTERNAL: no such file"}},
        references=2,
        auto_delete=True,
        last_used_ms=1650000001000,
        last_unload_ms=1650000002000,
    )
    assert record.failure_text(InstanceId("5bb64-aaaaa")) == "INTERNAL: no such file"
    assert written(record) == json.loads(JAVA_MODEL)


def test_an_instance_of_java() -> None:
    record = InstanceRecord.decode(JAVA_INSTANCE)
    assert record == InstanceRecord(
        start_time_ms=1650000000000,
        version=1640995200001,
        location="10.0.0.7",
        labels=("mt:tf", "rt:triton"),
        lru_time_ms=NEVER_MS,
        capacity_units=131072,
        loading_threads=2,
    )
    assert record.remaining_units == 131072
    assert not record.shutting_down
    assert record.address == ""
    assert written(record) == json.loads(JAVA_INSTANCE)


def test_a_vmodel_of_java() -> None:
    record = VModelRecord.decode(JAVA_VMODEL)
    assert record == VModelRecord(
        active_model_id=ModelId("m__isvc-0123456789"),
        target_model_id=ModelId("m__isvc-9876543210"),
        owner="ksp",
        failed=True,
    )
    assert written(record) == json.loads(JAVA_VMODEL)


# --- what is left out, and what is kept -----------------------------------------------------------


def test_absence_is_the_default() -> None:
    record = ModelRecord.decode(b"{}")
    assert record == ModelRecord(ModelInfo(DEFAULT_MODEL_TYPE))
    assert InstanceRecord.decode(b"{}") == InstanceRecord(lru_time_ms=0)
    nulls = dict.fromkeys(["type", "mPath", "encKey", "instanceIds", "failedIn", "fails", "refs"])
    assert model(**nulls, autoDel=None, lu=None, lul=None) == record


def test_the_default_type_is_written_although_its_absence_means_the_same() -> None:
    assert written(ModelRecord.decode(b"{}")) == {"type": "NLCLASSIFIER"}


def test_defaults_are_not_written() -> None:
    assert written(InstanceRecord()) == {"lruTime": NEVER_MS, "actionable": True}
    vmodel = VModelRecord(ModelId("a"), ModelId("a"))
    assert written(vmodel) == {"amid": "a", "tmid": "a"}


def test_empty_maps_go_when_their_last_entry_goes() -> None:
    record = model(type="t", instanceIds={"a": 5}, failedIn={"b": 6}, fails={"b": {"msg": "x"}})
    record = record.without_copy(A, now_ms=9).without_failure(B)
    assert written(record) == {"type": "t"}


UNKNOWN: dict[str, Any] = {
    "zero": 0,
    "no": False,
    "none": None,
    "text": "",
    "list": [],
    "deep": {"a": [1, None]},
}


@pytest.mark.parametrize(
    ("record", "attributes"),
    [
        (ModelRecord, {"type": "t"}),
        (InstanceRecord, {"actionable": True}),
        (VModelRecord, {"amid": "a", "tmid": "b"}),
    ],
)
def test_what_is_not_understood_is_written_back_as_it_was(
    record: Record, attributes: dict[str, Any]
) -> None:
    value = {**attributes, **UNKNOWN}
    assert written(record.decode(json.dumps(value).encode())) == value


def test_unknown_attributes_inside_failures_are_kept_too() -> None:
    record = model(
        type="t",
        failedIn={"a": 1, "b": 2},
        fails={"a": {"msg": "x", "code": 0, "deep": {"y": [1]}}, "b": {"when": 5}, "c": None},
    )
    details = {"a": {"msg": "x", "code": 0, "deep": {"y": [1]}}, "b": {"when": 5}, "c": None}
    assert written(record)["fails"] == details
    assert written(record.with_copy(D, 9, 9))["fails"] == details
    assert [record.failure_text(i) for i in (A, B, C, D)] == ["x", "", "", ""]


@pytest.mark.parametrize("value", ["no", 5, ["x"], {"msg": 5}, {"msg": None}])
def test_a_failure_without_a_text_has_none(value: object) -> None:
    assert model(type="t", fails={"a": value}).failure_text(A) == ""


# --- what is corrupt ------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [ModelRecord, InstanceRecord, VModelRecord])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "not JSON: Input data was truncated"),
        (b"{", "not JSON: Input data was truncated"),
        (b"rubbish", "not JSON: JSON is malformed"),
        (b'{"a":1}{', "not JSON: JSON is malformed: trailing characters"),
        (b'{"a":"\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON: "),
        (b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (b"[]", "a JSON object expected, found an array"),
        (b"null", "a JSON object expected, found null"),
        (b"12", "a JSON object expected, found 12"),
        (b'"x"', "a JSON object expected, found a text"),
    ],
)
def test_not_even_an_object(record: Record, value: bytes, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        record.decode(value)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"type": 5}, "type: text expected, found 5"),
        ({"mPath": ["x"]}, "mPath: text expected, found an array"),
        ({"encKey": {"secret": "s"}}, "encKey: text expected, found an object"),
        ({"refs": "2"}, "refs: a whole number expected, found a text"),
        ({"refs": 1.5}, "refs: a whole number expected, found 1.5"),
        ({"refs": True}, "refs: a whole number expected, found true"),
        ({"lu": 2**63}, "lu: a whole number of 64 bits expected, found a larger one"),
        ({"lu": -(2**63) - 1}, "lu: a whole number of 64 bits expected, found a larger one"),
        ({"autoDel": 1}, "autoDel: true or false expected, found 1"),
        ({"instanceIds": ["a"]}, "instanceIds: an object expected, found an array"),
        ({"instanceIds": {"a": "b"}}, "instanceIds.a: a whole number expected, found a text"),
        ({"failedIn": {"a": {}}}, "failedIn.a: a whole number expected, found an object"),
        ({"fails": "x"}, "fails: an object expected, found a text"),
    ],
)
def test_a_wrong_type_in_a_model_is_named(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        model(**attributes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("record", "attributes", "message"),
    [
        (InstanceRecord, {"labels": "a,b"}, "labels: an array of texts expected"),
        (InstanceRecord, {"labels": ["a", 5]}, "labels: an array of texts expected"),
        (InstanceRecord, {"shutdown": "yes"}, "shutdown: true or false expected, found a text"),
        (InstanceRecord, {"addr": 8080}, "addr: text expected, found 8080"),
        (VModelRecord, {"amid": 5, "tmid": "m"}, "amid: text expected, found 5"),
        (VModelRecord, {"tmid": "m"}, "amid: missing"),
        (VModelRecord, {"amid": "m", "tmid": ""}, "tmid: missing"),
    ],
)
def test_a_wrong_type_elsewhere_is_named(
    record: Record, attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecordError) as caught:
        record.decode(json.dumps(attributes).encode())
    assert str(caught.value) == message


def test_a_key_is_never_shown() -> None:
    assert "secret" not in repr(model(encKey="secret"))
    with pytest.raises(RecordError) as caught:
        model(mPath={"encKey": "secret"})
    assert "secret" not in str(caught.value)


# --- changes --------------------------------------------------------------------------------------


def test_a_copy_replaces_the_failure_of_its_instance_only() -> None:
    before = model(
        type="t",
        instanceIds={"b": 1},
        failedIn={"a": 2, "c": 3},
        fails={"a": {"msg": "x"}, "c": {"msg": "y"}},
        lu=50,
    )
    after = before.with_copy(A, enqueued_ms=7, last_used_ms=40)
    assert after.copies == {A: 7, B: 1}
    assert after.failures == {C: 3}
    assert after.failure_details == {"c": {"msg": "y"}}
    assert after.last_used_ms == 50
    assert before.with_copy(A, 7, last_used_ms=60).last_used_ms == 60


def test_a_failure_replaces_the_copy_of_its_instance_only() -> None:
    before = model(type="t", instanceIds={"a": 1, "b": 2}, fails={"a": {"msg": "old"}})
    after = before.with_failure(A, failed_ms=9, message="new")
    assert after.copies == {B: 2}
    assert after.failures == {A: 9}
    assert after.failure_text(A) == "new"
    assert before.with_failure(A, 9, "").failure_details == {}


def test_the_time_of_an_unload_is_noted_while_more_than_two_copies_remain() -> None:
    record = model(type="t", instanceIds={"a": 1, "b": 2, "c": 3, "d": 4}, lu=5)
    record = record.without_copy(A, now_ms=100, last_used_ms=8)
    assert (record.last_unload_ms, record.last_used_ms) == (100, 8)
    record = record.without_copy(B, now_ms=101, last_used_ms=7)
    assert (record.last_unload_ms, record.last_used_ms) == (0, 8)


def test_last_use_is_only_raised() -> None:
    record = model(type="t", lu=5)
    assert record.used(4) is record
    assert record.used(5) is record
    assert record.used(6).last_used_ms == 6


def test_remaining_space_is_never_negative() -> None:
    assert InstanceRecord(capacity_units=5, used_units=3).remaining_units == 2
    assert InstanceRecord(capacity_units=5, used_units=6).remaining_units == 0


@pytest.mark.parametrize(("size_bytes", "units"), [(0, 0), (1, 1), (8192, 1), (8193, 2)])
def test_units_are_rounded_up(size_bytes: int, units: int) -> None:
    assert UNIT_BYTES == 8192
    assert units_of(size_bytes) == units


# --- round trips --------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
IDS = TEXTS.filter(bool)
INT64 = st.integers(-(2**63), 2**63 - 1)
TIMES = st.dictionaries(IDS.map(InstanceId), INT64, max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
# No attribute of any record begins with an underscore.
UNKNOWNS = st.dictionaries(TEXTS.map("_{}".format), JSON, max_size=4)
COPY_ENTRIES = JSON | st.fixed_dictionaries(
    {},
    optional={
        "ts": JSON,
        "state": st.sampled_from(["queued", "loading", "ready"]) | JSON,
        "since": JSON,
        "size": JSON,
        "more": JSON,
    },
)
MODELS = st.builds(
    ModelRecord,
    info=st.builds(ModelInfo, IDS, TEXTS, TEXTS),
    copies=TIMES,
    failures=TIMES,
    failure_details=st.dictionaries(TEXTS, JSON, max_size=3),
    copy_details=st.dictionaries(TEXTS, COPY_ENTRIES, max_size=3),
    references=INT64,
    auto_delete=st.booleans(),
    last_used_ms=st.integers(-(2**63), NEVER_MS - 1),
    last_unload_ms=INT64,
    unknown=UNKNOWNS,
)
INSTANCES = st.builds(
    InstanceRecord,
    start_time_ms=INT64,
    version=INT64,
    location=TEXTS,
    zone=TEXTS,
    labels=st.lists(TEXTS, max_size=3).map(tuple),
    lru_time_ms=INT64,
    count=INT64,
    capacity_units=INT64,
    used_units=INT64,
    loading_threads=INT64,
    loads_in_progress=INT64,
    busyness_rpm=INT64,
    shutting_down=st.booleans(),
    address=TEXTS,
    mm_version=TEXTS,
    unknown=UNKNOWNS,
)
VMODELS = st.builds(
    VModelRecord,
    active_model_id=IDS.map(ModelId),
    target_model_id=IDS.map(ModelId),
    owner=TEXTS,
    failed=st.booleans(),
    unknown=UNKNOWNS,
)


@settings(deadline=None)
@given(record=MODELS | INSTANCES | VMODELS)
def test_what_is_written_is_read_again(
    record: ModelRecord | InstanceRecord | VModelRecord,
) -> None:
    value = record.encode()
    assert type(record).decode(value) == record
    assert type(record).decode(value).encode() == value
    for name, found in written(record).items():
        assert name.startswith("_") or found, name


@settings(deadline=None)
@given(
    record=st.sampled_from([ModelRecord, InstanceRecord, VModelRecord]),
    value=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()),
)
def test_any_bytes_are_a_record_or_a_record_error(record: Record, value: bytes) -> None:
    try:
        decoded = record.decode(value)
    except RecordError:
        return
    assert record.decode(decoded.encode()) == decoded
