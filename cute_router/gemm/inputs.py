"""Stand-ins for the inputs of a dense router, for `cute.compile`."""

from typing import Any

import cutlass.cute as cute
from cutlass import BFloat16, Float32
from cutlass.cute.runtime import make_fake_tensor

from cute_router.spec import RouterSpec


def fake_inputs(spec: RouterSpec, N: Any) -> tuple[cute.Tensor, cute.Tensor, cute.Tensor | None]:
    """x (N, K), W (E, K) and bias (E), or None where the router has none.

    E and K are run-time values here, though the code has them built in: of a static mode of one
    tile the layout algebra would drop the stride, and a CTA whose K blocks are all past K would
    load the first block and not zeros.
    """
    hidden = cute.sym_int32(divisibility=8)

    def matrix(rows):
        return make_fake_tensor(
            BFloat16, (rows, hidden), (cute.sym_int64(divisibility=8), 1), assumed_align=16
        )

    x, W = matrix(N), matrix(cute.sym_int32())
    if not spec.has_bias:
        return x, W, None
    return x, W, make_fake_tensor(Float32, (spec.num_experts,), (1,), assumed_align=4)
