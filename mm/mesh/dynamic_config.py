"""Follows the settings in the store that override those of the environment (around 3.7).

Owns what holds at the moment, and telling those who asked. What the values mean to them is theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from mm.core.dynamic_settings import DISABLE, MEANINGLESS, SettingError, Value, read_setting
from mm.errors import StartupError
from mm.mesh.mirror import Mirror
from mm.mesh.ports import Item, Store

logger = logging.getLogger(__name__)

#: Keys that mean nothing and are told of; whoever writes more of them has other plans.
UNKNOWN_TOLD_MAX: Final = 100

#: Told the value, None when the key is gone or wrong: what the environment says holds again.
Follower = Callable[[Value | None], None]


class DynamicConfig:
    """The good values. One that is wrong is named in the log, and counts as none: with what was
    good before, those who start later would go by another value than those who run.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self.mirror = Mirror(store, prefix, self._changed)
        self.run = self.mirror.run
        self._values: dict[str, Value] = {}
        self._followers: dict[str, list[Follower]] = {}
        self._unknown: set[str] = set()

    def follow(self, name: str, follower: Follower) -> None:
        """Tell ``follower`` the value, now and at every change; it must not block or raise."""
        self._followers.setdefault(name, []).append(follower)
        if name in self._values:
            follower(self._values[name])

    def get(self, name: str) -> Value | None:
        """Answer what the store says, None if nothing."""
        return self._values.get(name)

    def require_enabled(self) -> None:
        """Raise ``StartupError`` if instances are not to start."""
        if self.get(DISABLE):
            key = self.mirror.key(DISABLE)
            raise StartupError(
                f"the store forbids instances to start: delete the key {key}, or set it to false"
            )

    def _changed(self, name: str, item: Item | None) -> None:
        if item is None:
            if name in self._values:
                logger.info("config key %s is gone: the environment's value holds", name)
            self._forget(name)
            return
        try:
            value = read_setting(name, item.value)
        except SettingError as exc:
            logger.warning("config key %s: the environment's value holds", exc)
            self._forget(name)
            return
        if value is None:
            if name not in self._unknown and len(self._unknown) < UNKNOWN_TOLD_MAX:
                self._unknown.add(name)
                level = logging.DEBUG if name in MEANINGLESS else logging.WARNING
                logger.log(level, "config key %s means nothing to this version", ascii(name))
        elif self._values.get(name) != value:
            self._values[name] = value
            logger.info("config key %s is %s from now on", name, value)
            self._tell(name, value)

    def _forget(self, name: str) -> None:
        if self._values.pop(name, None) is not None:
            self._tell(name, None)

    def _tell(self, name: str, value: Value | None) -> None:
        for follower in self._followers.get(name, ()):
            follower(value)
