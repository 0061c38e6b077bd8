"""How the expert tiles of a token meet: packets in global memory that carry their own flags.

An expert tile is one cluster; a token's last decision needs all of them. Clusters cannot see each
other's shared memory, so they meet in a scratch buffer that is all EMPTY between launches. Senders
write packets of words that are never EMPTY; the receiver reads a packet until no word of it is,
then writes EMPTY back. A word is its own flag: no fence, no counter, no second round trip.

Who receives is drawn, not fixed: for each owner CTA the tiles draw tickets when they start, and the
tile with the last ticket receives. So everyone it waits for is already running, and it cannot hang,
whatever order the hardware starts clusters in. The draw precedes the trigger of the dependent
launch; hence tickets of consecutive launches, which share a buffer, never mix.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_router.arch import MAX_CLUSTER
from cute_router.gemm.config import TICKETS
from cute_router.gemm.ptx import EMPTY, draw, load_quad, store_quad

PACKET = 4  # words


@cute.jit
def draw_ticket(mScratch: cute.Tensor, tile_n: Int32, rank: Int32, tiles: cutlass.Constexpr):
    """This tile's place, from 0, in the order in which the owner's `tiles` expert tiles started."""
    return draw(mScratch.iterator + (tile_n * MAX_CLUSTER + rank), tiles - 1)


@cute.jit
def packet(mScratch: cute.Tensor, index: Int32) -> cute.Pointer:
    """The address of packet `index`."""
    offset = cute.assume(TICKETS + index * PACKET, divby=PACKET)
    return (mScratch.iterator + offset).align(4 * PACKET)


@cute.jit
def word(value: Float32) -> Int32:
    """A float as a word of a packet: its bits, but one NaN for all, since some are EMPTY."""
    return Int32(cutlass.select_(value == value, value.bitcast(Int32), Int32(0x7FC00000)))


@cute.jit
def send(slot: cute.Pointer, a: Int32, b: Int32, c: Int32, d: Int32) -> None:
    """Fill a packet; no word may be EMPTY."""
    store_quad(slot, a, b, c, d)


@cute.jit
def receive(slot: cute.Pointer, words: cute.Tensor) -> None:
    """Wait for a packet, take its words and leave it EMPTY for the next launch."""
    words[0], words[1], words[2], words[3] = load_quad(slot)
    while words[0] == EMPTY or words[1] == EMPTY or words[2] == EMPTY or words[3] == EMPTY:
        words[0], words[1], words[2], words[3] = load_quad(slot)
    store_quad(slot, Int32(EMPTY), Int32(EMPTY), Int32(EMPTY), Int32(EMPTY))
