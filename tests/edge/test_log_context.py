"""Headers in the lines of a call (around 18), and in no others."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mm.cli.logs import LINE, TIME, JsonFormatter, LineFormatter
from mm.edge.h2.incoming import IncomingCall
from mm.edge.log_context import VALUE_LENGTH_MAX, HeaderLogging, log_fields

pytestmark = pytest.mark.anyio

NAMES = (("a-header", "ah"), ("u-header-bin", "uh"), ("absent", "no"))
HEADERS = [(b"u-header-bin", b"w6Q"), (b"other", b"1"), (b"a-header", b"0"), (b"a-header", b"1")]
logger = logging.getLogger("mm.test")


class Lines(logging.Handler):
    """What is logged, in both forms."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.objects: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(LineFormatter(LINE, TIME).format(record).partition(": ")[2])
        self.objects.append(json.loads(JsonFormatter().format(record)))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def _call(*headers: tuple[bytes, bytes]) -> IncomingCall:
    return cast(IncomingCall, SimpleNamespace(headers=list(headers)))


async def test_lines_of_a_call_have_the_headers_that_are_there(lines: Lines) -> None:
    async def handler(_incoming: IncomingCall) -> None:
        logger.info("said")

    await HeaderLogging(NAMES, handler)(_call(*HEADERS))
    logger.info("afterwards")
    assert lines.texts == ["said {ah=1, uh=ä}", "afterwards"]
    assert [each["contextMap"] for each in lines.objects] == [{"ah": "1", "uh": "ä"}, {}]


async def test_calls_beside_each_other_have_their_own(lines: Lines) -> None:
    both_there = asyncio.Barrier(2)

    async def handler(incoming: IncomingCall) -> None:
        await both_there.wait()
        logger.info("%s", incoming.headers[0][1].decode())

    serve = HeaderLogging(NAMES, handler)
    await asyncio.gather(*(serve(_call((b"a-header", value))) for value in (b"1", b"2")))
    assert sorted(lines.texts) == ["1 {ah=1}", "2 {ah=2}"]


async def test_what_goes_on_after_a_call_is_not_the_calls(lines: Lines) -> None:
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()

    async def load() -> None:
        logger.info("begun")
        has_begun.set()
        await may_go_on.wait()
        logger.info("done")

    tasks = []

    async def handler(_incoming: IncomingCall) -> None:
        tasks.append(asyncio.create_task(load()))
        await has_begun.wait()

    await HeaderLogging(NAMES, handler)(_call((b"a-header", b"1")))
    may_go_on.set()
    await tasks[0]
    assert lines.texts == ["begun {ah=1}", "done"]


async def test_clients_write_no_lines_of_their_own(lines: Lines) -> None:
    async def handler(_incoming: IncomingCall) -> None:
        logger.info("said")
        assert len(log_fields()["ah"]) == VALUE_LENGTH_MAX

    forged = b"eA==,DQpBTiBFUlJPUiB9"  # "\r\nAN ERROR }"
    long = b"x" * 10_000
    await HeaderLogging(NAMES, handler)(_call((b"a-header", long), (b"u-header-bin", forged)))
    [text] = lines.texts
    assert text.endswith("x, uh=\\r\\nAN ERROR }}")
    assert "\n" not in text


async def test_what_is_no_base64_is_shown_as_it_is(lines: Lines) -> None:
    async def handler(_incoming: IncomingCall) -> None:
        logger.info("said")

    await HeaderLogging(NAMES, handler)(_call((b"u-header-bin", b"%%")))
    assert lines.texts == ["said {uh=%%}"]
