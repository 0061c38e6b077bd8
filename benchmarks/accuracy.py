"""How far activations in fp32 lie from fp64, over the range where fp32 has them: ours and torch's.

    python benchmarks/accuracy.py

Prints the rows of the tables of docs/accuracy.md. Ours are weights of `activation_topk` for one
expert that is not renormalised; torch's are its own operations on the same fp32 logits.
"""

import sys

import torch
from timing import environment
from torch import Tensor

from cute_router import activation_topk, reference
from cute_router.spec import Scoring

POINTS = 1 << 22  # in each range
NORMAL = torch.finfo(torch.float32).tiny  # the least number of full precision
RANGES: dict[Scoring, list[tuple[float, float]]] = {
    "sqrtsoftplus": [
        (-206, -174),
        (-174, -100),
        (-100, -87),
        (-87, -15),
        (-15, -5),
        (-5, 0),
        (0, 10),
        (10, 200),
    ],
    "sigmoid": [(-100, -87), (-87, -15), (-15, -5), (-5, 0), (0, 10), (10, 200)],
}
EDGES = (float("inf"), -float("inf"), float("nan"), 0.0)


def main() -> int:
    """Measure and print."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/accuracy.py needs a CUDA device; there is none")
    where = environment()
    print(" | ".join(f"{name} {value}" for name, value in where.items()), end="\n\n")
    for scoring, ranges in RANGES.items():
        print(f"| {scoring} of | ours | torch fp32 |\n|---|---|---|")
        for low, high in ranges:
            logits = torch.linspace(low, high, POINTS, dtype=torch.float64, device="cuda").float()
            print(f"| [{low}, {high}] | {row(scoring, logits)} |")
        edges = ours(scoring, torch.tensor(EDGES, device="cuda")).tolist()
        print(", ".join(f"{at} -> {a:.9g}" for at, a in zip(EDGES, edges, strict=True)), end="\n\n")
    return 0


def row(scoring: Scoring, logits: Tensor) -> str:
    """The errors of both, as cells."""
    exact = reference.activations(logits, scoring)
    return " | ".join(error(how(scoring, logits), exact) for how in (ours, torchs))


def ours(scoring: Scoring, logits: Tensor) -> Tensor:
    """Activations by the gate kernel."""
    routing = activation_topk(logits[:, None], top_k=1, scoring=scoring, renormalize=False)
    return routing.weights[:, 0]


def torchs(scoring: Scoring, logits: Tensor) -> Tensor:
    """Activations by torch's fp32 operations."""
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    return torch.nn.functional.softplus(logits).sqrt()


def error(a: Tensor, exact: Tensor) -> str:
    """The largest relative error where fp32 is normal, the largest absolute one where it is not."""
    off = (a.double() - exact).abs()
    normal = exact >= NORMAL
    parts = []
    if normal.any():
        parts.append(f"{float((off / exact)[normal].max()):.2e}")
    if not normal.all():
        parts.append(f"{float(off[~normal].max()):.1e} absolute where subnormal")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
