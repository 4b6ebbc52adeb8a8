"""What the policies are told: how large each model is, how long it loads, and how much fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    """The models, by number, and the room for them."""

    sizes: Sequence[int]
    load_s: Sequence[float]
    capacity: int


@dataclass(frozen=True, slots=True)
class Stream:
    """Calls one after the other, each naming a model; the n-th comes at time n."""

    name: str
    world: World
    calls: Sequence[int]


class Policy(ABC):
    """A cache that decides by itself what to keep. Every model fits when it is alone."""

    name = ""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sizes = world.sizes
        self.load_s = world.load_s
        self.capacity = world.capacity
        self.used = 0

    @abstractmethod
    def use(self, model: int, now: int) -> bool:
        """Serve a call; answers whether the model was loaded. It is afterwards, unless refused."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What the calls of a stream cost under one policy, from the end of its warm-up on."""

    misses: int
    size: int
    load_s: float
