"""Activations of a router's logits in fp32, accurate where the textbook forms are not.

    sqrtsoftplus(l) = sqrt(max(l, 0) + log1p(exp(-|l|)))
    sigmoid(l)      = 1 / (1 + exp(-l))

log(1 + exp(l)) is 0 below l = -16.6 in fp32, and exp(l) loses bits, then underflows, below -87.
Here the relative error stays under 1e-6 wherever the result has an fp32 value at all.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

LOG2_E = 1.4426950408889634
LOG2_E_LOW = LOG2_E - 1.44269502162933349609375  # what fp32 loses of it
LIFT = 64  # binary orders that keep the smallest results out of the subnormals on their way
# 1.5 * 2^23: adding it rounds to a whole number, which then stands in the low bits. With the bias
# of an exponent and LIFT on top, those bits are the exponent of 2^(whole + LIFT).
ROUNDER = 12582912.0 + 127 + LIFT

# Below this l, sqrt(log1p(e)) = exp(l/2) (1 - e/4) to fp32 precision, e = exp(l): with half the
# exponent the result underflows only where it must. Above it the error that the instruction for
# exp2 makes of l log2(e), which grows with |l|, does no harm.
TAIL = -8.0

# log1p(e) / e on [0, 1], minimax in the relative error: 2e-7, of which the root keeps half.
LOG1P = (
    0.9999998211860657,
    -0.4999740421772003,
    0.33275479078292847,
    -0.24495463073253632,
    0.17745241522789001,
    -0.10768171399831772,
    0.04408963397145271,
    -0.008539208211004734,
)


# The same of degree 3: 4e-4.
ROUGH_LOG1P = (0.9996070265769958, -0.4864141345024109, 0.25402501225471497, -0.07434310019016266)
# Relative errors of `rough`, at most, unless the activation is less than FLUSHED: it may be 0 then.
ROUGH = {"sqrtsoftplus": 2.0**-12, "sigmoid": 2.0**-15}
FLUSHED = 2.0**-62


@cute.jit
def exp_nonpositive(v: Float32) -> Float32:
    """exp(v) for v <= 0 by a two-term range reduction: relative error about 2e-7."""
    v = cute.arch.fmax(v, Float32(-110.0))  # exp(-110) is 0 in fp32, and -inf * x is no NaN
    shifted = cute.math.fma(v, Float32(LOG2_E), Float32(ROUNDER))
    whole = shifted - Float32(ROUNDER)
    fraction = cute.math.fma(v, Float32(LOG2_E), -whole)
    fraction = cute.math.fma(v, Float32(LOG2_E_LOW), fraction)
    root = cute.math.exp2(fraction, approx=True, ftz=True)
    power = (shifted.bitcast(Int32) << 23).bitcast(Float32)
    return root * power * Float32(2.0**-LIFT)  # the result may be subnormal, no factor is


def polynomial(coefficients: tuple[float, ...], v: Float32) -> Float32:
    """The polynomial at v, as a tree: a short chain of dependent steps."""
    terms, power = [Float32(c) for c in coefficients], v
    while len(terms) > 1:
        pairs = zip(terms[::2], terms[1::2], strict=True)
        terms = [cute.math.fma(b, power, a) for a, b in pairs]
        power = power * power
    return terms[0]


def sqrtsoftplus_body(logit: Float32) -> Float32:
    """sqrt(softplus(logit)) from TAIL on; a NaN stays one."""
    magnitude = cute.math.absf(logit)
    e = cute.math.exp2(magnitude * Float32(-LOG2_E), approx=True, ftz=True)
    positive = cute.math.fma(magnitude, Float32(0.5), logit * 0.5)  # max(l, 0), which keeps NaN
    return sqrt(cute.math.fma(polynomial(LOG1P, e), e, positive))


@cute.jit
def sqrtsoftplus_tail(logit: Float32) -> Float32:
    """sqrt(softplus(logit)) below TAIL."""
    e = exp_nonpositive(logit * 0.5)
    return e * (1.0 - e * e * 0.25)


@cute.jit
def sqrt(v: Float32) -> Float32:
    """The square root of 0 or a normal number, in one instruction: relative error about 1e-7."""
    return cute.arch.inline_ptx(
        "sqrt.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[v]
    )


@cute.jit
def sigmoid(logit: Float32) -> Float32:
    """1 / (1 + exp(-logit)), the activation of DeepSeek-V3's router. A NaN stays one."""
    e = exp_nonpositive(-cute.math.absf(logit))
    numerator = cutlass.select_(logit < Float32(0.0), e, Float32(1.0))
    value = numerator * cute.arch.rcp_approx(1.0 + e)
    return cutlass.select_(logit == logit, value, logit)  # the clamp of exp has lost it


def rough(logit: Float32, scoring: str) -> Float32:
    """About the activation of one logit, in few instructions; a NaN stays one."""
    if scoring == "sigmoid":
        e = cute.math.exp2(logit * Float32(-LOG2_E), approx=True, ftz=True)
        return cute.arch.rcp_approx(1.0 + e)
    e = cute.math.exp2(cute.math.absf(logit) * Float32(-LOG2_E), approx=True, ftz=True)
    log1p_by_e = Float32(ROUGH_LOG1P[-1])
    for coefficient in reversed(ROUGH_LOG1P[:-1]):
        log1p_by_e = cute.math.fma(log1p_by_e, e, Float32(coefficient))
    return sqrt(cute.math.fma(log1p_by_e, e, cute.arch.fmax(logit, Float32(0.0))))


@cute.jit
def activate_all(rLogits: cute.Tensor, scoring: cutlass.Constexpr) -> None:
    """The activations of logits, in place; softmax needs a whole row and is not here.

    An activation depends on its logit alone, not on the others.
    """
    if cutlass.const_expr(scoring == "sigmoid"):
        for i in cutlass.range_constexpr(cute.size(rLogits)):
            rLogits[i] = sigmoid(rLogits[i])
    else:
        rBody = cute.make_rmem_tensor(cute.size(rLogits), Float32)
        lowest = rLogits[0]
        for i in cutlass.range_constexpr(cute.size(rLogits)):
            rBody[i] = sqrtsoftplus_body(rLogits[i])
            lowest = cute.arch.fmin(lowest, rLogits[i])
        if lowest < Float32(TAIL):  # rarely
            for i in cutlass.range_constexpr(cute.size(rLogits)):
                if rLogits[i] < Float32(TAIL):
                    rBody[i] = sqrtsoftplus_tail(rLogits[i])
        for i in cutlass.range_constexpr(cute.size(rLogits)):
            rLogits[i] = rBody[i]


@cute.jit
def with_bias(activation: Float32, bias: Float32) -> Float32:
    """A score: the same bits wherever it is computed from these.

    The compiler may round a product and the sum that takes it as one, but not this sum.
    """
    return cute.arch.inline_ptx(
        "add.rn.f32 {$w0}, {$r0}, {$r1};",
        write_only_types=[Float32],
        read_only_args=[activation, bias],
    )


def score_of(activation: Float32, sBias: Any, expert: Int32) -> Float32:
    """The score of an expert, whose bias is in sBias; None where there are no biases."""
    return activation if sBias is None else with_bias(activation, sBias[expert])


@cute.jit
def activate(logit: Float32, scoring: cutlass.Constexpr) -> Float32:
    """The activation of one logit."""
    rLogit = cute.make_rmem_tensor(1, Float32)
    rLogit[0] = logit
    activate_all(rLogit, scoring)
    return rLogit[0]
