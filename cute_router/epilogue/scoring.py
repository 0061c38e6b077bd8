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
ROUNDER = 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number, found in the low bits

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
def power_of_two(n: Int32) -> Float32:
    """2^n for n in [-126, 127], exactly."""
    return ((n + 127) << 23).bitcast(Float32)


@cute.jit
def exp_nonpositive(v: Float32) -> Float32:
    """exp(v) for v <= 0 by a two-term range reduction: relative error about 2e-7."""
    v = cute.arch.fmax(v, Float32(-110.0))  # exp(-110) is 0 in fp32, and -inf * x is no NaN
    shifted = cute.math.fma(v, Float32(LOG2_E), Float32(ROUNDER))
    whole = shifted - Float32(ROUNDER)
    fraction = cute.math.fma(v, Float32(LOG2_E), -whole)
    fraction = cute.math.fma(v, Float32(LOG2_E_LOW), fraction)
    # 2^whole in two factors, for the result may be subnormal where neither factor is.
    n = shifted.bitcast(Int32) - Float32(ROUNDER).bitcast(Int32)
    half = n >> 1
    root = cute.math.exp2(fraction, approx=True, ftz=True)
    return root * power_of_two(half) * power_of_two(n - half)


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
    """sqrt(softplus(logit)), the activation of DeepSeek-V4's router."""
    in_tail = logit < Float32(TAIL)
    magnitude = cute.arch.fmax(logit, -logit)
    e = exp_nonpositive(cutlass.select_(in_tail, logit * 0.5, -magnitude))
    softplus = cute.arch.fmax(logit, Float32(0.0)) + log1p_unit(e)
    body = cute.math.sqrt(softplus, fastmath=True)
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
