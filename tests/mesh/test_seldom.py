"""What may happen to thousands of models at once is told aloud a few times a minute."""

from __future__ import annotations

import logging

from mm.mesh.seldom import Seldom

LOUD, QUIET = logging.WARNING, logging.DEBUG


def test_the_first_is_loud_and_the_next_once_the_time_is_over() -> None:
    seldom = Seldom(60.0)
    assert [seldom.level(s) for s in (5.0, 5.0, 64.9, 65.0, 66.0)] == [
        LOUD,
        QUIET,
        QUIET,
        LOUD,
        QUIET,
    ]


def test_several_are_loud_where_each_tells_something_new() -> None:
    seldom = Seldom(60.0, loud_max=3)
    assert [seldom.level(0.0) for _ in range(5)] == [LOUD] * 3 + [QUIET] * 2
    assert [seldom.level(60.0) for _ in range(4)] == [LOUD] * 3 + [QUIET]
