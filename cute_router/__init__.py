"""MoE router kernels for serving, in CuTe DSL: hidden states to experts in one launch.

    weights, ids = cute_router.dense_decode(x, W, bias, routed_scaling_factor=1.5)

CUDA tensors run the kernels that `backend_for(device)` names; CPU tensors run `reference`, the fp64
specification. Importing this package imports neither the kernels nor their compiler.
"""

from typing import TYPE_CHECKING, Any

import cute_router.ops  # defines torch.ops.cute_router
import cute_router.topk  # noqa: F401  before the function of this name, which it would replace
from cute_router import reference
from cute_router.arch import backend_for
from cute_router.extras import Extras
from cute_router.functional import (
    activation_topk,
    dense_decode,
    dense_prefill,
    hash_route,
    route,
    topk,
)
from cute_router.router import Router
from cute_router.spec import RouterSpec, Routing, TopK

if TYPE_CHECKING:
    from cute_router.compile import warmup
    from cute_router.tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "Extras",
    "Router",
    "RouterSpec",
    "Routing",
    "TopK",
    "__version__",
    "activation_topk",
    "backend_for",
    "dense_decode",
    "dense_prefill",
    "hash_route",
    "reference",
    "route",
    "topk",
    "tune",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Import what leads to the kernels at its first use."""
    if name == "warmup":
        from cute_router.compile import warmup

        return warmup
    if name == "tune":
        from cute_router.tuning.tune import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
