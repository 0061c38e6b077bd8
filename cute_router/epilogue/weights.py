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
        share = cutlass.select_(total == Float32(0.0), Float32(0.0), activation / total)
    else:
        share = activation
    return share * factor
