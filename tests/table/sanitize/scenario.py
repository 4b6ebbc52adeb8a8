"""What ``run.py`` starts under a sanitizer: one run against the instrumented table."""

from __future__ import annotations

import sys
import threading

import mm_test_hammer  # type: ignore[import-not-found]  # built beside the instrumented table

from tests.table.hammering import hammer

FAULTS = ("wrong_id", "unloaded_while_pinned", "wrong_choice")


def race() -> None:
    """Let two threads write one word without order."""
    threads = [threading.Thread(target=mm_test_hammer.race) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


def main() -> int:
    """Answer 0, or 1 if a reader saw what is not so; a sanitizer's own finding exits otherwise."""
    what, steps = sys.argv[1], int(sys.argv[2])
    if what == "race":
        race()
        return 0
    if what == "overrun":
        mm_test_hammer.overrun()
        return 0
    reports = hammer(mm_test_hammer, seed=steps, reader_count=2, steps=steps)
    print({key: sum(each[key] for each in reports) for key in reports[0]})
    return 1 if any(each[key] for each in reports for key in FAULTS) else 0


if __name__ == "__main__":
    sys.exit(main())
