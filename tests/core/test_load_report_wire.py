"""The hand-written codec of load reports, against the general one."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.core.ids import InstanceId, ModelId
from mm.core.load_report_wire import MalformedReportError, decode_report, encode_report
from mm.pb.mm.peer import CopyLoad, Identity, LoadReport

_names = st.text(max_size=200).filter(lambda name: name.isprintable())
_loads = st.dictionaries(_names.map(ModelId), st.integers(0, 2**32 - 1), max_size=5)


@settings(deadline=None)  # the general codec compiles itself at its first use
@given(_names.map(InstanceId), _loads)
def test_both_codecs_understand_each_other(
    instance_id: InstanceId, loads: dict[ModelId, int]
) -> None:
    copies = [CopyLoad(model_id=name, calls_in_flight=count) for name, count in loads.items()]
    general = LoadReport(instance_id=instance_id, copies=copies)
    assert LoadReport.parse(encode_report(instance_id, loads)) == general
    assert decode_report(bytes(general)) == (instance_id, loads)


def test_fields_of_newer_versions_are_passed_over() -> None:
    newer = b"\x1d\x00\x00\x00\x00" + b"\x21" + bytes(8) + b"\x28\xff\x01" + b"\x32\x02hi"
    report = encode_report(InstanceId("i"), {ModelId("m"): 3})
    assert decode_report(newer + report + newer) == ("i", {"m": 3})
    assert decode_report(bytes(Identity(start_time_ms=2**63))) == ("", {})
    assert decode_report(b"") == ("", {})


@given(st.binary(max_size=60))
def test_any_bytes_are_a_report_or_an_error(message: bytes) -> None:
    with contextlib.suppress(MalformedReportError):
        decode_report(message)


@pytest.mark.parametrize(
    "message",
    [b"\x0a", b"\x0a\x05abc", b"\x0a\x01\xff", b"\x0b", b"\x80" * 20, b"\x12\x02\x0a\x09"],
)
def test_what_is_cut_off_or_no_protobuf_is_refused(message: bytes) -> None:
    with pytest.raises(MalformedReportError):
        decode_report(message)
