"""One thread's worth of wire; ``mm.wire.Wire`` is its one user."""

from collections.abc import Iterable
from typing import Any

from mm.wire import Measures, WireSettings
from mm.wire.addresses import Target

class Worker:
    """Methods may be called from any thread but the one that is in ``run``."""

    def __init__(self, notice_fd: int, measures: Measures | None) -> None: ...
    def run(self) -> None:
        """Serve until ``stop``; the GIL is not held."""

    def configure(self, told: WireSettings) -> None:
        """Go by these settings from now on."""

    def listen(self, fd: int, role: int) -> None:
        """Accept connections on a listening socket, which stays the caller's."""

    def set_tier2(self, fd: int, role: int, own: bool) -> None:
        """Take over a connected socket that leads to tier 2."""

    def set_runtime(self, told: Target) -> None:
        """Say where the runtime is."""

    def set_peers(self, told: Iterable[Target]) -> None:
        """Say which instances can be called, and where: all of them."""

    def drain(self) -> None:
        """Accept no more, say GOAWAY, and let what runs finish."""

    def end_calls(self) -> None:
        """Answer the calls that are under way here that we stop."""

    def stop(self) -> None:
        """Let ``run`` return at the end of its turn."""

    def take_missing(self) -> list[tuple[int, bool]]:
        """Answer the tier 2 connections that are gone, as (role, own)."""

    def take_reports(self) -> list[tuple[bytes, bytes, int, int, int, int]]:
        """Answer (sender, model id, calls, answers, told or -1, service ns) of peers that called
        since the last time.
        """

    def counts(self) -> list[int]:
        """Answer the counters, in the order of ``WireStatistics``."""

    def calls(self) -> list[tuple[Any, ...]]:
        """Answer (path, status, model id, vmodel id), then each of the series as two lists: how
        many values fell into each bucket, and what they came to.
        """

    def peer_traffic(self, handles: list[int]) -> list[tuple[int, int]]:
        """Answer, for each handle, the calls under way there and the answers since the start."""
