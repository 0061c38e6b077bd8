"""Host entry of the selection kernel: fp32 logits that are already checked -> one launch."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import target_for
from cute_router.spec import HIDDEN_MULTIPLE, RouterSpec
from cute_router.topk.config import GateConfig


def launch(
    logits: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    spec: RouterSpec,
    factor: float,
) -> None:
    """Queue the choice on the current stream of the logits' device. N is at least 1."""
    kernel_of(spec, logits.get_device())(logits, bias, weights, ids, factor)


@cache
def kernel_of(spec: RouterSpec, device: int) -> Callable[..., None]:
    """The kernel for routers like `spec` on a device."""
    any_hidden_size = replace(spec, hidden_size=HIDDEN_MULTIPLE)  # logits do not tell it
    return compiler.kernel(GateConfig(any_hidden_size, target_for(device)[1]))
