"""The greatest values of a few lanes of a warp, sorted: a bitonic network across the lanes.

Value i of the network is in slot i // lanes of lane i % lanes. Blocks of W values are sorted by
mirrored merges, as in `topk.bitonic`: value i of one half meets value i from the end of the other,
and the greater one always goes to the front. Then the blocks fold onto each other: what is greater
in one of two mirrored places is among the W greatest of both blocks, and a merge sorts it.

Values are Python lists over the slots, worked on while the kernel is traced.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from cute_router.topk.network import Order


class WarpSort:
    """The network for the `width` greatest values of each group of `lanes`; powers of two."""

    def __init__(self, lanes: int, width: int, order: Order):
        self.lanes = lanes
        self.width = width
        self.greater, self.less = order

    def greatest(self, values: list[Any], lane: Int32) -> list[Any]:
        """Of 2^n slots on each lane the greatest values, the best first; others follow.

        Every lane of the warp calls; `lane` counts within the group.
        """
        front = {1 << bit: (lane & (1 << bit)) == 0 for bit in range(self.lanes.bit_length() - 1)}
        for log in range(1, self.width.bit_length()):
            values = self.meet(values, (1 << log) - 1, front)
            values = self.merge(values, 1 << (log - 1), front)
        size = 2 * self.width
        while size <= len(values) * self.lanes:
            values = self.fold(values, size - 1)
            values = self.merge(values, self.width, front)
            if size <= self.lanes:  # else the mirrored half is gone
                size *= 2
        return values

    def merge(self, values: list[Any], size: int, front: dict[int, Boolean]) -> list[Any]:
        """Sort all `size` neighbouring values, which rise and then fall, or the other way round."""
        apart = size // 2
        while apart:
            values = self.meet(values, apart, front)
            apart //= 2
        return values

    def meet(self, values: list[Any], mask: int, front: dict[int, Boolean]) -> list[Any]:
        """Value i meets value i ^ mask: the greater one goes to the front."""
        slots, across = divmod(mask, self.lanes)
        met = []
        for s, ours in enumerate(values):
            theirs = other_lanes(values[s ^ slots], across)
            if slots:
                keep = self.greater if s < s ^ slots else self.less
                met.append(keep(ours, theirs))
            else:
                ahead = front[1 << (across.bit_length() - 1)]
                both = self.greater(ours, theirs), self.less(ours, theirs)
                met.append(type(ours)(cutlass.select_(ahead, *both)))
        return met

    def fold(self, values: list[Any], mask: int) -> list[Any]:
        """The greater one of values i and i ^ mask: in both places, or in the front slot only."""
        slots, across = divmod(mask, self.lanes)
        return [
            self.greater(ours, other_lanes(values[s ^ slots], across))
            for s, ours in enumerate(values)
            if s <= s ^ slots
        ]


def other_lanes(value: Any, mask: int) -> Any:
    """The value of the lane whose number differs in the bits of `mask`."""
    return cute.arch.shuffle_sync_bfly(value, offset=mask) if mask else value
