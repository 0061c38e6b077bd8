"""The routers, numbers of tokens and data that the kernel tests run on, defined in one place.

A `Case` is a router and an N; its regime says what it is there to cover. `draw` makes inputs for
it, row by row of the kinds in `ROWS`: ordinary ones, and every hard one that a kernel may meet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_router.spec import RouterSpec, Scoring

FLASH = (256, 4096)  # (E, K) of DeepSeek-V4-Flash
PRO = (384, 7168)  # and of DeepSeek-V4-Pro
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)

SCORINGS: tuple[Scoring, ...] = ("sqrtsoftplus", "sigmoid", "softmax")


@dataclass(frozen=True)
class Case:
    """One router at one number of tokens."""

    regime: str
    E: int
    K: int
    N: int
    top_k: int = 6
    scoring: Scoring = "sqrtsoftplus"
    renormalize: bool = True
    n_group: int = 1
    topk_group: int = 1
    has_bias: bool = True
    factor: float = 1.5
    padding: int = 0  # elements between the end of a row of x and the start of the next

    @property
    def id(self) -> str:
        """The case as pytest names it."""
        parts = [f"E{self.E}", f"K{self.K}", f"N{self.N}", f"k{self.top_k}", self.scoring]
        return "-".join([*parts, *option_parts(self)])

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `dense_decode` that belong to the mathematics."""
        return {
            "top_k": self.top_k,
            "scoring": self.scoring,
            "renormalize": self.renormalize,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "routed_scaling_factor": self.factor,
        }

    @property
    def spec(self) -> RouterSpec:
        """What kernels are compiled for."""
        return RouterSpec(
            self.E,
            self.K,
            self.top_k,
            self.scoring,
            self.renormalize,
            self.has_bias,
            self.n_group,
            self.topk_group,
        )


def option_parts(router: Any) -> list[str]:
    """What an id says of options that are not the defaults, of a `Case` or its like."""
    parts = []
    if not router.renormalize:
        parts.append("raw")
    if router.n_group > 1:
        parts.append(f"groups{router.topk_group}of{router.n_group}")
    if not router.has_bias:
        parts.append("nobias")
    if router.padding:
        parts.append(f"pad{router.padding}")
    return parts


class Inputs(NamedTuple):
    """The tensors of one call."""

    x: Tensor
    W: Tensor
    bias: Tensor | None


# --- cases --------------------------------------------------------------------------------------

# What the kernel is tuned for.
TUNED = [Case("tuned shape", E, K, N) for E, K in (FLASH, PRO) for N in DECODE_TOKENS]

# Every kind of edge, each a router of its own. The fuzz test draws from these too, so that the
# number of kernels to compile stays at about one for each line.
ROUTERS = [
    Case("one expert, one 16-byte piece of K", 1, 8, 1, top_k=1),
    Case("one expert, softmax is 1", 1, 264, 17, top_k=1, scoring="softmax"),
    Case("fewer experts than a fragment, all but one chosen", 7, 264, 3),
    Case("fewer experts than a fragment, smallest K", 7, 8, 65, has_bias=False),
    Case("fewer experts than lanes, raw weights", 7, 4096, 1, top_k=1, renormalize=False),
    Case("one M tile of 64", 64, 4096, 17),
    Case("all lanes choose", 64, 264, 64, top_k=32, scoring="sigmoid"),
    Case("a ragged M tile", 144, 5120, 3),
    Case("a ragged M tile, many tokens", 144, 264, 1000, top_k=8, scoring="softmax"),
    Case("a ragged M tile of another size", 160, 6144, 64, top_k=8),
    Case("Qwen-like: softmax of 160", 160, 5120, 1, top_k=8, scoring="softmax", has_bias=False),
    Case("K one 16-byte piece, E a full tile", 256, 8, 17),
    Case("K a multiple of 8 and not of 64", 256, 264, 3, padding=56),
    Case("one expert a token", 256, 4096, 3, top_k=1),
    Case("more tokens than the largest token tile, by one", 256, 4096, 65),
    Case("several token tiles", 256, 4096, 200, top_k=8),
    Case("many token tiles, padded rows", 256, 4096, 1000, padding=8),
    Case("no bias", 256, 4096, 17, has_bias=False),
    Case("raw weights", 256, 4096, 8, renormalize=False, factor=2.5),
    Case("the most experts a token", 256, 4096, 17, top_k=32),
    Case("DeepSeek-V3: sigmoid and groups", 256, 7168, 1, 8, "sigmoid", True, 8, 4, factor=2.5),
    Case("DeepSeek-V3 at 64 tokens", 256, 7168, 64, 8, "sigmoid", True, 8, 4, factor=2.5),
    Case("groups with softmax", 256, 4096, 17, 8, "softmax", False, 8, 4),
    Case("groups of 2", 64, 264, 3, 4, "sqrtsoftplus", True, 32, 3),
    Case("groups of an odd size", 300, 264, 17, 6, "sqrtsoftplus", True, 12, 4),
    Case("every group stays", 256, 264, 3, 6, "sqrtsoftplus", True, 8, 8),
    Case("groups without bias", 384, 4096, 3, 6, "sigmoid", True, 8, 4, has_bias=False),
    Case("E not a multiple of 4", 300, 5120, 17),
    Case("E not a multiple of 4, many tokens", 300, 264, 200, top_k=32),
    Case("softmax over all of E", 384, 7168, 8, scoring="softmax"),
    Case("K a multiple of 8 just past a multiple of 64", 384, 7176, 3),
    Case("padded rows of a ragged K", 384, 7176, 64, padding=64),
    Case("several token tiles of the larger shape", 384, 7168, 65),
    Case("the larger shape, raw softmax", 384, 7168, 200, 8, "softmax", False),
    Case("twice the experts", 512, 6144, 17, top_k=8),
    Case("twice the experts, tiny K", 512, 8, 200, scoring="sigmoid", has_bias=False),
    Case("the most experts", 1024, 4096, 3, top_k=8),
    Case("the most experts, the most chosen, softmax", 1024, 264, 64, 32, "softmax"),
    Case("a K slice too large for shared memory", 256, 16384, 17),
    Case("a K slice far too large for shared memory", 384, 32768, 3),
    Case("the largest router", 1024, 32768, 65, top_k=32, scoring="sigmoid"),
]

# Every scoring under every option, at one small size.
OPTIONS = [
    Case("options", 256, 512, 5, 6, scoring, renormalize, n_group, topk_group, has_bias)
    for scoring in SCORINGS
    for renormalize, n_group, topk_group, has_bias in (
        (True, 1, 1, True),
        (False, 1, 1, True),
        (True, 8, 4, True),
        (True, 1, 1, False),
    )
]

# For the tests of launches, which one size of each kind serves.
SMALL = OPTIONS[0]
ODD = Case("odd sizes", 300, 264, 17)
ONE_OF_EACH = [Case("tuned shape", *FLASH, 8), Case("tuned shape", *PRO, 64)]

# Where a token must not notice its company: one tile and many, split K and not, all merges.
INVARIANT = [
    Case("batch invariant", *FLASH, 200),
    Case("batch invariant", *PRO, 200),
    Case("batch invariant", 300, 264, 200, top_k=8, scoring="softmax"),
    Case("batch invariant", 256, 4096, 200, 8, "sigmoid", True, 8, 4),
]


def launches() -> list[tuple[Case, dict[str, bool]]]:
    """Every router of the GPU tests and how it is launched, to fill a kernel cache beforehand."""
    plain = [*TUNED, *ROUTERS, *OPTIONS, *INVARIANT, ODD]
    return [
        *((case, {}) for case in plain),
        *((case, {"batch_invariant": True}) for case in [*INVARIANT, *ONE_OF_EACH]),
        *((case, {"pdl": False}) for case in ONE_OF_EACH),
    ]


def ids(case: Case) -> str:
    """For `pytest.mark.parametrize(..., ids=ids)`."""
    return case.id


# --- data ---------------------------------------------------------------------------------------


def around(level: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows whose logits lie around `level`, for W from `random_weights`."""
    return lambda rows, at: rows / 4 + level * rows.shape[1] ** -0.5


def with_value(*values: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows that hold these values, the first one at `at` and each next one column on."""

    def make(rows: Tensor, at: Tensor) -> Tensor:
        for i, value in enumerate(values):
            rows = rows.scatter(1, (at + i) % rows.shape[1], value)
        return rows

    return make


def few_signs(rows: Tensor, at: Tensor) -> Tensor:
    """Rows of zeros and 8 ones of either sign: exact logits and ties with integer weights."""
    largest = rows.abs().topk(min(8, rows.shape[1]), dim=1).values[:, -1:]
    return rows.sign() * (rows.abs() >= largest)


# Each makes rows of x [n, K] from standard normal ones and a random column [n, 1] for each row.
ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda rows, at: rows,
    "ties": few_signs,
    "all equal": lambda rows, at: rows * 0,
    "low": around(-95.0),  # below -87 exp is subnormal in fp32
    "lower": around(-185.0),  # the activation itself is
    "lowest": around(-400.0),  # and is 0
    "high": around(150.0),
    "huge": lambda rows, at: rows * 1e12,
    "tiny": lambda rows, at: rows * 1e-30,
    "overflow": lambda rows, at: rows * 3e37,
    "nan": with_value(math.nan),
    "inf": with_value(math.inf),
    "-inf": with_value(-math.inf),
    "inf and -inf": with_value(math.inf, -math.inf),
    "all nan": lambda rows, at: rows * math.nan,
}
NON_FINITE = ("nan", "inf", "-inf", "inf and -inf", "all nan")


def draw(
    case: Case,
    device: torch.device | str,
    seed: int = 0,
    kinds: Sequence[str] = ("normal",),
    integer: bool = False,
) -> Inputs:
    """Inputs of a case; row n of x is of kind `kinds[n % len(kinds)]`.

    `integer` gives weights and bias whose sums with "ties" rows are exact, and full of ties.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if integer:
        W, bias = normal(case.E, case.K).sign() * (normal(case.E, case.K) > 0.5), normal(case.E)
        bias = bias.round() / 4
    else:
        # The common offset gives the "low" and "high" rows something to move all logits by.
        W, bias = (normal(case.E, case.K) + 1) * case.K**-0.5, normal(case.E) * 0.1

    rows = normal(case.N, case.K)
    at = torch.randint(case.K, (case.N, 1), generator=generator, device=device)
    kind_of = torch.tensor([list(ROWS).index(kind) for kind in kinds], device=device)
    kind_of = kind_of.repeat(-(-case.N // len(kinds)))[: case.N, None]
    values = rows
    for number, (kind, make) in enumerate(ROWS.items()):
        if kind in kinds:
            values = torch.where(kind_of == number, make(rows, at), values)

    # What lies between the rows must never be read into a sum.
    storage = torch.full(
        (case.N, case.K + case.padding), math.nan, dtype=torch.bfloat16, device=device
    )
    x = storage[:, : case.K]
    x.copy_(values)
    return Inputs(x, W.bfloat16(), bias if case.has_bias else None)


def draw_hostile(case: Case, device: torch.device | str, seed: int) -> Inputs:
    """Inputs drawn for a fuzz test: N within the case's token tile, rows of all kinds, bad W, bias.

    Everything but the data follows from the case, so that one compiled kernel serves all seeds.
    """
    random = Random(f"{case.id} {seed}")
    case = replace(case, N=random.randint(*token_tile(case.N)))
    ordinary = random.random() < 0.2
    kinds = ["normal"] if ordinary else random.choices(list(ROWS), k=case.N)
    inputs = draw(case, device, random.getrandbits(32), kinds, integer=random.random() < 0.3)
    if random.random() < 0.2:  # experts of equal weights, whose scores tie or nearly do
        inputs.W[random.randrange(case.E)] = inputs.W[random.randrange(case.E)]
    if random.random() < 0.1:
        inputs.W[random.randrange(case.E), random.randrange(case.K)] = math.nan
    if inputs.bias is not None and random.random() < 0.3:
        for value in (math.nan, math.inf, -math.inf, 0.0, -0.0):
            inputs.bias[random.randrange(case.E)] = value
    return inputs


def token_tile(N: int) -> tuple[int, int]:
    """The numbers of tokens that may share a compiled kernel with N."""
    for low, high in ((1, 8), (9, 16), (17, 32), (33, 64), (65, 128)):
        if N in range(low, high + 1):
            return low, high
    return 129, N
