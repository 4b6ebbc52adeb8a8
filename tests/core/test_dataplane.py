"""The data-plane configuration by itself; as a setting: ``tests/test_config.py``."""

from __future__ import annotations

import pytest

from mm.core.dataplane import parse_dataplane_config


@pytest.mark.parametrize(
    ("rpc", "remark"),
    [
        ('{"vModelId": true}', "vModelId means nothing without an idExtractionPath"),
        (
            '{"vModelId": true, "idExtractionPath": []}',
            "vModelId means nothing without an idExtractionPath",
        ),
        ('{"idExtractionPath": []}', "idExtractionPath is empty, so ids come from headers"),
    ],
)
def test_what_is_hardly_meant(rpc: str, remark: str) -> None:
    """The Java mesh takes it, so it is no error."""
    found = parse_dataplane_config(f'{{"rpcConfigs": {{"a.B/C": {rpc}, "a.B/D": {{}}}}}}')
    assert found.remarks == (f'"a.B/C": {remark}',)
    rpc_config = found.rpc("/a.B/C")
    assert rpc_config is not None
    assert rpc_config.id_extraction_path == ()


def test_an_empty_object_denies_everything() -> None:
    assert parse_dataplane_config("{}").rpc("/a.B/C") is None
