"""The routers and the kinds of logits that the tests of `activation_topk` run on.

A `Gate` is what is compiled, its logits are of any kind in `LOGITS`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from cases import option_parts
from torch import Tensor

from cute_router.spec import Scoring

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BITS = {F32: torch.int32, F16: torch.int16, BF16: torch.int16}
FEW, MANY = 17, 2503  # tokens; many have few lanes of a warp each


@dataclass(frozen=True)
class Gate:
    """One router on given logits."""

    E: int
    k: int = 6
    scoring: Scoring = "sqrtsoftplus"
    renormalize: bool = True
    n_group: int = 1
    topk_group: int = 1
    has_bias: bool = True
    dtype: torch.dtype = F32
    N: int = FEW
    padding: int = 0  # elements between rows
    pdl: bool = True

    @property
    def id(self) -> str:
        """The gate as pytest names it."""
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [f"N{self.N}", f"E{self.E}", f"k{self.k}", self.scoring, dtype]
        parts += option_parts(self)
        if not self.pdl:
            parts.append("no-pdl")
        return "-".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `activation_topk`."""
        return {
            "top_k": self.k,
            "scoring": self.scoring,
            "renormalize": self.renormalize,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "routed_scaling_factor": 1.5,
            "pdl": self.pdl,
        }


def ids(gate: Gate) -> str:
    """For `pytest.mark.parametrize(..., ids=ids)`."""
    return gate.id


# One kernel each.
GATES = [
    Gate(256),
    Gate(256, N=MANY),
    Gate(384),
    Gate(384, N=MANY),
    Gate(1, 1),
    Gate(1, 1, renormalize=False, has_bias=False),
    Gate(7),
    Gate(7, 1, "sigmoid", has_bias=False, dtype=BF16, N=MANY),
    Gate(64, 8, "sigmoid", dtype=F16),
    Gate(64, 32, N=MANY),
    Gate(144, 16, dtype=BF16),
    Gate(160, 8, "softmax", has_bias=False, dtype=BF16),
    Gate(256, 8, "sigmoid", n_group=8, topk_group=4),  # DeepSeek-V3
    Gate(256, 8, "softmax", False, 8, 4),
    Gate(256, 32),
    Gate(256, 1, renormalize=False),
    Gate(256, 6, "sigmoid", N=MANY),
    Gate(256, dtype=F16),
    Gate(256, dtype=BF16, N=MANY),
    Gate(256, has_bias=False),
    Gate(256, pdl=False),
    Gate(300, padding=1),
    Gate(300, 16, "sigmoid", dtype=BF16),  # rows are no whole runs of 16 bytes
    Gate(300, n_group=12, topk_group=4),
    Gate(384, 6, "softmax"),
    Gate(384, 8, "sigmoid", False, has_bias=False, dtype=BF16, N=MANY),
    Gate(1024, 8),
    Gate(1024, 16, N=MANY),
    Gate(1024, 32, "softmax", dtype=F16),
    Gate(1024, 32, "sigmoid", padding=3),
]

# --- logits -------------------------------------------------------------------------------------


def with_value(*values: float) -> Callable[[Tensor], Tensor]:
    """Rows that hold these values at random places."""

    def make(rows: Tensor) -> Tensor:
        places = rows.argsort(-1)[:, : len(values)]
        new = torch.tensor(values[: rows.shape[1]], device=rows.device).expand(places.shape)
        return rows.scatter(1, places, new)

    return make


def steps(rows: Tensor, count: int) -> Tensor:
    """Integers from 0 to count - 1, from standard normal numbers."""
    return (rows.abs() * 1e4).floor() % count


def near(rows: Tensor, value: float, count: int = 8) -> Tensor:
    """`value` and the fp32 numbers that follow it."""
    return value + steps(rows, count) * torch.finfo(F32).eps * 2.0 ** math.floor(math.log2(value))


# Each makes rows [n, E] from standard normal ones.
LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda rows: rows,
    "few values": torch.round,
    "all equal": lambda rows: rows * 0 + 0.75,
    "zeros of both signs": lambda rows: rows * 0.0,
    "rising": lambda rows: rows.sort(-1).values,
    "falling": lambda rows: rows.sort(-1, descending=True).values,
    "near ties": lambda rows: near(rows, 1.0),
    "near ties at the edge": lambda rows: torch.where(rows > 2.2, rows, near(rows, 2.0, 3)),
    "low": lambda rows: rows - 95,  # below -87 exp is subnormal in fp32
    "lower": lambda rows: rows - 185,  # the activation itself is
    "lowest": lambda rows: rows - 400,  # and is 0
    "high": lambda rows: rows + 150,  # where sigmoid is 1
    "steep": lambda rows: rows * 20,
    "huge": lambda rows: rows * 1e30,
    "tiny": lambda rows: rows * 1e-30,
    "overflow": lambda rows: rows * 3e38,
    "nan": with_value(math.nan),
    "many nan": lambda rows: rows.masked_fill(rows < 0.5, math.nan),
    "all nan": lambda rows: rows * math.nan,
    "inf": with_value(math.inf),
    "-inf": with_value(-math.inf),
    "inf and -inf": with_value(math.inf, -math.inf, math.inf),
    "all -inf": lambda rows: rows.abs() * -math.inf,
    "all inf": lambda rows: rows.abs() * math.inf,
    "any bits": lambda rows: steps(rows, 1),  # see `draw`
}
BIASES = ("normal", "ties", "hostile")


def draw(
    gate: Gate, kinds: Sequence[str], device: str, seed: int = 0, bias: str = "normal"
) -> tuple[Tensor, Tensor | None]:
    """Logits, row n of kind `kinds[n % len(kinds)]`, and a bias, if the gate has one."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(gate.N, gate.E, generator=generator, device=device)
    values = torch.empty(gate.N, gate.E, dtype=gate.dtype, device=device)
    for turn, kind in enumerate(kinds):
        mine = slice(turn, None, len(kinds))
        if kind == "any bits":
            info = torch.iinfo(BITS[gate.dtype])
            shape = values[mine].shape
            bits = torch.randint(info.min, info.max, shape, generator=generator, device=device)
            values[mine] = bits.to(BITS[gate.dtype]).view(gate.dtype)
        else:
            values[mine] = LOGITS[kind](rows[mine]).to(gate.dtype)
    # What lies between the rows must never be read into a sum, or chosen.
    whole = torch.full((gate.N, gate.E + gate.padding), math.nan, dtype=gate.dtype, device=device)
    logits = whole[:, : gate.E]
    logits.copy_(values)
    if not gate.has_bias:
        return logits, None
    noise = torch.randn(gate.E, generator=generator, device=device)
    if bias == "ties":
        return logits, noise.round() / 4
    if bias == "hostile":
        random = Random(seed)
        for value in (math.nan, math.inf, -math.inf, 0.0, -0.0):
            noise[random.randrange(gate.E)] = value
    return logits, noise * 0.1
