"""A lane's block of a row: 8 neighbouring entries, read at once where their alignment allows it."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

BLOCK = 8
VECTOR_BITS = 128


@cute.jit
def read_block(
    gRow: cute.Tensor, start: Int32, whole: cutlass.Constexpr, vector: cutlass.Constexpr
) -> cute.Tensor:
    """Entries `start` to `start + 7` of a row; some others for those that it does not have.

    whole:  the block surely ends within the row.
    vector: the row is whole blocks, and starts at a multiple of 16 bytes.
    """
    length = cute.size(gRow)
    rBlock = cute.make_rmem_tensor(BLOCK, gRow.element_type)
    if cutlass.const_expr(vector):
        if cutlass.const_expr(not whole):
            start = cutlass.select_(start < length, start, Int32(0))
        part = VECTOR_BITS // gRow.element_type.width
        for i in cutlass.range_constexpr(BLOCK // part):
            source = (gRow.iterator + start + i * part).align(VECTOR_BITS // 8)
            gPart = cute.make_tensor(source, cute.make_layout(part))
            rPart = cute.make_tensor(rBlock.iterator + i * part, cute.make_layout(part))
            rPart.store(gPart.load())
    else:
        for i in cutlass.range_constexpr(BLOCK):
            rBlock[i] = gRow[cutlass.min(start + i, length - 1)]
    return rBlock
