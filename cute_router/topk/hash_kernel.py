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

from cute_router.epilogue.outputs import (
    Outputs,
    extra_of,
    fake_extra,
    fake_results,
    is_token,
    physical,
    put_slot,
)
from cute_router.extras import PLAIN
from cute_router.topk.hash_config import HashConfig
from cute_router.topk.hash_row import INTEGER, NO_EXPERT, fake_tokens, wide_row


class HashKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: HashConfig):
        self.cfg = config

    @cute.jit
    def __call__(
        self,
        mTokens: cute.Tensor,  # (N) token ids
        mTable: cute.Tensor,  # (vocab, k)
        mWeights: cute.Tensor | None,  # results, see `epilogue.outputs`
        mIds: cute.Tensor,
        share: Float32,  # factor / k
        stream: cuda.CUstream,
        *extra,
    ):
        """Launch; traced into the kernel's host code."""
        c = self.cfg
        self.kernel.set_name_prefix("cute_router_hash", remove_cutlass_symbol=True)
        self.kernel(mTokens, mTable, mWeights, mIds, share, extra_of(extra)).launch(
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
        mWeights: cute.Tensor | None,
        mIds: cute.Tensor,
        share: Float32,
        extra: Any,
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
                    self.fetch(mTable, guess, column, rIds)
            cute.arch.griddepcontrol_wait()
        if token < cute.size(mTokens):
            row = self.token_id(mTokens, token)
            weight = share
            if not self.known(mTable, row):
                rIds.fill(-1)
                weight = Float32(0.0)
            elif row != guess:
                self.fetch(mTable, row, column, rIds)
            if cutlass.const_expr(c.extras == PLAIN):
                rWeights = cute.make_rmem_tensor(c.vector, Float32)
                rWeights.fill(weight)
                # The runs of a CTA's threads follow one another.
                at = Int64(block) * (c.tokens * c.top_k) + tid * c.vector
                self.entries(mIds, at).store(rIds.load())
                self.entries(mWeights, at).store(rWeights.load())
            else:
                out = Outputs(mWeights, mIds, share, extra)
                self.put(out, token, column, rIds[0], weight)

    @cute.jit
    def fetch(self, mTable: cute.Tensor, row: Int64, column: Int32, rIds: cute.Tensor) -> None:
        """This thread's entries of a row. For an expert map, one that no int32 holds is nobody."""
        entries = self.entries(mTable, row * mTable.stride[0] + column)
        if cutlass.const_expr(self.cfg.extras.expert_map and self.cfg.table_bits == 64):
            entry = entries[0]
            narrow = entry.to(Int32)
            rIds[0] = cutlass.select_(narrow.to(Int64) == entry, narrow, Int32(NO_EXPERT))
        else:
            rIds.store(entries.load().to(Int32))

    @cute.jit
    def put(self, out: Outputs, token: Int32, column: Int32, entry: Int32, weight: Float32) -> None:
        """Write one slot. An entry that the expert map has not is no expert."""
        real = is_token(out, token)
        name = entry
        if cutlass.const_expr(self.cfg.extras.expert_map):
            mapped = entry >= 0 and entry < cute.size(out.extra.mMap)
            weight = cutlass.select_(mapped, weight, Float32(0.0))
            name = physical(out, cutlass.select_(mapped, entry, Int32(NO_EXPERT)))
        put_slot(wide_row(out, token), column, name, weight, real)

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
    entries = INTEGER[c.table_bits]
    stride = cute.sym_int64(divisibility=V)
    return HashKernel(config), (
        fake_tokens(c.token_bits, N),
        make_fake_tensor(
            entries, (cute.sym_int32(), k), (stride, 1), assumed_align=V * c.table_bits // 8
        ),
        *fake_results(N, k, c.extras, V),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *fake_extra(N, cute.sym_int32(), c.extras),
    )
