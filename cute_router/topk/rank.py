"""Selection by counting: an entry's place is the number of entries that rank before it.

    rank(i) = #{ j : key_j > key_i  or  (key_j = key_i and j < i) }

All entries are counted for at once, `parts` adjacent lanes to an entry, from keys in shared memory.
No step waits for the one before it, as in k rounds of "find the best and take it out": for a few
dozen entries this is several times faster.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

QUAD = 4  # keys of a 16-byte read of shared memory
FLIGHT = 16  # reads under way at once: more hold too many registers, and no longer hide anything


def parts_for(entries: int, threads: int) -> int:
    """Lanes to an entry: as many as the threads allow, up to 4."""
    return 4 if 4 * entries <= threads else 2 if 2 * entries <= threads else 1


@cute.jit
def rank(
    keys: cute.Tensor, index: Int32, mine: Uint32, part: Int32, parts: cutlass.Constexpr
) -> Int32:
    """The rank of entry `index`, whose key is `mine`, among `keys` in shared memory.

    The number of keys is a multiple of QUAD * parts. Every lane of a warp calls; lane part =
    0 .. parts - 1 of an entry's neighbours reads its share of the keys, and all get the result.
    """
    quads = cute.zipped_divide(keys, (QUAD,))  # (QUAD, n / QUAD)
    steps = cute.size(keys) // (QUAD * parts)
    own = index // QUAD
    rOwn = cute.make_rmem_tensor(QUAD, Uint32)
    rOwn.store(quads[(None, own)].load())

    counts = [Int32(0) for _ in range(QUAD)]  # independent, for a short chain of dependent steps
    for first in cutlass.range_constexpr(0, steps, FLIGHT):
        reads = min(FLIGHT, steps - first)
        rKeys = cute.make_rmem_tensor((QUAD, reads), Uint32)
        for i in cutlass.range_constexpr(reads):
            rKeys[(None, i)].store(quads[(None, (first + i) * parts + part)].load())
        for i in cutlass.range_constexpr(reads):
            # Earlier quads win a tie; the entry's own, compared strictly here, follows below.
            ahead = (first + i) * parts + part < own
            beats = cutlass.select_(ahead, mine, mine + Uint32(1))
            for j in cutlass.range_constexpr(QUAD):
                counts[j] = count_if_at_least(rKeys[j, i], beats, counts[j])
    place = (counts[0] + counts[1]) + (counts[2] + counts[3])
    for offset in cutlass.range_constexpr(parts.bit_length() - 1):
        place = place + cute.arch.shuffle_sync_bfly(place, offset=1 << offset)
    for i in cutlass.range_constexpr(QUAD - 1):
        tie = rOwn[i] == mine and own * QUAD + i < index
        place = cutlass.select_(tie, place + 1, place)
    return place


@cute.jit
def count_if_at_least(value: Uint32, bound: Uint32, count: Int32) -> Int32:
    """count + 1 where value >= bound: a comparison and a predicated add, no more."""
    return cute.arch.inline_ptx(
        "{\n\t.reg .pred p;\n\tsetp.ge.u32 p, {$r0}, {$r1};\n\t"
        "mov.b32 {$w0}, {$r2};\n\t@p add.s32 {$w0}, {$w0}, 1;\n\t}",
        write_only_types=[Int32],
        read_only_args=[value, bound, count],
    )
