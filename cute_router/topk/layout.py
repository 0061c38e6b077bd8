"""How the entries of a row lie on a few lanes of a warp."""

from cutlass import Int32

from cute_router.topk.config import BLOCK


class Layout:
    """A row of `length` entries on `lanes` lanes, a power of two.

    run:    neighbouring entries of a lane, a power of two up to 8; other lanes have the next ones.
    blocks: of 8 entries, of each lane; the last one may have fewer.
    """

    def __init__(self, length: int, lanes: int, run: int, blocks: int):
        self.length = length
        self.lanes = lanes
        self.run = run
        self.blocks = blocks
        self.room = blocks * BLOCK * lanes  # entries, those that pad the row included
        self.entries = sum(self.live(block) for block in range(blocks))  # of a lane

    def first(self, block: int, part: int, lane: Int32) -> Int32:
        """The first entry of a run: one of the BLOCK / run parts of a lane's block."""
        return lane * self.run + self.offset(block, part * self.run)

    def offset(self, block: int, i: int) -> int:
        """Where a block's entry i is, but for the lane."""
        part, rest = divmod(block * BLOCK + i, self.run)
        return part * self.run * self.lanes + rest

    def live(self, block: int) -> int:
        """Entries of a lane's block: whole runs, up to the last that any lane has."""
        starts = range(0, BLOCK, self.run)
        return sum(self.run for i in starts if self.offset(block, i) < self.length)

    def whole(self, block: int) -> bool:
        """Whether the row has every lane's entries of this block."""
        return (block + 1) * BLOCK * self.lanes <= self.length
