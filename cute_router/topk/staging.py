"""Rows staged in shared memory: every copy is under way before the first is needed, in no register.

A lane copies the runs of a row that it will look at, 16 bytes each, in groups of FLIGHT blocks that
it can wait for one by one. Rows that do not allow that are copied entry by entry.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from cute_router.topk.layout import Layout

VECTOR_BYTES = 16
FLIGHT = 4  # blocks of a group


@cute.jit
def copy_run(shared: cute.Pointer, source: cute.Pointer, size: Int32) -> None:
    """Begin to copy `size` bytes of global memory, 16 or 0; the rest of 16 becomes zeros."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};",
        read_only_args=[shared, source, size],
    )


@cute.jit
def stage(
    gRow: cute.Tensor, sRow: cute.Tensor, lay: Layout, lane: Int32, vector: cutlass.Constexpr
) -> None:
    """Begin to copy this lane's part of a row; `arrived` tells when it is there.

    vector: the row starts at a multiple of 16 bytes and is whole runs.
    """
    length = cute.size(gRow)
    for block in cutlass.range_constexpr(lay.blocks):
        for part in cutlass.range_constexpr(lay.live(block) // lay.run):
            first = lay.first(block, part, lane)
            if cutlass.const_expr(vector):
                size = Int32(VECTOR_BYTES)
                if cutlass.const_expr(not lay.whole(block)):
                    size = cutlass.select_(first < length, size, Int32(0))
                copy_run(sRow.iterator + first, gRow.iterator + first, size)
            else:
                for i in cutlass.range_constexpr(lay.run):
                    sRow[first + i] = gRow[cutlass.min(first + i, length - 1)]
        if cutlass.const_expr(vector and (block % FLIGHT == FLIGHT - 1 or block == lay.blocks - 1)):
            cute.arch.cp_async_commit_group()


def arrived(block: int, lay: Layout, vector: bool) -> None:
    """Wait until this lane's `block`, and those before it, are staged."""
    if vector and block % FLIGHT == 0:
        groups = -(-lay.blocks // FLIGHT)
        cute.arch.cp_async_wait_group(groups - 1 - block // FLIGHT)


@cute.jit
def read(sRow: cute.Tensor, lay: Layout, block: cutlass.Constexpr, lane: Int32) -> cute.Tensor:
    """This lane's entries of a block, out of shared memory."""
    rBlock = cute.make_rmem_tensor(lay.live(block), sRow.element_type)
    for part in cutlass.range_constexpr(lay.live(block) // lay.run):
        source = (sRow.iterator + lay.first(block, part, lane)).align(VECTOR_BYTES)
        sRun = cute.make_tensor(source, cute.make_layout(lay.run))
        rRun = cute.make_tensor(rBlock.iterator + part * lay.run, cute.make_layout(lay.run))
        rRun.store(sRun.load())
    return rBlock


@cute.jit
def write(
    rBlock: cute.Tensor, sRow: cute.Tensor, lay: Layout, block: cutlass.Constexpr, lane: Int32
) -> None:
    """This lane's entries of a block, of 4 bytes each, to shared memory."""
    for i in cutlass.range_constexpr(0, lay.live(block), VECTOR_BYTES // 4):
        target = (sRow.iterator + (lane * lay.run + lay.offset(block, i))).align(VECTOR_BYTES)
        run = cute.make_layout(VECTOR_BYTES // 4)
        cute.make_tensor(target, run).store(cute.make_tensor(rBlock.iterator + i, run).load())
