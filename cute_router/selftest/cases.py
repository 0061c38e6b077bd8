"""What is tried: the kernels, their sizes and their data, from fixed seeds.

A case makes a `Trial` on a device: a call, the outputs that it fills, and the judge of them. Inputs
are drawn on the CPU and are the same on every machine.

    ties      whole numbers, whose sums fp32 holds exactly, so that equal scores are equal
    rows of NaN and of infinities are among all but the smallest batches
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cute_router import functional, reference
from cute_router.selftest import plain, verdict
from cute_router.spec import Routing, Scoring, TopK

FACTOR = 1.5
FLASH, PRO = (256, 4096), (384, 7168)  # DeepSeek-V4-Flash and -Pro: (E, K)
TIMED = [(E, K, N) for E, K in (FLASH, PRO) for N in (1, 8, 64)]
PADDING = 8  # elements between rows of x, which nobody may read into a sum
ONES_IN_A_TIE = 8  # so that activations of different logits stay far apart


class Trial(NamedTuple):
    """A call into given outputs, the outputs' shapes and dtypes, and what is wrong with them."""

    call: Callable[[Tensor, Tensor], Any]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    judge: Callable[[Tensor, Tensor], list[str]]


@dataclass(frozen=True)
class RouterCase:
    """`dense_decode`, or `activation_topk` of given logits."""

    kernel: Literal["dense_decode", "activation_topk"]
    E: int
    K: int
    N: int
    top_k: int = 6
    scoring: Scoring = "sqrtsoftplus"
    renormalize: bool = True
    n_group: int = 1
    topk_group: int = 1
    batch_invariant: bool = False
    ties: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """The case in a line."""
        parts = [f"{self.kernel} E={self.E}"]
        parts += [f"K={self.K}"] if self.kernel == "dense_decode" else []
        parts += [f"N={self.N} k={self.top_k} {self.scoring}"]
        parts += ["raw"] if not self.renormalize else []
        parts += [f"groups {self.topk_group}/{self.n_group}"] if self.n_group > 1 else []
        parts += ["batch_invariant"] if self.batch_invariant else []
        parts += ["ties" if self.ties else "fuzz", f"seed {self.seed}"]
        return " ".join(parts)

    def trial(self, device: torch.device, truth: ModuleType) -> Trial:
        """Inputs on the device, and the truth about them."""
        x, W, bias = self.draw()
        options: dict[str, Any] = {
            "top_k": self.top_k,
            "scoring": self.scoring,
            "renormalize": self.renormalize,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "routed_scaling_factor": FACTOR,
        }
        exact = self.ties | ~x.isfinite().all(-1)
        function: Callable[..., Any]
        inputs: tuple[Tensor, ...]
        if self.kernel == "dense_decode":
            logits = truth.logits(x, W)
            bound = reference.logit_error_bound(x, W)
            inputs = padded(x, device), W.to(device), bias.to(device)
            function = functional.dense_decode
        else:
            logits = plain.logits(x, W)
            bound = torch.zeros_like(logits)  # the kernel reads them as they are
            inputs = logits.to(device), bias.to(device)
            function = functional.activation_topk
        judged = verdict.Logits(logits, bound.nan_to_num(0, 0, 0), exact)

        def call(weights: Tensor, ids: Tensor) -> Any:
            return function(
                *inputs,
                **options,
                batch_invariant=self.batch_invariant,
                out_weights=weights,
                out_ids=ids,
            )

        shape = self.N, self.top_k
        return Trial(
            call,
            ((shape, torch.float32), (shape, torch.int32)),
            lambda weights, ids: verdict.wrong_routing(
                Routing(weights, ids), truth, judged, bias, **options
            ),
        )

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weights and bias."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        x, W, bias = normal(self.N, self.K), normal(self.E, self.K), normal(self.E)
        if self.ties:
            largest = x.abs().topk(ONES_IN_A_TIE, dim=1).values[:, -1:]
            x = x.sign() * (x.abs() >= largest)
            W, bias = W.sign() * (W.abs() > 0.5), bias.round() / 4
        else:
            W, bias = W * self.K**-0.5, bias * 0.1
        if self.N >= 4:
            x[1, 3], x[2, 5], x[-1, 0] = torch.nan, torch.inf, -torch.inf
        return x.bfloat16(), W.bfloat16(), bias


@dataclass(frozen=True)
class TopKCase:
    """`topk` of rows with ties, NaN, infinities and zeros of both signs."""

    rows: int
    L: int
    k: int
    dtype: torch.dtype = torch.float32
    ragged: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """The case in a line."""
        dtype = str(self.dtype).removeprefix("torch.")
        ragged = " ragged" if self.ragged else ""
        return f"topk {self.rows}x{self.L} k={self.k} {dtype}{ragged} seed {self.seed}"

    def trial(self, device: torch.device, truth: ModuleType) -> Trial:
        """Scores on the device, and the truth about them."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.randn(self.rows, self.L, generator=generator)
        scores[1::2] = (scores[1::2] * 4).round() / 4  # many equals, and zeros of both signs
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        for value in special:
            at = torch.randint(self.L, (self.rows, 2), generator=generator)
            scores.scatter_(1, at, value.item())
        scores = scores.to(self.dtype)
        lengths = None
        if self.ragged:
            lengths = torch.randint(self.L + 1, (self.rows,), generator=generator)
            lengths[0] = self.k - 1
        wanted = truth.topk(scores, self.k, lengths)
        there = scores.to(device)
        counts = None if lengths is None else lengths.to(device)
        shape = self.rows, self.k
        return Trial(
            lambda values, indices: functional.topk(
                there, self.k, lengths=counts, out=(values, indices)
            ),
            ((shape, self.dtype), (shape, torch.int64)),
            lambda values, indices: verdict.wrong_topk(TopK(values, indices), wanted),
        )


@dataclass(frozen=True)
class HashCase:
    """`hash_route`, with equal weights or, where K is given, weighed by the gate."""

    N: int
    K: int | None = None
    E: int = 256
    top_k: int = 6
    seed: int = 0

    @property
    def name(self) -> str:
        """The case in a line."""
        gate = "equal weights" if self.K is None else f"E={self.E} K={self.K}"
        return f"hash_route N={self.N} k={self.top_k} {gate} seed {self.seed}"

    def trial(self, device: torch.device, truth: ModuleType) -> Trial:
        """Tokens and a table on the device, some of them outside their range, and the truth."""
        vocab = 1000
        generator = torch.Generator().manual_seed(self.seed)
        table = torch.randint(self.E, (vocab, self.top_k), generator=generator, dtype=torch.int32)
        tokens = torch.randint(vocab, (self.N,), generator=generator)
        if self.N >= 4:
            tokens[1], tokens[2] = vocab, -1
            table[tokens[3], :2] = torch.tensor([-1, self.E], dtype=torch.int32)
        x = W = None
        if self.K is not None:
            x = torch.randn(self.N, self.K, generator=generator).bfloat16()
            W = (torch.randn(self.E, self.K, generator=generator) * self.K**-0.5).bfloat16()
        wanted = truth.hash_route(tokens, table, x=x, W=W, routed_scaling_factor=FACTOR)
        there = tokens.to(device), table.to(device)
        gate = {} if x is None or W is None else {"x": x.to(device), "W": W.to(device)}

        def call(weights: Tensor, ids: Tensor) -> Any:
            return functional.hash_route(
                *there, **gate, routed_scaling_factor=FACTOR, out_weights=weights, out_ids=ids
            )

        shape = self.N, self.top_k
        return Trial(
            call,
            ((shape, torch.float32), (shape, torch.int32)),
            lambda weights, ids: verdict.wrong_lookup(Routing(weights, ids), wanted, FACTOR),
        )


Case = RouterCase | TopKCase | HashCase


def padded(x: Tensor, device: torch.device) -> Tensor:
    """x on the device with NaN between its rows."""
    N, K = x.shape
    storage = torch.full((N, K + PADDING), torch.nan, dtype=x.dtype, device=device)
    storage[:, :K] = x.to(device)
    return storage[:, :K]


def dense(E: int, K: int, N: int, *options: Any, **more: Any) -> RouterCase:
    """A case of `dense_decode`."""
    return RouterCase("dense_decode", E, K, N, *options, **more)


def gate(E: int, N: int, *options: Any, **more: Any) -> RouterCase:
    """A case of `activation_topk`; the logits come from a small product."""
    return RouterCase("activation_topk", E, 64, N, *options, **more)


# As few kernels as touch every one of them: cases of equal sizes share theirs.
QUICK: list[Case] = [
    *(dense(*size, ties=ties, seed=size[2]) for size in TIMED for ties in (False, True)),
    dense(300, 264, 17),
    gate(256, 64),
    gate(256, 64, ties=True),
    TopKCase(64, 256, 8),
    TopKCase(5, 1000, 32, torch.bfloat16, ragged=True),
    TopKCase(3, 8192, 512),
    TopKCase(2, 131072, 2048, torch.bfloat16, ragged=True),
    HashCase(64),
    HashCase(8, 4096),
]

# What else the kernels branch on.
MORE: list[Case] = [
    *(dense(*FLASH, N, seed=100 + N) for N in range(1, 9)),
    *(dense(*PRO, N, ties=N % 2 == 1, seed=200 + N) for N in (2, 3, 5, 16, 31, 33, 63)),
    dense(*FLASH, 65),
    dense(*FLASH, 200, batch_invariant=True),
    dense(*FLASH, 8, ties=True, batch_invariant=True),
    dense(256, 7168, 8, 8, "sigmoid", True, 8, 4),
    dense(256, 7168, 64, 8, "sigmoid", True, 8, 4),
    dense(160, 5120, 17, 8, "softmax"),
    dense(256, 512, 5, 6, "softmax", False),
    dense(384, 512, 9, 6, "sigmoid", ties=True),
    dense(7, 64, 3, 2, renormalize=False),
    dense(1024, 4096, 20, 32),
    dense(384, 32768, 3),
    gate(384, 1),
    gate(384, 8192, seed=1),
    gate(300, 17, 8, "softmax"),
    gate(256, 33, 8, "sigmoid", True, 8, 4),
    gate(256, 33, 8, "sigmoid", ties=True),
    gate(1024, 5, 32, renormalize=False),
    *(TopKCase(17, L, min(L, 32), ragged=L > 32) for L in (1, 33, 257, 1024)),
    TopKCase(2048, 256, 6, torch.float16),
    TopKCase(2, 5000, 4096),
    TopKCase(64, 16384, 256, torch.float16),
    TopKCase(2, 1 << 20, 2048),
    HashCase(1, 7168, 384),
    HashCase(64, 4096, seed=1),
    HashCase(2000, 512),
    HashCase(1000, top_k=5),
]
