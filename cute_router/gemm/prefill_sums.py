"""What the chains of WGMMAs of a tile add up to, in a thread's registers.

Tensor cores drop low bits of every partial sum, so a chain must end before they count. Then

    WholeSums    sum += chain, and the next one starts at 0; as many registers as accumulators
    SplitSums    sum = upper + rest: the upper halves of the words are put aside, two to a register,
                 and the next chain goes on from the rest, which is small; half as many registers

Either way the error is that of one chain, and a rounding to fp32 for each.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from cute_router.topk.ptx import opaque

UPPER_HALF = 0xFFFF0000
LEAST = -3.4028234663852886e38  # finite number
PART = 16  # pairs that are split at a time: there are no registers to have all of them under way


class WholeSums:
    """Sums in registers of their own."""

    def begin(self, rAcc: cute.Tensor) -> cute.Tensor:
        """What is kept beside the accumulators, before the first chain."""
        rSums = cute.make_rmem_tensor_like(rAcc)
        rSums.fill(0.0)
        return rSums

    def zero_at(self, start: Int32) -> Int32:
        """The K block that adds to nothing, in or before a chain from `start` on."""
        return start

    def add(self, rAcc: cute.Tensor, rSums: cute.Tensor, last: Boolean) -> None:
        """Add a chain."""
        rSums.store(rSums.load() + rAcc.load())

    def total(self, rAcc: cute.Tensor, rSums: cute.Tensor) -> cute.Tensor:
        """The sums, behind the last chain."""
        return rSums


class SplitSums:
    """Sums of which the accumulators hold the rest."""

    def begin(self, rAcc: cute.Tensor) -> cute.Tensor:
        """What is kept beside the accumulators, before the first chain."""
        rUpper = cute.make_rmem_tensor(cute.size(rAcc) // 2, Uint32)
        rUpper.fill(0)
        return rUpper

    def zero_at(self, start: Int32) -> Int32:
        """The K block that adds to nothing, in or before a chain from `start` on."""
        return Int32(0)

    @cute.jit
    def add(self, rAcc: cute.Tensor, rUpper: cute.Tensor, last: Boolean) -> None:
        """Add a chain; split the sums, but for the last ones."""
        for i in cutlass.range_constexpr(cute.size(rUpper)):
            rAcc[2 * i] = rAcc[2 * i] + (rUpper[i] & Uint32(UPPER_HALF)).bitcast(Float32)
            rAcc[2 * i + 1] = rAcc[2 * i + 1] + (rUpper[i] << 16).bitcast(Float32)
        size = cute.size(rUpper)
        for first in cutlass.range_constexpr(0, size, PART):
            if opaque(Int32(last)) == 0:
                self.split(rAcc, rUpper, range(first, min(first + PART, size)))

    def split(self, rAcc: cute.Tensor, rUpper: cute.Tensor, pairs: range) -> None:
        """Leave the rest of some sums. Of an infinite one any finite rest will do."""
        for i in pairs:
            halves = []
            for j in (2 * i, 2 * i + 1):
                upper = rAcc[j].bitcast(Uint32) & Uint32(UPPER_HALF)
                rest = rAcc[j] - upper.bitcast(Float32)  # exact, or NaN
                rAcc[j] = cute.arch.fmax(rest, Float32(LEAST))
                halves.append(upper)
            rUpper[i] = halves[0] | (halves[1] >> 16)

    def total(self, rAcc: cute.Tensor, rUpper: cute.Tensor) -> cute.Tensor:
        """The sums, behind the last chain."""
        return rAcc
