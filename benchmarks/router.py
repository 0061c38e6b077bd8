"""The whole router, hidden states to experts, beside its peers and the floors under it.

    python benchmarks/router.py
    python benchmarks/router.py --shapes 256x4096 --tokens 1 8 64 --json out.json --plot out.png

For every shape and number of tokens N: what is timed is first held to the fp64 reference, then
timed, contenders in turns (`timing.replay_us`). A line says what was reached,

    N=8 E=256 K=4096 k=6 bf16 | dense_decode | 2.60 us | 6.45 TFLOP/s | 2.1x W-stream | 0.46x best
    recorded peer (...) | mark 0.8: met | 0.37x cuBLAS GEMM alone | aim 1: met | ...

and a table beside it gives every contender. A peer that is not installed is named as absent. What
is timed of this package is `dense_decode` up to 64 tokens, and `route` from there on.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contest import OURS, contest, made, misrouted, write_report
from peers import PEERS, RECORDED_ON
from problem import (
    FACTOR,
    FLASH,
    PRO,
    TOP_K,
    Call,
    Problem,
    cublas_logits,
    make_problem,
    random_weights,
)
from router_plot import plot, title
from router_result import (
    COMPILED,
    CUBLAS,
    EAGER,
    FEW_TOKENS,
    FLOOR,
    OWN_GATE,
    PEAK_TFLOP_S,
    Result,
    floors,
    summary,
    table,
)
from timing import environment, graph_us
from torch import Tensor

from cute_router import Routing, activation_topk, dense_decode, reference, route
from cute_router.eager import dense_backend

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192, 16384)
ROWS_CHECKED = 512  # of a call's: a few in every CTA's tile, up to 16,384 tokens and beyond


def main() -> int:
    """Measure, print, write."""
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/router.py needs a CUDA device; there is none")
    # Needs Triton, which only comes with CUDA builds of torch.
    from floor import bandwidth_tb_s, stream_us

    torch.manual_seed(0)
    where = environment(args.commit)
    print(" | ".join(f"{name} {value}" for name, value in where.items()))
    bandwidth = bandwidth_tb_s()
    print(f"floors: memory read at {bandwidth:.2f} TB/s, {PEAK_TFLOP_S} TFLOP/s bf16", end="\n\n")

    results = []
    for E, K in args.shapes:
        Ws = random_weights(E, K)
        w_stream = stream_us(Ws)
        for N in args.tokens:
            problem = make_problem(Ws, N)
            result = measure(problem, w_stream, bandwidth, compiled=not args.no_compile)
            if args.chain:
                result.chain_us = chain(problem)
            results.append(result)
            print(result.line(), flush=True)
        print()

    print(table(results))
    print(summary(results))
    if args.json:
        write_report(
            args.json,
            where,
            best_recorded_peer=RECORDED_ON,
            floors={"bandwidth_tb_s": round(bandwidth, 3), "peak_tflop_s": PEAK_TFLOP_S},
            results=[result.as_dict() for result in results],
        )
    if args.plot:
        plot(results, title(where), args.plot)
    return 0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the router, its peers and the floor.")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[FLASH, PRO], metavar="ExK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--plot", type=Path, help="draw the times here (needs the plot extra)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--chain", action="store_true", help="also time it behind a small kernel")
    parser.add_argument("--commit", help="the commit, where this is not a git checkout")
    return parser.parse_args()


def shape(text: str) -> tuple[int, int]:
    """(E, K) from "256x4096"."""
    E, _, K = text.partition("x")
    return int(E), int(K)


# --- what is measured ---------------------------------------------------------------------------


def measure(problem: Problem, w_stream: float, bandwidth: float, compiled: bool) -> Result:
    """Check and time every contender."""
    E, K, N = problem.E, problem.K, problem.N
    routers, absent = contenders(problem, compiled)
    product: dict[str, Call] = {CUBLAS: lambda i: cublas_logits(problem, i)}

    def wrong(name: str, found: Any, i: int) -> str | None:
        judge = miscalculated if name == CUBLAS else disagreement
        return judge(found, problem, i)

    us, failed = contest(routers | product, wrong, len(problem.Ws))
    if N <= FEW_TOKENS:
        us[FLOOR] = w_stream
    subject = subject_of(problem.xs[0], problem.Ws[0])
    return Result(E, K, N, subject, us, floors(E, K, N, bandwidth), absent | failed)


def subject_of(x: Tensor, W: Tensor) -> str:
    """What `ours` calls for these tensors, and whose kernel that is."""
    if x.shape[0] <= FEW_TOKENS:
        return "dense_decode"
    return f"route ({dense_backend(x, W).removeprefix('gemm.')} kernel)"


def contenders(problem: Problem, compiled: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """Routers to time, each a call that returns (weights, ids) for set i; and the absent ones."""
    calls: dict[str, Call] = {
        OURS: ours(problem),
        EAGER: lambda i: eager_router(problem.xs[i], problem.Ws[i], problem.bias),
    }
    absent: dict[str, str] = {}
    if compiled and problem.N <= FEW_TOKENS:
        # A fresh start for each N: dynamo would give up on the function after a few shapes.
        torch.compiler.reset()
        router = torch.compile(eager_router, mode="max-autotune-no-cudagraphs", dynamic=False)
        calls[COMPILED] = lambda i: router(problem.xs[i], problem.Ws[i], problem.bias)
    else:
        absent[COMPILED] = (
            f"up to {FEW_TOKENS} tokens only" if compiled else "left out (--no-compile)"
        )
    calls[OWN_GATE] = cublas_and_own_gate(problem)
    peers, missing = made(PEERS, problem)
    return calls | peers, absent | missing


def outputs(problem: Problem) -> tuple[Tensor, Tensor]:
    """Tensors for a router's weights and ids."""
    shape, device = (problem.N, TOP_K), problem.bias.device
    return torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int32, device=device)


def cublas_and_own_gate(problem: Problem) -> Call:
    """What `dense_decode` is on other GPUs: `torch.mm` to fp32 logits, then the gate kernel."""
    weights, ids = outputs(problem)
    return lambda i: activation_topk(
        cublas_logits(problem, i),
        problem.bias,
        top_k=TOP_K,
        routed_scaling_factor=FACTOR,
        out_weights=weights,
        out_ids=ids,
    )


def ours(problem: Problem) -> Call:
    """The router into tensors that are already there, as an engine calls it."""
    weights, ids = outputs(problem)
    router = dense_decode if problem.N <= FEW_TOKENS else route

    def call(i: int) -> Routing:
        return router(
            problem.xs[i],
            problem.Ws[i],
            problem.bias,
            top_k=TOP_K,
            routed_scaling_factor=FACTOR,
            out_weights=weights,
            out_ids=ids,
        )

    return call


def eager_router(x: Tensor, W: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The router in torch operations."""
    a = torch.nn.functional.softplus(torch.mm(x, W.t(), out_dtype=torch.float32)).sqrt()
    ids = (a + bias).topk(TOP_K, dim=-1).indices
    weights = a.gather(-1, ids)
    return weights / weights.sum(-1, keepdim=True) * FACTOR, ids.int()


def chain(problem: Problem) -> dict[str, float]:
    """What a call adds behind a small kernel that writes its x: nearer to a model than a loop."""
    sources = problem.xs
    problem = replace(problem, xs=[torch.empty_like(x) for x in sources])
    call = ours(problem)

    def write(i: int) -> Tensor:
        return torch.mul(sources[i], 1, out=problem.xs[i])  # a kernel; `copy_` is a memcpy node

    def write_and_route(i: int) -> Routing:
        write(i)
        return call(i)

    both = graph_us(write_and_route, len(sources))
    alone = graph_us(write, len(sources))
    return {"with": both, "without": alone, "added": both - alone}


# --- correctness --------------------------------------------------------------------------------


def miscalculated(logits: Tensor, problem: Problem, i: int) -> str | None:
    """What is wrong with cuBLAS's logits of set i, or None; of many tokens only some are judged."""
    rows, exact, bound = judged(problem, i)
    bound = 4 * bound  # of sums longer than those that ours are held to
    off = int(((logits[rows] - exact).abs() > bound).sum())
    return f"{off} logits differ by more than {bound.max():.1e}" if off else None


def disagreement(result: tuple[Tensor, Tensor], problem: Problem, i: int) -> str | None:
    """What is wrong with the routing of set i, or None; of many tokens only some are judged."""
    weights, ids = result
    if weights.shape != ids.shape or len(ids) != problem.N:
        return f"results of shapes {tuple(weights.shape)} and {tuple(ids.shape)}"
    rows, exact, bound = judged(problem, i)
    return misrouted((weights[rows], ids[rows]), exact, problem.bias, bound)


def judged(problem: Problem, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of set i that are judged, their fp64 logits, and how far fp32 ones may be off."""
    rows = rows_checked(problem.N).to(problem.bias.device)
    x, W = problem.xs[i][rows], problem.Ws[i]
    return rows, reference.logits(x, W), reference.logit_error_bound(x, W)


def rows_checked(N: int) -> Tensor:
    """All N rows, or `ROWS_CHECKED` of them at equal distances, the first and the last among them.

    In whole numbers: a float has not the digits to end at N - 1 with certainty.
    """
    count = min(N, ROWS_CHECKED)
    return torch.arange(count) * (N - 1) // max(count - 1, 1)


if __name__ == "__main__":
    sys.exit(main())
