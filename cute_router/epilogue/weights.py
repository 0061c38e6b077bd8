"""The weights of chosen experts."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32

from cute_router.epilogue.outputs import Outputs, physical, put_shared, put_slot
from cute_router.spec import RouterSpec
from cute_router.topk.config import width


@cute.jit
def weight(
    activation: Float32, total: Float32, factor: Float32, spec: cutlass.Constexpr[RouterSpec]
) -> Float32:
    """activation / total * factor, 0 where the total is 0; without renormalisation no division."""
    if cutlass.const_expr(spec.renormalize):
        # A total may be subnormal, and its reciprocal infinite: both go up first.
        lift = cutlass.select_(total < Float32(2.0**-64), Float32(2.0**64), Float32(1.0))
        share = (activation * lift) * cute.arch.rcp_approx(total * lift)
        share = cutlass.select_(total == Float32(0.0), Float32(0.0), share)
    else:
        share = activation
    return share * factor


@cute.jit
def put_choice(
    experts: list[Int32],
    rActs: cute.Tensor,
    spec: cutlass.Constexpr[RouterSpec],
    out: Outputs,
    token: Int32,
    lane: Int32,
    lanes: cutlass.Constexpr,
    settled: Boolean,
    real: Any,
) -> None:
    """Write the results of a token whose experts of the places lane, lane + lanes, ... are these.

    rActs: their activations; real: what `is_token` says of the row; settled: whether it is to be
    written. Every lane of the warp calls.
    """
    names = [physical(out, expert) for expert in experts]
    total = Float32(0.0)
    for slot in cutlass.range_constexpr(len(experts)):
        chosen = lane + slot * lanes < spec.top_k
        total = total + cutlass.select_(chosen, rActs[slot], Float32(0.0))
    total = cute.arch.warp_reduction_sum(total, threads_in_group=min(lanes, width(spec.top_k)))
    for slot in cutlass.range_constexpr(len(experts)):
        place = lane + slot * lanes
        if settled and place < spec.top_k:
            share = weight(rActs[slot], total, out.factor, spec)
            put_slot(out, (token, place), names[slot], share, real)
    if settled:
        put_shared(out.of_row(token), spec.top_k, spec.num_experts, lane, lanes, real)
