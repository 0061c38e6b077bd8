"""Host entry of the selection kernel: fp32 logits that are already checked -> one launch."""

from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import target_for
from cute_router.spec import RouterSpec
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
    target = target_for(logits.device.index)[1]
    kernel = compiler.kernel(GateConfig(spec, target))
    kernel(logits, bias, weights, ids, factor)
