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
LOG2_E_LOW = LOG2_E - 1.442695140838623046875  # what fp32 loses of it

# Below this l, log1p(e) = e (1 - e/2) to fp32 precision, e = exp(l), and its root is
# exp(l/2) (1 - e/4): half the exponent, so that the result underflows only where it must.
TAIL = -15.0


@cute.jit
def power_of_two(n: Int32) -> Float32:
    """2^n for n in [-126, 127], exactly."""
    return ((n + 127) << 23).bitcast(Float32)


@cute.jit
def exp_nonpositive(v: Float32) -> Float32:
    """exp(v) for v <= 0 by a two-term range reduction: relative error about 2e-7."""
    v = cute.arch.fmax(v, Float32(-110.0))  # exp(-110) is 0 in fp32, and -inf * x is no NaN
    whole = cute.math.roundeven(v * LOG2_E)
    fraction = cute.math.fma(v, Float32(LOG2_E), -whole)
    fraction = cute.math.fma(v, Float32(LOG2_E_LOW), fraction)
    # 2^whole in two factors, for the result may be subnormal where neither factor is.
    n = whole.to(Int32)
    half = n >> 1
    root = cute.math.exp2(fraction, approx=True, ftz=True)
    return root * power_of_two(half) * power_of_two(n - half)


@cute.jit
def sqrtsoftplus(logit: Float32) -> Float32:
    """sqrt(softplus(logit)), the activation of DeepSeek-V4's router."""
    in_tail = logit < Float32(TAIL)
    magnitude = cute.arch.fmax(logit, -logit)
    e = exp_nonpositive(cutlass.select_(in_tail, logit * 0.5, -magnitude))
    body = cute.math.sqrt(cute.arch.fmax(logit, Float32(0.0)) + cute.math.log1p(e), fastmath=True)
    return cutlass.select_(in_tail, e * (1.0 - e * e * 0.25), body)


@cute.jit
def sigmoid(logit: Float32) -> Float32:
    """1 / (1 + exp(-logit)), the activation of DeepSeek-V3's router."""
    e = exp_nonpositive(-cute.arch.fmax(logit, -logit))
    numerator = cutlass.select_(logit < Float32(0.0), e, Float32(1.0))
    return numerator * cute.arch.rcp_approx(1.0 + e)


@cute.jit
def activate(logit: Float32, scoring: cutlass.Constexpr) -> Float32:
    """The activation of one logit; softmax needs its whole row and is not here."""
    if cutlass.const_expr(scoring == "sqrtsoftplus"):
        value = sqrtsoftplus(logit)
    else:
        value = sigmoid(logit)
    return cutlass.select_(logit == logit, value, logit)  # max and min lose a NaN on the way
