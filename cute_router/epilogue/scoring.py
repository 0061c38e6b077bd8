"""Activations of a router's logits in fp32, accurate where the textbook forms are not.

    sqrtsoftplus(l) = sqrt(max(l, 0) + log1p(exp(-|l|)))
    sigmoid(l)      = 1 / (1 + exp(-l))

log(1 + exp(l)) is 0 below l = -16.6 in fp32, and exp(l) loses bits, then underflows, below -87.
Here the relative error stays under 1e-6 wherever the result has an fp32 value at all.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

LOG2_E = 1.4426950408889634
LOG2_E_LOW = LOG2_E - 1.44269502162933349609375  # what fp32 loses of it
LIFT = 64  # binary orders that keep the smallest results out of the subnormals on their way
# 1.5 * 2^23: adding it rounds to a whole number, which then stands in the low bits. With the bias
# of an exponent and LIFT on top, those bits are the exponent of 2^(whole + LIFT).
ROUNDER = 12582912.0 + 127 + LIFT

# Below this l, log1p(e) = e (1 - e/2) to fp32 precision, e = exp(l), and its root is
# exp(l/2) (1 - e/4): half the exponent, so that the result underflows only where it must.
TAIL = -15.0

# log1p(e) / e on [0, 1], minimax in the relative error: 3e-8, below fp32's own rounding.
LOG1P = (
    0.9999999403953552,
    -0.4999949336051941,
    0.3331909775733948,
    -0.2484298199415207,
    0.19106008112430573,
    -0.13663247227668762,
    0.07822596281766891,
    -0.02950523979961872,
    0.005232693627476692,
)


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


def log1p_unit(e: Float32) -> Float32:
    """log1p(e) for e in [0, 1]; the polynomial as a tree, for a short chain of dependent steps."""
    terms = [Float32(c) for c in LOG1P]
    power = e
    while len(terms) > 1:
        pairs = [cute.math.fma(b, power, a) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
        power = power * power
    return terms[0] * e


@cute.jit
def sqrtsoftplus(logit: Float32) -> Float32:
    """sqrt(softplus(logit)), the activation of DeepSeek-V4's router. A NaN stays one."""
    in_tail = logit < Float32(TAIL)
    magnitude = cute.math.absf(logit)
    e = exp_nonpositive(cutlass.select_(in_tail, logit * 0.5, -magnitude))
    positive = cute.math.fma(magnitude, Float32(0.5), logit * 0.5)  # max(l, 0), which keeps NaN
    body = sqrt(positive + log1p_unit(e))
    return cutlass.select_(in_tail, e * (1.0 - e * e * 0.25), body)


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


@cute.jit
def activate(logit: Float32, scoring: cutlass.Constexpr) -> Float32:
    """The activation of one logit; softmax needs its whole row and is not here."""
    if cutlass.const_expr(scoring == "sqrtsoftplus"):
        return sqrtsoftplus(logit)
    return sigmoid(logit)
