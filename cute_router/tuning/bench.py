"""Whether a configuration's kernel is right for a router and a batch, and how long it takes.

right   as the self-test asks of a kernel: into poisoned outputs, held to the fp64 reference,
        the same bits again and from a CUDA graph; on random data, and on data full of ties
fast    the median time of its calls in a CUDA graph, weights and hidden states from memory
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cute_router import reference, selftest
from cute_router.selftest import timing, verdict
from cute_router.selftest.cases import FACTOR, RouterCase, Trial, padded
from cute_router.spec import RouterSpec, Routing

DISTINCT = 256  # hidden states of a batch; a larger one repeats them, for the reference is slow

# x, W, bias, weights, ids, factor: the launch of one configuration.
Launch = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], None]
Launcher = Callable[[Any, int], Launch]  # of a configuration, on a device


class Bench:
    """One router and batch size on one device; `launcher` compiles and loads configurations."""

    def __init__(self, spec: RouterSpec, tokens: int, device: torch.device, launcher: Launcher):
        self.spec = spec
        self.tokens = tokens
        self.device = device
        self.launcher = launcher

    def faults(self, config: Any) -> list[str]:
        """What is wrong with the results of a configuration."""
        launch = self.launcher(config, self.device.index)
        faults: list[str] = []
        for ties in (False, True):
            faults += selftest.examine(self.trial(launch, ties), self.device)
        return faults

    def us(self, config: Any) -> float:
        """The median microseconds of a call among others of its kind."""
        launch, (xs, Ws, bias, weights, ids) = (
            self.launcher(config, self.device.index),
            self.rotating,
        )

        def call(i: int) -> None:
            launch(xs[i % len(xs)], Ws[i % len(Ws)], bias, weights, ids, FACTOR)

        return timing.graph_us(call, max(timing.CALLS, len(Ws)))

    def settle(self) -> None:
        """Wait for the device; raises where a kernel has made it unusable."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def trial(self, launch: Launch, ties: bool) -> Trial:
        """A call of `launch`, and its judge."""
        x, W, bias, judge = self.batches[ties]

        def call(weights: Tensor, ids: Tensor) -> None:
            launch(x, W, bias, weights, ids, FACTOR)

        shape = self.tokens, self.spec.top_k
        return Trial(call, ((shape, torch.float32), (shape, torch.int32)), judge)

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor, Tensor | None, Callable[..., list[str]]]]:
        """Random data and data full of ties on the device, each with a judge of its routing."""
        return [self.batch(ties) for ties in (False, True)]

    def batch(self, ties: bool) -> tuple[Tensor, Tensor, Tensor | None, Callable[..., list[str]]]:
        """One of them. Of a large batch, its first and last tokens are judged."""
        s, N = self.spec, self.tokens
        case = RouterCase("dense_decode", s.num_experts, s.hidden_size, min(N, DISTINCT), ties=ties)
        x, W, drawn = case.draw()
        bias = drawn if s.has_bias else None
        logits, bound = reference.logits(x, W), reference.logit_error_bound(x, W)
        exact = ties | ~x.isfinite().all(-1)
        every = torch.arange(N)
        judged = every if N <= 2 * DISTINCT else torch.cat((every[:DISTINCT], every[-DISTINCT:]))
        rows = judged % DISTINCT
        truth = verdict.Logits(logits[rows], bound.nan_to_num(0, 0, 0)[rows], exact[rows])

        def judge(weights: Tensor, ids: Tensor) -> list[str]:
            return verdict.wrong_routing(
                Routing(weights[judged], ids[judged]),
                reference,
                truth,
                bias,
                top_k=s.top_k,
                scoring=s.scoring,
                renormalize=s.renormalize,
                n_group=s.n_group,
                topk_group=s.topk_group,
                routed_scaling_factor=FACTOR,
            )

        there = padded(x, self.device)
        if N > DISTINCT:
            there = there[every.to(self.device) % DISTINCT]
        return there, W.to(self.device), None if bias is None else bias.to(self.device), judge

    @cached_property
    def rotating(self) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor, Tensor]:
        """Hidden states and weights in enough sets that none stays in the L2 cache; outputs."""
        E, K, N = self.spec.num_experts, self.spec.hidden_size, self.tokens
        sets = timing.sets_past_l2(2 * K * (E + N), self.device)
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        Ws = [(normal(E, K) * K**-0.5).bfloat16() for _ in range(sets)]
        xs = [normal(N, K).bfloat16() for _ in range(sets)]
        bias = normal(E) * 0.1 if self.spec.has_bias else None
        weights = torch.empty(N, self.spec.top_k, device=self.device)
        ids = torch.empty(N, self.spec.top_k, dtype=torch.int32, device=self.device)
        torch.cuda.synchronize(self.device)  # kernels under dependent launch read W early
        return xs, Ws, bias, weights, ids
