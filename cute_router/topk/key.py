"""The one ordering: a float as an unsigned key whose integer order is the order of selection.

    key(a) > key(b)  iff  a ranks before b;   key(-0) = key(+0);   every NaN has one key

Selection everywhere compares (key descending, index ascending), a total order, so that the router's
epilogue and the standalone kernels cannot disagree on ties. Keys of numbers lie between
key(-inf) = 0x007FFFFF and key(+inf) = 0xFF800000: what is below serves NaN and removed slots, what
is above serves NaN-first orders and the empty packets of `gemm.exchange`, which has no such keys.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

REMOVED = 0  # below every key: padding, an expert of a group that was not chosen, one already taken
NAN_LAST = 1


@cute.jit
def key(value: Float32, nan: cutlass.Constexpr = "last") -> Uint32:
    """The key of `value`; NaN ranks "last" (a router) or "first" (torch.sort descending)."""
    bits = (value + Float32(0.0)).bitcast(Int32)  # -0 + 0 = +0: equal numbers have equal keys
    # Flip the sign of positives, every bit of negatives: two's complement order becomes unsigned.
    ordered = (bits ^ ((bits >> 31) | Int32(-0x80000000))).bitcast(Uint32)
    # The sum of any NaN is the canonical one, 0x7FFFFFFF, which by now is the highest key.
    if cutlass.const_expr(nan == "last"):
        ordered = cutlass.select_(value == value, ordered, Uint32(NAN_LAST))
    return ordered


@cute.jit
def number(k: Uint32) -> Float32:
    """The number whose key is `k`; NaN for every key that no number has."""
    bits = k.bitcast(Int32)
    value = (bits ^ (~(bits >> 31) | Int32(-0x80000000))).bitcast(Float32)
    is_number = (k >= Uint32(0x007FFFFF)) and (k <= Uint32(0xFF800000))
    return cutlass.select_(is_number, value, Float32(float("nan")))
