"""One model in the plain-Python twin of the table (the struct ``slot_t`` of ``_lru.pxd``)."""

from __future__ import annotations

from mm._lru_words import CopyState


class Slot:
    """What is known of one model."""

    __slots__ = (
        "alias_count",
        "cached",
        "calls",
        "concurrency_max",
        "discarded",
        "flags",
        "in_flight",
        "kept",
        "last_used_ms",
        "model_id",
        "peers",
        "sequence",
        "state",
        "weight_units",
    )

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.state = CopyState.ABSENT
        self.in_flight = 0
        self.calls = 0
        self.concurrency_max = 0
        self.flags = 0
        self.cached = False
        self.kept = False
        self.weight_units = 0
        self.last_used_ms = 0
        self.sequence = 0
        self.peers: dict[int, int] = {}  # handle -> calls in flight, as that copy itself last told
        self.alias_count = 0
        self.discarded = False

    @property
    def order(self) -> tuple[bool, int, int]:
        """Its place: by the time given; of equal times the copy put first goes first. Those kept
        come last, in the order in which that was said.
        """
        return self.kept, 0 if self.kept else self.last_used_ms, self.sequence

    @property
    def free(self) -> bool:
        return (
            not self.cached
            and self.state is CopyState.ABSENT
            and self.in_flight == 0
            and self.alias_count == 0
        )
