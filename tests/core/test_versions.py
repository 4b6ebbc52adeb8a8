"""Which version texts become which numbers (spec core 1.5)."""

from __future__ import annotations

import pytest

import mm
from mm.core.versions import RELEASE_DAYS, RELEASE_NUMBER, version_number

DAY_MS = 86_400_000
#: The first of January 2024, GMT.
BEGAN_MS = 1_704_067_200_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v0.12.0-20240101-3", BEGAN_MS + 3),
        ("main-20240102-0", BEGAN_MS + DAY_MS),
        ("a-b-20240101-12", BEGAN_MS + 12),
        ("20240101-0130", BEGAN_MS + 90 * 60_000),
        ("20240101-0130-2", BEGAN_MS + 90 * 60_000 + 2),
        # As the older form, not as a build number of the newer one.
        ("20240101-0000-20240102-1", BEGAN_MS + DAY_MS + 1),
        ("20240101-2460", None),
        ("x-20240230-1", None),
        ("20240101", None),
        ("-20240101-1", None),
        ("x-20240101", None),
        ("x-20240101-", None),
        ("x-20240101-1 ", None),
        ("x-\uff12\uff10\uff12\uff140101-1", None),
        ("1.2.3", None),
        ("", None),
    ],
)
def test_the_number_of_a_version(text: str, expected: int | None) -> None:
    assert version_number(text) == expected


def test_a_later_release_is_of_a_later_day() -> None:
    """Else nobody would load at the newer one (``docs/operating.md``, upgrading)."""
    in_order = sorted(RELEASE_DAYS, key=lambda text: [int(part) for part in text.split(".")])
    numbers = [version_number(f"mm-{RELEASE_DAYS[each]}-0") or 0 for each in in_order]
    assert 0 not in numbers, "no such day"
    assert numbers == sorted(set(numbers))
    assert in_order[-1] == mm.__version__
    assert numbers[-1] == RELEASE_NUMBER


def test_a_later_build_has_the_larger_number() -> None:
    texts = ["x-20231231-99", "x-20240101-0", "20240101-0001", "y-20240102-0", "y-20240102-1"]
    numbers = [version_number(text) or 0 for text in texts]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == len(numbers)
