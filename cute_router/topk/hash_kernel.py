"""Hash routing with equal weights: ids[n] = table[token_ids[n]], weights = factor / k.

    thread -> `vector` neighbouring entries of one token:   read its id, copy them, store weights

A token id outside the table gives ids -1 and weights 0. Two dependent reads are all the work, so
the kernel is one read deep per thread and its stores are one contiguous run per CTA. Offsets are
64-bit: a table, or the outputs, may pass 2^31 elements.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from cute_router.topk.hash_config import HashConfig
from cute_router.topk.hash_row import INTEGER


class HashKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: HashConfig):
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        mTokens: cute.Tensor,  # (N) token ids
        mTable: cute.Tensor,  # (vocab, k)
        mWeights: cute.Tensor,  # (N, k) fp32
        mIds: cute.Tensor,  # (N, k) int32
        share: Float32,  # factor / k
        stream: cuda.CUstream,
    ):
        """Launch; traced into the kernel's host code."""
        c = self.cfg
        self.kernel.set_name_prefix("cute_router_hash", remove_cutlass_symbol=True)
        self.kernel(mTokens, mTable, mWeights, mIds, share).launch(
            grid=[cute.ceil_div(cute.size(mTokens), c.tokens), 1, 1],
            block=[c.tokens * c.row_threads, 1, 1],
            stream=stream,
            use_pdl=c.overlaps,
        )

    @cute.kernel
    def kernel(
        self,
        mTokens: cute.Tensor,
        mTable: cute.Tensor,
        mWeights: cute.Tensor,
        mIds: cute.Tensor,
        share: Float32,
    ):
        """A thread copies `vector` entries of one token.

        It begins with what the token's id may be, before the wait for the kernel ahead. Should that
        be the id behind the wait, as where ids were written long ago, its entries are already here:
        one trip to memory less. What the early look saw has no other effect.
        """
        c = self.cfg
        tid, block = cute.arch.thread_idx()[0], cute.arch.block_idx()[0]
        token = block * c.tokens + tid // c.row_threads
        column = tid % c.row_threads * c.vector
        guess = Int64(-1)
        rIds = cute.make_rmem_tensor(c.vector, Int32)
        rIds.fill(-1)
        if cutlass.const_expr(c.overlaps):
            cute.arch.griddepcontrol_launch_dependents()
            if token < cute.size(mTokens):
                guess = self.token_id(mTokens, token)
                if self.known(mTable, guess):
                    at = guess * mTable.stride[0] + column
                    rIds.store(self.entries(mTable, at).load().to(Int32))
            cute.arch.griddepcontrol_wait()
        if token < cute.size(mTokens):
            row = self.token_id(mTokens, token)
            weight = share
            if not self.known(mTable, row):
                rIds.fill(-1)
                weight = Float32(0.0)
            elif row != guess:
                at = row * mTable.stride[0] + column
                rIds.store(self.entries(mTable, at).load().to(Int32))
            rWeights = cute.make_rmem_tensor(c.vector, Float32)
            rWeights.fill(weight)
            # The runs of a CTA's threads follow one another.
            at = Int64(block) * (c.tokens * c.top_k) + tid * c.vector
            self.entries(mIds, at).store(rIds.load())
            self.entries(mWeights, at).store(rWeights.load())

    @cute.jit
    def token_id(self, mTokens: cute.Tensor, token: Int32) -> Int64:
        """A token's id as it is now, though another kernel may be writing it."""
        place = mTokens.iterator + token
        return cute.arch.load(place, mTokens.element_type, sem="relaxed", scope="gpu").to(Int64)

    @cute.jit
    def known(self, mTable: cute.Tensor, row: Int64) -> Boolean:
        """Whether the table has this row."""
        return row >= 0 and row < cute.size(mTable, mode=[0])

    def entries(self, matrix: cute.Tensor, offset: Int64) -> cute.Tensor:
        """`vector` elements of a matrix, at a multiple of as many."""
        place = matrix.iterator + cute.assume(offset, divby=self.cfg.vector)
        return cute.make_tensor(place, cute.make_layout(self.cfg.vector))


def trace(config: HashConfig) -> tuple[HashKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    c, N = config, cute.sym_int32()
    k, V = c.top_k, c.vector
    tokens, entries = INTEGER[c.token_bits], INTEGER[c.table_bits]
    stride = cute.sym_int64(divisibility=V)
    return HashKernel(config), (
        make_fake_tensor(tokens, (N,), (1,), assumed_align=c.token_bits // 8),
        make_fake_tensor(
            entries, (cute.sym_int32(), k), (stride, 1), assumed_align=V * c.table_bits // 8
        ),
        make_fake_tensor(Float32, (N, k), (k, 1), assumed_align=4 * V),
        make_fake_tensor(Int32, (N, k), (k, 1), assumed_align=4 * V),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
