"""Fixtures of the command tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.fake_mesh import FakeMesh, fake_mesh


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    with fake_mesh() as fake:
        yield fake
