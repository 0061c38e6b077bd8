"""Routers of other projects, composed and called as their engines do, and what they once took.

A peer that is not installed, or cannot do the case, raises `ImportError` or `NotImplementedError`
when it is made; the message is the reason that the benchmark prints.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from problem import FACTOR, FLASH, PRO, TOP_K, Call, Problem, cublas_logits
from torch import Tensor

# The best composite of peers: microseconds by (E, K), by what it was, by N.
# SGLang 0.5.23, vLLM 0.33.0, torch 2.11.
RECORDED_ON = "recorded 2026-11 on an H200, by graphs of this kind, each alone"
LL, MM = "vLLM LL GEMM + gate", "cuBLAS + gate"
RECORDED: dict[tuple[int, int], dict[str, dict[int, float]]] = {
    FLASH: {
        LL: {1: 3.86, 2: 4.36, 4: 5.18, 8: 5.69, 16: 6.07},
        MM: {
            32: 9.09,
            64: 9.30,
            128: 9.39,
            256: 9.90,
            1024: 13.89,
            4096: 27.67,
            8192: 40.47,
            16384: 76.20,
        },
    },
    PRO: {
        LL: {1: 5.96, 2: 6.12, 4: 6.88, 8: 7.69, 16: 7.46},
        MM: {
            32: 10.26,
            64: 10.80,
            128: 11.19,
            256: 11.91,
            1024: 19.87,
            4096: 43.29,
            8192: 84.77,
            16384: 173.80,
        },
    },
}

Gate = Callable[[Tensor, Tensor], Any]  # logits, bias -> (weights, ids)

LL_GEMM_TOKENS = 16  # the most that vLLM's low-latency GEMM takes


def best_recorded(E: int, K: int, N: int) -> tuple[float, str] | None:
    """The best recorded peer's microseconds and name, where there is one."""
    for name, us in RECORDED.get((E, K), {}).items():
        if N in us:
            return us[N], name
    return None


def sglang_gate() -> Gate:
    """SGLang's gate."""
    gate = imported("sglang.jit_kernel.moe_fused_gate", "moe_fused_gate")
    return lambda logits, bias: gate(
        logits,
        bias,
        TOP_K,
        scoring_func="sqrtsoftplus",
        renormalize=True,
        routed_scaling_factor=FACTOR,
        apply_routed_scaling_factor_on_output=True,
    )


def vllm_gate() -> Gate:
    """vLLM's gate for DeepSeek-V4."""
    gate = imported("vllm.model_executor.layers.fused_moe.router.dsv4_topk", "dsv4_topk")
    return lambda logits, bias: gate(logits, bias, torch.int32, FACTOR)


def after_cublas(make: Callable[[], Gate]) -> Callable[[Problem], Call]:
    """cuBLAS, then a gate."""

    def router(problem: Problem) -> Call:
        gate = make()
        return lambda i: gate(cublas_logits(problem, i), problem.bias)

    return router


def vllm_low_latency(problem: Problem) -> Call:
    """vLLM's low-latency GEMM, then its gate."""
    gate = vllm_gate()
    gemm = imported("vllm.model_executor.kernels.linear.cute_dsl.ll_bf16", "ll_bf16_gemm")
    if problem.N > LL_GEMM_TOKENS:
        raise NotImplementedError(f"takes up to {LL_GEMM_TOKENS} tokens")
    return lambda i: gate(gemm(problem.xs[i], problem.Ws[i]), problem.bias)


def no_such_gate(package: str) -> Callable[[Problem], Call]:
    """A package that has top-k kernels but no gate of this scoring that could be called."""

    def make(problem: Problem) -> Call:
        imported(package)
        raise NotImplementedError("no sqrtsoftplus gate known")

    return make


def imported(module: str, name: str | None = None) -> Any:
    """A module of another package, or one of its names; `ImportError` says what is missing."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name == package:
            raise ImportError("not installed") from error
        raise
    return found if name is None else getattr(found, name)


PEERS: dict[str, Callable[[Problem], Call]] = {
    "cuBLAS + SGLang gate": after_cublas(sglang_gate),
    "cuBLAS + vLLM gate": after_cublas(vllm_gate),
    "vLLM LL GEMM + vLLM gate": vllm_low_latency,
    "FlashInfer": no_such_gate("flashinfer"),
    "QuACK": no_such_gate("quack"),
}
