"""Selection by itself: top-k of scores, gates on given logits, routing by a table.

    python benchmarks/selection.py
    python benchmarks/selection.py --only topk gate --json out.json

What is timed is first held to the reference, then timed (`timing.replay_us`): in a graph of calls
that follow one another, ours under programmatic dependent launch. Tensors rotate past the L2 cache,
as far as MOST_SETS of them do; smaller ones are in it, as logits are that were just written.

    topk 64x256 k=6 fp32 | 1.90 us | 0.15x torch | 0.09x FlashInfer sorted (recorded 20.90 us) | ...
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contest import OURS, contest, made, misrouted, write_report
from peers import RECORDED_ON
from problem import FACTOR, FLASH, PRO, TOP_K, Call, make_problem, random_weights
from selection_peers import (
    GATE_MAKERS,
    GATES,
    QUACK,
    TOPK,
    on_logits,
    quack,
    recorded_gate,
    recorded_topk,
)
from timing import buffers_for, environment
from torch import Tensor

from cute_router import activation_topk, dense_decode, hash_route, reference, topk
from cute_router.topk.hash import aligned_vector
from cute_router.topk.hash_config import HashConfig

MOST_SETS = 40
VOCAB = 129_280  # tokens of DeepSeek-V4's table
HASH_TOKENS = (1, 64, 8192, 65536)
GATED_TOKENS = 8
TORCH, DENSE = "torch", "dense_decode"


@dataclass
class Result:
    """What was measured at one point, and what peers once took there, in microseconds."""

    point: str
    us: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)  # name -> why
    recorded: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The result as one line: every ratio is of our time to another."""
        ours = self.us[OURS]
        parts = [self.point, f"{ours:.2f} us"]
        for name, us in self.us.items():
            if name != OURS:
                parts.append(f"{ours / us:.2f}x {name} ({us:.2f} us)")
        for name, us in self.recorded.items():
            parts.append(f"{ours / us:.2f}x {name} (recorded {us:.2f} us)")
        return " | ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "point": self.point,
            "us": {name: round(us, 3) for name, us in self.us.items()},
            "absent": self.absent,
            "recorded_us": self.recorded,
        }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Time top-k, gates and routing by a table.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--commit", help="the commit, where this is not a git checkout")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/selection.py needs a CUDA device; there is none")
    torch.manual_seed(0)
    where = environment(args.commit)
    print(" | ".join(f"{name} {value}" for name, value in where.items()), end="\n\n")

    results: list[Result] = []
    for part in args.only:
        for result in PARTS[part]():
            results.append(result)
            print(result.line(), flush=True)
        print()
    for name, why in dict.fromkeys(item for r in results for item in r.absent.items()):
        print(f"{name}: absent ({why})")
    if args.json:
        parts = [result.as_dict() for result in results]
        write_report(args.json, where, recorded_peers=RECORDED_ON, results=parts)
    return 0


def sets_of(nbytes: int) -> int:
    """How many sets of tensors of this size the calls rotate through."""
    return min(MOST_SETS, buffers_for(nbytes))


# --- top-k --------------------------------------------------------------------------------------


def topk_results() -> Iterator[Result]:
    """All points of the recorded table."""
    for rows, length, k in TOPK:
        yield topk_result(rows, length, k)


def topk_result(rows: int, length: int, k: int) -> Result:
    """torch's stable order to the bit from ours, its values from torch, most of them from QuACK."""
    sets = sets_of(4 * rows * length)
    scores = [torch.randn(rows, length, device="cuda") for _ in range(sets)]
    out = (
        torch.empty(rows, k, device="cuda"),
        torch.empty(rows, k, dtype=torch.int64, device="cuda"),
    )
    calls: dict[str, Call] = {
        OURS: lambda i: topk(scores[i], k, out=out),
        TORCH: lambda i: torch.topk(scores[i], k),
    }
    peers, absent = made({QUACK: quack}, scores, k)

    def wrong(name: str, found: tuple[Tensor, Tensor], i: int) -> str | None:
        ordered = torch.sort(scores[i], dim=-1, descending=True, stable=True)
        values, indices = (t[:, :k] for t in ordered)
        if name == OURS and not torch.equal(found[1], indices):
            return "indices of another order"
        if name == QUACK:  # of its values the last bits are missing
            near = (scores[i].gather(1, found[1].long()) - values).abs() <= 1e-3 * values.abs()
            return None if near.all() else "entries that are not among the best"
        return None if torch.equal(found[0], values) else "other values"

    us, failed = contest(calls | peers, wrong, sets)
    point = f"topk {rows}x{length} k={k} fp32"
    return Result(point, us, absent | failed, recorded_topk(rows, length, k))


# --- gates --------------------------------------------------------------------------------------


def gate_results() -> Iterator[Result]:
    """All points of the recorded table."""
    for E, by_tokens in GATES.items():
        for N in by_tokens:
            yield gate_result(E, N)


def gate_result(E: int, N: int) -> Result:
    """The step behind the product."""
    sets = sets_of(4 * N * E)
    logits = [torch.randn(N, E, device="cuda") for _ in range(sets)]
    bias = torch.randn(E, device="cuda") * 0.1
    weights, ids = outputs(N)
    calls: dict[str, Call] = {
        OURS: lambda i: activation_topk(
            logits[i],
            bias,
            top_k=TOP_K,
            routed_scaling_factor=FACTOR,
            out_weights=weights,
            out_ids=ids,
        ),
        TORCH: lambda i: eager_gate(logits[i], bias),
    }
    makers = {name: on_logits(make) for name, make in GATE_MAKERS.items()}
    peers, absent = made(makers, logits, bias)
    us, failed = contest(
        calls | peers, lambda _, found, i: misrouted(found, logits[i].double(), bias), sets
    )
    point = f"gate N={N} E={E} k={TOP_K} fp32"
    return Result(point, us, absent | failed, recorded_gate(E, N))


def eager_gate(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gate in torch operations."""
    a = torch.nn.functional.softplus(logits).sqrt()
    ids = (a + bias).topk(TOP_K, dim=-1).indices
    weights = a.gather(-1, ids)
    return weights / weights.sum(-1, keepdim=True) * FACTOR, ids.int()


def outputs(N: int) -> tuple[Tensor, Tensor]:
    """Tensors for weights and ids."""
    shape = (N, TOP_K)
    return torch.empty(shape, device="cuda"), torch.empty(shape, dtype=torch.int32, device="cuda")


# --- routing by a table -------------------------------------------------------------------------


def hash_results() -> Iterator[Result]:
    """Equal weights, and DeepSeek-V4's form."""
    for N in HASH_TOKENS:
        yield uniform_result(N)
    for E, K in (FLASH, PRO):
        yield gated_result(E, K)


def tokens_and_tables(N: int, E: int, sets: int) -> tuple[list[Tensor], list[Tensor]]:
    """Random token ids and tables, both int64."""
    tokens = [torch.randint(VOCAB, (N,), device="cuda") for _ in range(sets)]
    tables = [torch.randint(E, (VOCAB, TOP_K), device="cuda") for _ in range(sets)]
    return tokens, tables


def uniform_result(N: int) -> Result:
    """Equal weights, beside an empty kernel of the same grid."""
    from empty import empty_us  # needs the kernel compiler

    sets = sets_of(8 * VOCAB * TOP_K)
    tokens, tables = tokens_and_tables(N, 256, sets)
    weights, ids = outputs(N)
    calls: dict[str, Call] = {
        OURS: lambda i: hash_route(
            tokens[i], tables[i], routed_scaling_factor=FACTOR, out_weights=weights, out_ids=ids
        ),
        TORCH: lambda i: eager_hash(tokens[i], tables[i]),
    }

    def wrong(_: str, found: tuple[Tensor, Tensor], i: int) -> str | None:
        right = reference.hash_route(tokens[i], tables[i], routed_scaling_factor=FACTOR)
        return None if all(map(torch.equal, found, right)) else "other weights or ids"

    us, absent = contest(calls, wrong, sets)
    config = HashConfig(TOP_K, "sm_90a", vector=aligned_vector(TOP_K, tables[0].itemsize))
    ctas, threads = -(-N // config.tokens), config.tokens * config.row_threads
    us[f"an empty kernel of {ctas} CTAs x {threads}"] = empty_us(ctas, threads)
    return Result(f"hash N={N} k={TOP_K} int64, equal weights", us, absent)


def eager_hash(token_ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Equal weights in torch operations."""
    ids = table[token_ids].int()
    return torch.full(ids.shape, FACTOR / TOP_K, device=ids.device), ids


def gated_result(E: int, K: int) -> Result:
    """The table chooses and the gate weighs, beside the dense router of the same W and x."""
    problem = make_problem(random_weights(E, K), GATED_TOKENS)
    sets = len(problem.Ws)
    tokens, tables = tokens_and_tables(problem.N, E, sets)
    out = dict(zip(("out_weights", "out_ids"), outputs(problem.N), strict=True))
    options = {"routed_scaling_factor": FACTOR} | out
    calls: dict[str, Call] = {
        OURS: lambda i: hash_route(
            tokens[i], tables[i], x=problem.xs[i], W=problem.Ws[i], **options
        ),
        DENSE: lambda i: dense_decode(problem.xs[i], problem.Ws[i], problem.bias, **options),
    }

    def wrong(name: str, found: tuple[Tensor, Tensor], i: int) -> str | None:
        x, W = problem.xs[i], problem.Ws[i]
        if name == DENSE:
            bound = reference.logit_error_bound(x, W)
            return misrouted(found, reference.logits(x, W), problem.bias, bound)
        right = reference.hash_route(tokens[i], tables[i], x=x, W=W, routed_scaling_factor=FACTOR)
        if not torch.equal(found[1], right.ids):
            return "other ids"
        off = float((found[0] - right.weights).abs().max())
        return None if off <= 1e-5 * FACTOR else f"weights differ by {off:.1e}"

    us, absent = contest(calls, wrong, sets)
    return Result(f"hash N={problem.N} E={E} K={K} k={TOP_K} bf16, weighed by the gate", us, absent)


PARTS: dict[str, Callable[[], Iterator[Result]]] = {
    "topk": topk_results,
    "gate": gate_results,
    "hash": hash_results,
}

if __name__ == "__main__":
    sys.exit(main())
