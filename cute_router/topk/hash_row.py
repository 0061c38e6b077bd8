"""What the gated hash kernels share: a token's row of the table, and the weights of its slots.

One warp has a token; lane j has slot j. A slot without an expert, because the token id is not in
the table or the entry is no expert, has expert -1, weight 0, and no part in the sum.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from cute_router.epilogue.outputs import (
    Outputs,
    fake_extra,
    fake_results,
    is_token,
    physical,
    put_shared,
    put_slot,
)
from cute_router.epilogue.weights import weight
from cute_router.spec import RouterSpec
from cute_router.topk.config import WARP

INTEGER = {32: Int32, 64: Int64}  # by bits
NO_EXPERT = -1


@cute.jit
def look_up(mTokens: Any, mTable: cute.Tensor, token: Int32, E: Int32, lane: Int32) -> Int32:
    """The expert of this lane's slot, in [0, E), or NO_EXPERT."""
    vocab, k = mTable.shape
    expert = Int32(NO_EXPERT)
    row = row_of(mTokens, token)
    if row >= 0 and row < vocab and lane < k:
        place = mTable.iterator + (row * mTable.stride[0] + lane)
        entry = cute.make_tensor(place, cute.make_layout(1))[0].to(Int64)
        if entry >= 0 and entry < E:
            expert = entry.to(Int32)
    return expert


def row_of(mTokens: Any, token: Int32) -> Int64:
    """The row of the table that a token names: its id, or without ids its own number."""
    if mTokens is None:
        return Int64(token)
    return mTokens[token].to(Int64)


def is_real(mTokens: Any, mTable: cute.Tensor, token: Int32, out: Outputs) -> Any:
    """Whether a row's shared experts are anyone's: it is a token, and the table knows it.

    None where nobody asks.
    """
    real = is_token(out, token)
    if mTokens is None or out.extra is None:
        return real
    return is_known(mTokens, mTable, token, Boolean(True) if real is None else real)


@cute.jit
def is_known(mTokens: cute.Tensor, mTable: cute.Tensor, token: Int32, real: Boolean) -> Boolean:
    """Whether a row is `real`, and the table knows its token id."""
    row = row_of(mTokens, token)
    return real and row >= 0 and row < mTable.shape[0]


@cute.jit
def store_row(
    expert: Int32,
    activation: Float32,
    out: Outputs,
    token: Int32,
    E: Int32,
    real: Any,
    lane: Int32,
    spec: cutlass.Constexpr[RouterSpec],
) -> None:
    """The results of a token from the activations of its slots. One warp calls.

    real: what `is_real` says of it.
    """
    name = physical(out, expert)
    chosen = expert != NO_EXPERT
    activation = cutlass.select_(chosen, activation, Float32(0.0))
    total = cute.arch.warp_reduction_sum(activation)
    share = cutlass.select_(chosen, weight(activation, total, out.factor, spec), Float32(0.0))
    row = wide_row(out, token)
    if lane < spec.top_k:
        put_slot(row, lane, name, share, real)
    put_shared(row, spec.top_k, E, lane, WARP, real)


def wide_row(out: Outputs, token: Int32) -> Outputs:
    """`Outputs.of_row` where results may pass 2^31 elements."""

    def row(matrix: Any) -> Any:
        if matrix is None:
            return None
        columns = matrix.shape[1]
        return cute.make_tensor(matrix.iterator + Int64(token) * columns, cute.make_layout(columns))

    return out._replace(mWeights=row(out.mWeights), mIds=row(out.mIds))


def fake_lookup(config, N) -> tuple[Any, cute.Tensor]:
    """Stand-ins for token ids (N), or None, and table (vocab, k), for `cute.compile`."""
    entries = INTEGER[config.table_bits]
    shape, strides = (cute.sym_int32(), config.spec.top_k), (cute.sym_int64(), 1)
    table = make_fake_tensor(entries, shape, strides, assumed_align=config.table_bits // 8)
    return fake_tokens(config.token_bits, N), table


def fake_tokens(bits: int, N) -> Any:
    """The same for token ids of so many bits, or none."""
    return make_fake_tensor(INTEGER[bits], (N,), (1,), assumed_align=bits // 8) if bits else None


def fake_outputs(config, N) -> tuple[Any, Any]:
    """The same for the results."""
    return fake_results(N, config.spec.top_k, config.extras)


def fake_extras(config, N) -> tuple[Any, ...]:
    """The same for extras, whose number of experts is a run-time value."""
    return fake_extra(N, cute.sym_int32(), config.extras)
