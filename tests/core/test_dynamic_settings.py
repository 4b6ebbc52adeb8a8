"""The values that keys under ``config/`` may have."""

from __future__ import annotations

import pytest

from mm.core.dynamic_settings import (
    DISABLE,
    LOG_EACH,
    LOG_LEVEL,
    RPM_THRESHOLD,
    SettingError,
    read_setting,
)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        (RPM_THRESHOLD, b"10", 10),
        (RPM_THRESHOLD, b" 2000\n", 2000),
        (RPM_THRESHOLD, b"2147483647", 2**31 - 1),
        (LOG_EACH, b"true", True),
        (LOG_EACH, b"False", False),
        (LOG_LEVEL, b"WARN", "WARNING"),
        (LOG_LEVEL, b"debug", "DEBUG"),
        (LOG_LEVEL, b"OFF", "CRITICAL"),
        (DISABLE, b"false", False),
        (DISABLE, b"", True),
        (DISABLE, b"yes", True),
        ("send_destination_id", b"true", None),
        ("something", b"\xff", None),
    ],
)
def test_what_is_read(name: str, value: bytes, read: object) -> None:
    assert read_setting(name, value) == read
    assert type(read_setting(name, value)) is type(read)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (RPM_THRESHOLD, b"9", "scaleup_rpm_threshold is '9'; allowed: a number of calls a minute"),
        (RPM_THRESHOLD, b"2147483648", "from 10 to 2147483647"),
        (RPM_THRESHOLD, b"9" * 5000, "allowed"),
        (RPM_THRESHOLD, b"-20", "allowed"),
        (RPM_THRESHOLD, b"1e3", "allowed"),
        (RPM_THRESHOLD, "\u0661\u0660".encode(), "allowed"),
        (RPM_THRESHOLD, b"", "allowed"),
        (RPM_THRESHOLD, b"\xff\n", r"'\\ufffd\\n'; allowed: a text"),
        (LOG_EACH, b"1", "log_each_invocation is '1'; allowed: true or false"),
        (LOG_LEVEL, b"loud", "one of debug, info, warn and error"),
    ],
)
def test_what_is_wrong_is_named(name: str, value: bytes, told: str) -> None:
    with pytest.raises(SettingError, match=told) as caught:
        read_setting(name, value)
    assert len(str(caught.value)) < 300
