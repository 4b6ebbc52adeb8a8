"""What makes way for a copy that a policy asks for, and what does not (issue 5 part 1).

Owns that question for the copies of one instance. Which copies policies ask for is ``policies``',
what is kept from eviction altogether ``pins``'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mm.core.ids import ModelId
from mm.core.weights import fits
from mm.mesh.local_copy import LocalCopy
from mm.table import Table


class Promises:
    """Copies that policies ask for do not displace each other, unless somebody waits for one."""

    def __init__(self, table: Table, copies: Mapping[ModelId, LocalCopy]) -> None:
        self._table = table
        self._copies = copies
        #: Whether a policy asks for copies of a model.
        self.is_promised: Callable[[ModelId], bool] = lambda _: False
        #: Whether so much may be kept here in all.
        self.may_keep: Callable[[int], bool] = lambda _: True

    def would_break(self, copy: LocalCopy, more_units: int) -> bool:
        """Answer whether so much more for a copy that a policy asks for would take the place of
        others that policies ask for, or that are on their way.
        """
        return self._is_for_promise(copy) and not self._do_others_suffice(more_units)

    def spared(self, copy: LocalCopy, more_units: int) -> list[ModelId]:
        """Answer what does not make way for so much more of a copy, in its turn or not: it goes
        itself instead; one that nothing evicts does not, and takes others' place where it must.
        """
        if more_units <= 0 or not self._is_for_promise(copy):
            return []
        if copy.is_kept and not self._do_others_suffice(more_units):
            return []
        return [
            each.model_id
            for each in self._copies.values()
            if each is not copy and self._may_go(each) and self.is_promised(each.model_id)
        ]

    def _is_for_promise(self, copy: LocalCopy) -> bool:
        return not copy.is_awaited and self.is_promised(copy.model_id)

    def _do_others_suffice(self, more_units: int) -> bool:
        """Answer whether so much more fits without all that serves and no policy asks for."""
        needed_units = self._table.used_units + more_units
        if fits(needed_units, self._table.capacity_units):
            return True
        others_units = sum(
            each.weight_units
            for each in self._copies.values()
            if self._may_go(each) and not self.is_promised(each.model_id)
        )
        return fits(needed_units - others_units, self._table.capacity_units)

    def _may_go(self, copy: LocalCopy) -> bool:
        return copy.serves and not copy.is_kept
