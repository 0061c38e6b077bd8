"""Selection by counting: an entry's place is the number of entries that rank before it.

    rank(i) = #{ j : key_j > key_i  or  (key_j = key_i and j < i) }

Each thread counts for one entry, all threads at once, from keys in shared memory that every lane
reads at the same address (a broadcast). No step waits for the one before it, as in k rounds of
"find the best and take it out": for a few dozen entries this is several times faster.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

QUAD = 4  # keys per 16-byte read of shared memory


@cute.jit
def rank(keys: cute.Tensor, index: Int32, mine: Uint32) -> Int32:
    """The rank of entry `index`, whose key is `mine`, among `keys` (smem, a multiple of 4)."""
    quads = cute.zipped_divide(keys, (QUAD,))  # (QUAD, n / QUAD)
    own = index // QUAD
    place = Int32(0)
    for q in cutlass.range_constexpr(cute.size(keys) // QUAD):
        beats = cutlass.select_(own > q, mine, mine + Uint32(1))  # earlier ones win a tie
        rK = quads[(None, q)].load()
        for i in cutlass.range_constexpr(QUAD):
            place = cutlass.select_(rK[i] >= beats, place + 1, place)
    # The entry's own quad was compared strictly: add the ties that stand before it there.
    rK = quads[(None, own)].load()
    for i in cutlass.range_constexpr(QUAD - 1):
        ahead = (rK[i] == mine) and (own * QUAD + i < index)
        place = cutlass.select_(ahead, place + 1, place)
    return place
