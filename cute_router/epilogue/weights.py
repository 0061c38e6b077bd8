"""The weight of a chosen expert."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from cute_router.spec import RouterSpec


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
