"""What the simulator and a Hopper GPU both run, so that one can be held to the other.

    CASES x KINDS -> inputs, the same bits everywhere -> results of a machine, a small JSON file

Two machines agree on a case if every token whose choice the oracle leaves no doubt about has the
same ids on both, and if weights of tokens with the same ids differ by no more than `WEIGHT_BAR`.
Doubt is where the gap between two scores is within the error bound of a logit: on ordinary data
alone. Integer-valued logits are exact in fp32, so there every id has to be equal.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from torch import Tensor

from cute_router import Routing, reference
from cute_router.gemm.config import DecodeConfig
from cute_router.spec import RouterSpec
from ptx_sim.problem import chosen, options_of

ARCH = "sm_90a"
WEIGHT_BAR = 1e-6
FACTOR = 1.0
SEED = 0  # leaves no doubt about data with exact logits; new cases go to the end of the list
RECORD = Path(__file__).with_name("h200.json")

KINDS = ("tied", "tie-free", "ordinary", "special")
EXACT = ("tied", "tie-free")  # logits are multiples of 1/32

V3_GROUPS = {"top_k": 8, "scoring": "sigmoid", "n_group": 8, "topk_group": 4}
SOFTMAX = {"scoring": "softmax", "top_k": 8}


@dataclass(frozen=True)
class Case:
    """A configuration and a number of tokens."""

    name: str
    config: DecodeConfig
    N: int


def hopper(E: int, K: int, tile_experts: int, tile_tokens: int, split_k: int, stages: int, **spec):
    """A configuration that the heuristics need not choose."""
    router = RouterSpec(E, K, **spec)
    return DecodeConfig(router, ARCH, tile_experts, tile_tokens, split_k, stages)


CASES = [
    Case("cluster of 16", chosen(256, 5, arch=ARCH), 5),
    Case("a ragged expert tile, N off the tile", chosen(300, 19, arch=ARCH), 19),
    Case("softmax", hopper(64, 1000, 64, 16, 8, 2, **SOFTMAX), 50),
    Case("groups", chosen(256, 13, V3_GROUPS, arch=ARCH), 13),
    Case("groups of softmax", chosen(256, 4, SOFTMAX | V3_GROUPS, arch=ARCH), 4),
    Case("a ring of stages", hopper(128, 2536, 64, 16, 8, 2), 13),
    Case("cluster of 2", chosen(256, 4, hidden_size=128, arch=ARCH), 4),
    Case("128 experts a tile", hopper(256, 1000, 128, 8, 4, 4), 7),
    Case(
        "batch-invariant, no bias",
        chosen(256, 18, {"has_bias": False}, batch_invariant=True, arch=ARCH),
        18,
    ),
    Case("several token tiles", hopper(144, 1000, 64, 32, 8, 2, top_k=32), 40),
    Case("raw sigmoid", hopper(96, 1000, 64, 16, 4, 4, scoring="sigmoid", renormalize=False), 11),
]


class Inputs(NamedTuple):
    """The tensors of one launch."""

    x: Tensor
    W: Tensor
    bias: Tensor | None

    def digest(self) -> str:
        """What tells two machines that they have the same inputs."""
        sha = hashlib.sha256()
        for tensor in self:
            if tensor is not None:
                sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]


def draw(case: Case, kind: str) -> Inputs:
    """Inputs of a kind, from a generator's raw words alone: no library's distributions.

    "tied" has experts that are copies of others, and few biases; "tie-free" a bias of its own for
    each expert, if any; "special" is ordinary but for rows with NaN, infinities, zeros and large
    values.
    """
    spec, N = case.config.spec, case.N
    E, K = spec.num_experts, spec.hidden_size
    words = np.random.PCG64([SEED, CASES.index(case), KINDS.index(kind)])

    def quarters(rows: int, columns: int) -> np.ndarray:
        """(4, rows, columns) whole numbers of 16 bits."""
        raw = words.random_raw(rows * columns).astype("<u8")
        return raw.view("<u2").reshape(rows, columns, 4).transpose(2, 0, 1).astype(np.float64)

    def whole(rows: int, density: float) -> np.ndarray:
        """-2 to 2, or 0 with the rest of the density."""
        value, keep, _, _ = quarters(rows, K)
        return (value % 5 - 2) * (keep < 65536 * density)

    def bell(rows: int, columns: int) -> np.ndarray:
        """Sums of four uniform numbers, of variance 1."""
        return (quarters(rows, columns).sum(0) / 65536 - 2 + 2 / 65536) * 3**0.5

    if kind in EXACT:
        x, W = whole(N, 1.0) / 32, whole(E, min(1.0, 512 / K))
    else:
        x, W = bell(N, K), bell(E, K) / 16 * min(1.0, 16 / K**0.5)
    bias = bell(1, E)[0] / 4
    if kind == "tied":
        copies = np.arange(0, E - 1, 3)
        W[copies] = W[copies + 1]
        bias = (np.sign(bias) + 1) / 8
    if kind == "special":
        x[0, 3], x[1, 5], x[2], x[3] = np.nan, np.inf, 0, 4 * x[3]
    matrices = (torch.from_numpy(t.astype(np.float32)).bfloat16() for t in (x, W))
    return Inputs(*matrices, torch.from_numpy(bias.astype(np.float32)) if spec.has_bias else None)


def decided(case: Case, kind: str, inputs: Inputs) -> Tensor:
    """Which tokens [N] have a single right choice: their gaps exceed the error bound."""
    x, W, bias = inputs
    spec, N = case.config.spec, case.N
    logit = reference.logits(x, W)
    bound = reference.logit_error_bound(x, W)
    exact = torch.full_like(logit, kind in EXACT, dtype=torch.bool) | ~logit.isfinite()
    exact |= reference.logits(x.abs(), W.abs()) == 0
    a = oracle.activation_intervals(logit, bound.masked_fill(exact, 0), spec.scoring)
    s = oracle.score_intervals(a, bias, exact)
    competes = torch.ones_like(exact)
    clear = torch.ones(N, dtype=torch.bool)
    if spec.n_group > 1:
        may_stay, competes = oracle.group_verdicts(s, spec.n_group, spec.topk_group)
        clear = (may_stay == competes).all(-1)
    # The places that an expert may have: from those that surely precede it to those that may.
    mine, rivals = (oracle.Scores(*(t.unsqueeze(d) for t in s)) for d in (2, 1))
    expert = torch.arange(spec.num_experts)
    i, j = expert[:, None], expert[None, :]
    rival = competes[:, None, :] & (i != j)
    surely = (rival & ~oracle.may_precede(mine, rivals, i, j)).sum(-1)
    perhaps = (rival & oracle.may_precede(rivals, mine, j, i)).sum(-1)
    return clear & ((surely == perhaps) | (surely >= spec.top_k) | ~competes).all(-1)


# --- comparing -----------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """How two machines' results of a case compare."""

    same_ids: int  # tokens
    doubtful: int  # tokens whose ids differ, within the bound
    wrong: int  # tokens whose ids differ beyond it
    same_bits: int  # weights, of those at equal ids
    weights: int
    error: float  # the largest difference of two weights

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return self.wrong == 0 and self.error <= WEIGHT_BAR

    def __str__(self) -> str:
        return (
            f"tokens: {self.same_ids} same ids, {self.doubtful} differ within the bound,"
            f" {self.wrong} beyond | weights: {self.same_bits} of {self.weights} same bits,"
            f" off by {self.error:.2g} at most"
        )


def agreement(case: Case, kind: str, inputs: Inputs, a: Routing, b: Routing) -> Agreement:
    """Compare; raise unless `a` and `b` are both what the specification allows."""
    for routing in (a, b):
        oracle.assert_routing(
            routing, *inputs, routed_scaling_factor=FACTOR, **options_of(case.config.spec)
        )
    same = (a.ids == b.ids).all(-1)
    wrong = ~same & decided(case, kind, inputs)
    mine, other = a.weights[same], b.weights[same]
    bits = (mine.view(torch.int32) == other.view(torch.int32)) | (mine.isnan() & other.isnan())
    error = (mine - other).abs().masked_fill(bits, 0).nan_to_num(nan=torch.inf)
    return Agreement(
        int(same.sum()),
        int((~same & ~wrong).sum()),
        int(wrong.sum()),
        int(bits.sum()),
        bits.numel(),
        float(error.max()) if bits.numel() else 0.0,
    )


# --- results of a machine as a file --------------------------------------------------------------


def name_of(case: Case, kind: str) -> str:
    """A case's name in the file."""
    return f"{case.name} | {kind}"


def pack(inputs: Inputs, routing: Routing) -> dict[str, Any]:
    """Results: for each token its ids, and the bits of its weights."""
    tokens = [
        [" ".join(map(str, ids)), " ".join(f"{bits & 0xFFFFFFFF:08x}" for bits in weights)]
        for ids, weights in zip(
            routing.ids.tolist(), routing.weights.view(torch.int32).tolist(), strict=True
        )
    ]
    return {"inputs": inputs.digest(), "tokens": tokens}


def unpack(packed: dict[str, Any], inputs: Inputs) -> Routing:
    """The results; raise unless they come from these inputs."""
    if packed["inputs"] != inputs.digest():
        raise ValueError(f"other inputs: {inputs.digest()}, in the file {packed['inputs']}")
    ids = [[int(i) for i in row.split()] for row, _ in packed["tokens"]]
    bits = [[int(word, 16) for word in row.split()] for _, row in packed["tokens"]]
    weights = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    return Routing(weights, torch.tensor(ids, dtype=torch.int32))


def save(path: Path, source: dict[str, str], results: dict[str, Any]) -> None:
    """Write a file with a line for each token."""
    text = json.dumps({"source": source, "results": results}, indent=0)
    path.write_text(re.sub(r'\[\n(".*"),\n(".*")\n\]', r"[\1, \2]", text) + "\n")


def read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(where the results come from, the results)"""
    file = json.loads(path.read_text())
    return file["source"], file["results"]
