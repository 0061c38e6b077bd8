"""What the gated hash kernels share: a token's row of the table, and the weights of its slots.

One warp has a token; lane j has slot j. A slot without an expert, because the token id is not in
the table or the entry is no expert, has expert -1, weight 0, and no part in the sum.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_tensor

from cute_router.epilogue.weights import weight
from cute_router.spec import RouterSpec

INTEGER = {32: Int32, 64: Int64}  # by bits
NO_EXPERT = -1


@cute.jit
def look_up(
    mTokens: cute.Tensor, mTable: cute.Tensor, token: Int32, E: Int32, lane: Int32
) -> Int32:
    """The expert of this lane's slot, in [0, E), or NO_EXPERT."""
    vocab, k = mTable.shape
    expert = Int32(NO_EXPERT)
    row = mTokens[token].to(Int64)
    if row >= 0 and row < vocab and lane < k:
        place = mTable.iterator + (row * mTable.stride[0] + lane)
        entry = cute.make_tensor(place, cute.make_layout(1))[0].to(Int64)
        if entry >= 0 and entry < E:
            expert = entry.to(Int32)
    return expert


@cute.jit
def store_row(
    expert: Int32,
    activation: Float32,
    mWeights: cute.Tensor,
    mIds: cute.Tensor,
    token: Int32,
    factor: Float32,
    lane: Int32,
    spec: cutlass.Constexpr[RouterSpec],
) -> None:
    """Weights and ids of a token from the activations of its slots. One warp calls."""
    chosen = expert != NO_EXPERT
    activation = cutlass.select_(chosen, activation, Float32(0.0))
    total = cute.arch.warp_reduction_sum(activation)
    share = cutlass.select_(chosen, weight(activation, total, factor, spec), Float32(0.0))
    if lane < spec.top_k:
        at = Int64(token) * spec.top_k + lane
        (mWeights.iterator + at).store(share)
        (mIds.iterator + at).store(expert)


def fake_lookup(config, N) -> tuple[cute.Tensor, cute.Tensor]:
    """Stand-ins for token ids (N) and table (vocab, k), for `cute.compile`."""
    tokens, entries = INTEGER[config.token_bits], INTEGER[config.table_bits]
    shape, strides = (cute.sym_int32(), config.spec.top_k), (cute.sym_int64(), 1)
    return (
        make_fake_tensor(tokens, (N,), (1,), assumed_align=config.token_bits // 8),
        make_fake_tensor(entries, shape, strides, assumed_align=config.table_bits // 8),
    )


def fake_outputs(config, N) -> tuple[cute.Tensor, cute.Tensor]:
    """The same for weights and ids (N, k)."""
    k = config.spec.top_k
    return (
        make_fake_tensor(Float32, (N, k), (k, 1), assumed_align=4),
        make_fake_tensor(Int32, (N, k), (k, 1), assumed_align=4),
    )
