"""MoE router kernels for serving, in CuTe DSL: hidden states to experts in one launch.

    weights, ids = cute_router.dense_decode(x, W, bias, routed_scaling_factor=1.5)

CUDA tensors run the kernels that `backend_for(device)` names; CPU tensors run `reference`, the fp64
specification. Importing this package imports neither the kernels nor their compiler.
"""

from typing import TYPE_CHECKING, Any

from cute_router import reference
from cute_router.arch import backend_for
from cute_router.functional import dense_decode, hash_route
from cute_router.spec import RouterSpec, Routing

if TYPE_CHECKING:
    from cute_router.compile import warmup

__version__ = "0.1.0"

__all__ = [
    "RouterSpec",
    "Routing",
    "__version__",
    "backend_for",
    "dense_decode",
    "hash_route",
    "reference",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Import what needs the compiler at its first use."""
    if name == "warmup":
        from cute_router.compile import warmup

        return warmup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
