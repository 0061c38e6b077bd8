"""The whole router, hidden states to experts, beside its peers and the floor under it.

    python benchmarks/router.py
    python benchmarks/router.py --shapes 256x4096 --tokens 1 8 64 --json out.json --plot out.png

For every shape and number of tokens N: what is timed is first held to the fp64 reference, then
timed by `timing.graph_us`. A line says what was reached,

    N=8 E=256 K=4096 k=6 bf16 | 2.60 us | 2.1x W-stream | 0.46x best recorded peer (...) | ...

and a table beside it gives every contender. A peer that is not installed is named as absent.
"""

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from contest import OURS, contest, made, misrouted, write_report
from peers import PEERS, RECORDED_ON, best_recorded
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
from timing import environment, graph_us, host_us
from torch import Tensor

from cute_router import Routing, activation_topk, dense_decode, reference

TOKENS = (1, 2, 4, 8, 16, 32, 64)
EAGER, COMPILED = "eager", "torch.compile"
CUBLAS, OWN_GATE, FLOOR = "cuBLAS GEMM alone", "cuBLAS + own gate", "W-stream, no PDL"
RECORDED = "best recorded peer"


@dataclass
class Result:
    """What was measured at one shape and N, in microseconds."""

    E: int
    K: int
    N: int
    us: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # name -> why
    chain_us: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The result as one line."""
        ours = self.us[OURS]
        parts = [f"N={self.N} E={self.E} K={self.K} k={TOP_K} bf16", f"{ours:.2f} us"]
        if FLOOR in self.us:
            parts.append(f"{ours / self.us[FLOOR]:.1f}x W-stream")
        if self.recorded:
            us, name = self.recorded
            parts.append(f"{ours / us:.2f}x {RECORDED} ({name} {us:.2f} us)")
        if EAGER in self.us:
            parts.append(f"{ours / self.us[EAGER]:.2f}x eager")
        if self.chain_us:
            parts.append(f"{self.chain_us['added']:.2f} us added to a chain")
        return " | ".join(parts)

    @property
    def times(self) -> dict[str, float]:
        """What was measured, and the best recorded peer beside it."""
        return self.us | ({RECORDED: self.recorded[0]} if self.recorded else {})

    @property
    def recorded(self) -> tuple[float, str] | None:
        """The best recorded peer, where there is one."""
        return best_recorded(self.E, self.K, self.N)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        recorded = self.recorded
        return {
            "E": self.E,
            "K": self.K,
            "N": self.N,
            "k": TOP_K,
            "us": {name: round(us, 3) for name, us in self.us.items()},
            "absent": self.absent,
            "chain_us": {name: round(us, 3) for name, us in self.chain_us.items()},
            "best_recorded_peer": recorded and {"us": recorded[0], "name": recorded[1]},
        }


def main() -> int:
    """Measure, print, write."""
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/router.py needs a CUDA device; there is none")
    from floor import w_stream_us  # needs Triton, which only comes with CUDA builds of torch

    torch.manual_seed(0)
    where = environment(args.commit)
    print(" | ".join(f"{name} {value}" for name, value in where.items()), end="\n\n")

    results = []
    host: dict[str, dict[str, float]] = {}
    for E, K in args.shapes:
        Ws = random_weights(E, K)
        floor = w_stream_us(Ws)
        for N in args.tokens:
            problem = make_problem(Ws, N)
            result = measure(problem, floor, compiled=not args.no_compile)
            if args.chain:
                result.chain_us = chain(problem)
            results.append(result)
            print(result.line(), flush=True)
        host[f"{E}x{K}"] = host_cost(make_problem(Ws, 1))
        for how, us in host[f"{E}x{K}"].items():
            print(f"N=1 E={E} K={K} k={TOP_K} bf16 | host {us:.2f} us per eager call, {how}")
        print()

    print(table(results))
    if args.json:
        write_report(
            args.json,
            where,
            best_recorded_peer=RECORDED_ON,
            results=[result.as_dict() for result in results],
            host_us=host,
        )
    if args.plot:
        plot(results, f"{where['gpu']}, {where['date']}", args.plot)
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


def measure(problem: Problem, floor: float, compiled: bool) -> Result:
    """Check and time every contender."""
    routers, absent = contenders(problem, compiled)
    us, failed = contest(
        routers, lambda _, found, i: disagreement(found, problem, i), len(problem.Ws)
    )
    result = Result(problem.E, problem.K, problem.N, us, absent | failed)
    result.us[CUBLAS] = graph_us(lambda i: cublas_logits(problem, i), len(problem.Ws))
    result.us[FLOOR] = floor
    return result


def contenders(problem: Problem, compiled: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """Routers to time, each a call that returns (weights, ids) for set i; and the absent ones."""
    calls: dict[str, Call] = {
        OURS: ours(problem),
        EAGER: lambda i: eager_router(problem.xs[i], problem.Ws[i], problem.bias),
    }
    absent: dict[str, str] = {}
    if compiled:
        # A fresh start for each N: dynamo would give up on the function after a few shapes.
        torch.compiler.reset()
        router = torch.compile(eager_router, mode="max-autotune-no-cudagraphs", dynamic=False)
        calls[COMPILED] = lambda i: router(problem.xs[i], problem.Ws[i], problem.bias)
    else:
        absent[COMPILED] = "left out (--no-compile)"
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
    """`dense_decode` into tensors that are already there, as an engine calls it."""
    weights, ids = outputs(problem)

    def call(i: int) -> Routing:
        return dense_decode(
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


def host_cost(problem: Problem) -> dict[str, float]:
    """What a call costs the calling thread."""
    call = ours(problem)
    x, W = problem.xs[0], problem.Ws[0]

    def allocating() -> Routing:
        return dense_decode(x, W, problem.bias, routed_scaling_factor=FACTOR)

    return {"outputs given": host_us(lambda: call(0)), "outputs allocated": host_us(allocating)}


# --- correctness --------------------------------------------------------------------------------


def disagreement(result: tuple[Tensor, Tensor], problem: Problem, i: int) -> str | None:
    """What is wrong with the routing of set i, or None."""
    x, W = problem.xs[i], problem.Ws[i]
    bound = reference.logit_error_bound(x, W)
    return misrouted(result, reference.logits(x, W), problem.bias, bound)


# --- what is shown ------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """All times, a row for each contender and a column for each N."""
    lines = []
    for E, K in dict.fromkeys((r.E, r.K) for r in results):
        rows = [r for r in results if (r.E, r.K) == (E, K)]
        lines.append(f"E={E} K={K} k={TOP_K}, us per call")
        lines.append(f"{'N':28}" + "".join(f"{r.N:>9}" for r in rows))
        for name in dict.fromkeys(name for r in rows for name in r.times):
            cells = (f"{r.times[name]:9.2f}" if name in r.times else f"{'-':>9}" for r in rows)
            lines.append(f"{name:28}" + "".join(cells))
        for name in dict.fromkeys(name for r in rows for name in r.absent):
            reasons: dict[str, list[str]] = {}
            for r in rows:
                if name in r.absent:
                    reasons.setdefault(r.absent[name], []).append(str(r.N))
            for reason, at in reasons.items():
                where = "" if len(at) == len(rows) else f" at N={','.join(at)}"
                lines.append(f"{name}: absent{where} ({reason})")
        lines.append("")
    return "\n".join(lines)


STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#d1495b", "linewidth": 2.6, "marker": "o", "zorder": 5},
    RECORDED: {"color": "#30638e", "marker": "s"},
    CUBLAS: {"color": "#6c9a8b", "marker": "^"},
    EAGER: {"color": "#8d8d8d", "marker": "D"},
    COMPILED: {"color": "#b9b9b9", "marker": "v"},
    FLOOR: {"color": "#222222", "linestyle": (0, (4, 3)), "linewidth": 1.2},
}


def plot(results: list[Result], title: str, path: Path) -> None:
    """Draw a panel for each shape: time over N, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    shapes = list(dict.fromkeys((r.E, r.K) for r in results))
    figure, panels = pyplot.subplots(
        nrows=1,
        ncols=len(shapes),
        figsize=(6.2 * len(shapes), 5.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (E, K) in zip(panels[0], shapes, strict=True):
        rows = sorted((r for r in results if (r.E, r.K) == (E, K)), key=lambda r: r.N)
        for name, style in STYLES.items():
            points = [(r.N, r.times[name]) for r in rows if name in r.times]
            if points:
                label = f"{name} floor" if name == FLOOR else name
                panel.plot(*zip(*points, strict=True), label=label, markersize=5, **style)
        for r in rows:
            panel.annotate(
                f"{r.us[OURS]:.1f}",
                (r.N, r.us[OURS]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=STYLES[OURS]["color"],
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator([r.N for r in rows]))
        panel.xaxis.set_minor_locator(NullLocator())
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_xlabel("tokens N")
        panel.set_title(f"E={E}, K={K}, top {TOP_K}", loc="left", fontsize=11)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("microseconds per call")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"MoE router: hidden states to experts  ({title})", x=0.01, ha="left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
