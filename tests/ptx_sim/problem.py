"""The decode kernels that are simulated, cut down in K alone, and inputs with exact answers."""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cute_router import Routing, reference
from cute_router.gemm.config import TILE_K, DecodeConfig
from cute_router.heuristics import decode_config
from cute_router.spec import RouterSpec

WIDE = os.environ.get("CUTE_ROUTER_PTX_SIM") == "wide"  # more routers, orders and draws
ARCH = "sm_100a"
HIDDEN = 7168  # for which the heuristics are asked


def chosen(num_experts: int, N: int, options: dict[str, Any] | None = None, **target: Any):
    """What the heuristics choose for a router at N tokens, with two K blocks to a CTA.

    K ends within the last block. A ring stays one, of two stages and five blocks.
    """
    hidden = target.pop("hidden_size", HIDDEN)
    arch = target.pop("arch", ARCH)
    spec = RouterSpec(num_experts, hidden, **(options or {}))
    config = decode_config(spec, N, arch, **target)
    return shortened(config, 2 if config.stages == config.k_blocks else 5)


def shortened(config: DecodeConfig, blocks: int) -> DecodeConfig:
    """`config` with a K of `blocks` K blocks to a CTA, of which the very last is ragged."""
    hidden = config.split_k * blocks * TILE_K - 24
    stages = 2 if config.stages < config.k_blocks else blocks
    return replace(config, spec=replace(config.spec, hidden_size=hidden), stages=stages)


def options_of(spec: RouterSpec) -> dict[str, Any]:
    """The keyword arguments of the reference."""
    return {
        "top_k": spec.top_k,
        "scoring": spec.scoring,
        "renormalize": spec.renormalize,
        "n_group": spec.n_group,
        "topk_group": spec.topk_group,
    }


def exact_inputs(spec: RouterSpec, N: int, *, ties: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, W, bias) whose logits are multiples of 1/32, exact in fp32 in whatever order.

    With `ties` a third of the experts are copies of others, and biases are few; without, every
    expert has a bias of its own.
    """
    E, K = spec.num_experts, spec.hidden_size
    generator = torch.Generator().manual_seed(1000 * E + N)

    def whole(rows: int, density: float) -> Tensor:
        values = torch.randint(-2, 3, (rows, K), generator=generator)
        kept = torch.rand(rows, K, generator=generator) < density
        return (values * kept).bfloat16()

    x, W = whole(N, 1.0) / 32, whole(E, min(1.0, 512 / K))
    bias = torch.randn(E, generator=generator) / 4
    if ties:
        copies = torch.randperm(E, generator=generator)[: E // 3]
        W[copies] = W[copies.roll(1)]
        bias = (bias.sign() + 1) / 8
    return x, W, bias if spec.has_bias else None


def expected(spec: RouterSpec, x: Tensor, W: Tensor, bias: Tensor | None) -> Routing:
    """What the specification says."""
    return reference.route(x, W, bias, **options_of(spec))


def assert_same(routing: Routing, wanted: Routing) -> None:
    """Equal ids, weights within 1e-5."""
    wrong = (routing.ids != wanted.ids).any(-1)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise AssertionError(
            f"token {n}: ids {routing.ids[n].tolist()} for {wanted.ids[n].tolist()};"
            f" {int(wrong.sum())} of {len(wrong)} tokens are wrong"
        )
    error = (routing.weights - wanted.weights).abs().nan_to_num(nan=torch.inf).max()
    assert error <= 1e-5, f"a weight is off by {float(error)}"
