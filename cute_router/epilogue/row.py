"""The router's step on one token's logits, by one warp: any scoring, groups, ties, NaN.

    a = activation(l);   s = a + bias;   ids = the k best of s;   w = a[ids] / sum(a[ids]) * factor

Lane j holds experts j, j + 32, ... in registers; they are chosen in rounds (`topk.rounds`).
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from cute_router.epilogue.outputs import Outputs, physical, put_shared, put_slot
from cute_router.epilogue.scoring import activate_all, exp_nonpositive
from cute_router.epilogue.weights import weight
from cute_router.spec import RouterSpec
from cute_router.topk.config import WARP
from cute_router.topk.key import REMOVED, key, number
from cute_router.topk.rounds import take_all, take_best


@cute.jit
def softmax(rAct: cute.Tensor) -> None:
    """Softmax over the warp's values, in place; a NaN or +inf makes the whole row NaN."""
    high = rAct[0]
    for i in cutlass.range_constexpr(1, cute.size(rAct)):
        high = cute.arch.fmax(high, rAct[i])
    high = cute.arch.warp_reduction_max(high)
    total = Float32(0.0)
    for i in cutlass.range_constexpr(cute.size(rAct)):
        d = rAct[i] - high
        rAct[i] = cutlass.select_(d == d, exp_nonpositive(d), d)
        total = total + rAct[i]
    total = cute.arch.warp_reduction_sum(total)
    for i in cutlass.range_constexpr(cute.size(rAct)):
        rAct[i] = rAct[i] / total


@cute.jit
def drop_groups(
    rKeys: cute.Tensor, sKeys: cute.Tensor, lane: Int32, spec: cutlass.Constexpr[RouterSpec]
) -> None:
    """Remove the experts outside the `topk_group` groups with the best sums of two scores."""
    size = spec.num_experts // spec.n_group
    slots = (spec.n_group + WARP - 1) // WARP
    for i in cutlass.range_constexpr(cute.size(rKeys)):
        sKeys[lane + WARP * i] = rKeys[i]
    cute.arch.sync_warp()
    rGroups = cute.make_rmem_tensor(slots, Uint32)
    for j in cutlass.range_constexpr(slots):
        group = lane + WARP * j
        rGroups[j] = Uint32(REMOVED)
        if group < spec.n_group:
            first, second = Uint32(REMOVED), Uint32(REMOVED)
            for e in cutlass.range(size):
                k = sKeys[group * size + e]
                runner_up = cutlass.max(cutlass.min(k, first), second)
                first, second = cutlass.max(first, k), runner_up
            rGroups[j] = key(number(first) + number(second))
    cute.arch.sync_warp()
    rTaken = cute.make_rmem_tensor(cute.size(rKeys), Int32)
    rTaken.fill(0)
    for _ in cutlass.range(spec.topk_group):
        group = take_best(rGroups, lane)
        for i in cutlass.range_constexpr(cute.size(rKeys)):
            rTaken[i] = cutlass.select_((lane + WARP * i) // size == group, Int32(1), rTaken[i])
    for i in cutlass.range_constexpr(cute.size(rKeys)):
        rKeys[i] = cutlass.select_(rTaken[i] == 1, rKeys[i], Uint32(REMOVED))


@cute.jit
def route_row(
    gLogits: cute.Tensor,
    bias: Any,
    sKeys: cute.Tensor,
    out: Outputs,
    real: Any,
    lane: Int32,
    spec: cutlass.Constexpr[RouterSpec],
    activated: cutlass.Constexpr = False,
) -> None:
    """Route one token: logits (E) and bias (E), or None, to the results of its row. One warp calls.

    activated: the logits are activations already. sKeys is shared memory for E keys, rounded up to
    whole warps; only groups use it. out is that of the token (`of_row`), real what `is_token` says
    of it.
    """
    E, k = spec.num_experts, spec.top_k
    slots = (E + WARP - 1) // WARP
    rAct = cute.make_rmem_tensor(slots, Float32)
    rKeys = cute.make_rmem_tensor(slots, Uint32)
    for i in cutlass.range_constexpr(slots):
        rAct[i] = -Float32.inf if cutlass.const_expr(spec.scoring == "softmax") else Float32(0.0)
        if lane + WARP * i < E:
            rAct[i] = gLogits[lane + WARP * i].to(Float32)
    if cutlass.const_expr(spec.scoring == "softmax"):
        softmax(rAct)
    elif cutlass.const_expr(not activated):
        activate_all(rAct, spec.scoring)
    for i in cutlass.range_constexpr(slots):
        rKeys[i] = Uint32(REMOVED)
        if lane + WARP * i < E:
            score = rAct[i]
            if cutlass.const_expr(bias is not None):
                score = score + bias[lane + WARP * i]
            rKeys[i] = key(score)
    if cutlass.const_expr(spec.n_group > 1):
        drop_groups(rKeys, sKeys, lane, spec)

    chosen, activation = take_all(rKeys, rAct, k, lane)
    name = physical(out, chosen)
    total = cute.arch.warp_reduction_sum(activation)
    if lane < k:
        put_slot(out, lane, name, weight(activation, total, out.factor, spec), real)
    put_shared(out, k, E, lane, WARP, real)
