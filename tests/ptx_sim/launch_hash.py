"""Runs a hash kernel in the simulator, as `cute_router.topk.hash` launches it on a GPU."""

import struct

import numpy as np
import torch
from torch import Tensor

from cute_router import Extras, Routing
from cute_router.gemm.config import ceil_div
from cute_router.topk.hash_config import HashConfig, HashGateConfig, HashLogitsConfig
from ptx_sim.engine import policy_of
from ptx_sim.launch import ptx_of, words_of
from ptx_sim.machine import Machine
from ptx_sim.memory import GlobalMemory
from ptx_sim.program import load
from ptx_sim.results import DEPENDENT as WRITTEN
from ptx_sim.results import POISON, ExtraParams, Results

AnyHashConfig = HashConfig | HashGateConfig | HashLogitsConfig

DEPENDENT = WRITTEN | {"tokens", "x"}  # of the kernel ahead, or like its


def simulate(
    config: AnyHashConfig,
    token_ids: Tensor | None,
    table: Tensor,
    *products: Tensor,
    factor: float = 1.0,
    policy: str = "eager",
    padding: int = 0,
    ptx: str | None = None,
    extras: Extras | None = None,
) -> Routing:
    """The outputs of one launch; `products` are x and W, or logits, or nothing.

    Rows of the inputs are `padding` elements apart, with poison between them, which is no token, no
    expert, and a huge number. Without token ids each token has its own row of the table.
    """
    N, k = (table if token_ids is None else token_ids).shape[0], table.shape[1]
    memory = GlobalMemory()
    results = Results(memory, N, k, config.extras)
    extra = ExtraParams(memory, extras, fixed=False)

    def vector(name: str, words: np.ndarray) -> bytes:
        """The kernel's parameter for a dense tensor of N rows."""
        return struct.pack("<Qi4x", memory.add(name, words), N)

    def matrix(name: str, t: Tensor) -> bytes:
        """The same for a matrix: its sizes where they are run-time values, and its row stride."""
        rows = torch.full((t.shape[0], 4 * (t.shape[1] + padding)), POISON, dtype=torch.int32)
        rows = rows.view(t.dtype)[:, : t.shape[1] + padding].contiguous()
        rows[:, : t.shape[1]] = t
        fixed = name != "logits"  # k and K are built in
        sizes = struct.pack("<i4x" if fixed else "<2i", *t.shape[: 2 - fixed])
        address = memory.add(name, words_of(rows))
        return struct.pack("<Q", address) + sizes + struct.pack("<q", rows.shape[1])

    names = {0: (), 1: ("logits",), 2: ("x", "W")}[len(products)]
    inputs = [matrix(name, t) for name, t in zip(names, products, strict=True)]
    params = [
        *([] if token_ids is None else [vector("tokens", words_of(token_ids))]),
        matrix("table", table),
        *inputs,
        *results.params,
        struct.pack("<f", factor if products else factor / k),
        *extra.params,
    ]
    Machine(
        load(ptx or ptx_of(config)),
        params,
        memory,
        policy_of(policy),
        grid=(ceil_div(N, tokens_of(config)), 1),
        cluster_size=1,
        shared_bytes=4096,
        dependent=dependent_on(config),
    ).run()
    return results.routing()


def dependent_on(config: AnyHashConfig) -> frozenset[str]:
    """What may not be touched before the wait for the kernel ahead."""
    if not getattr(config, "overlaps", False):
        return frozenset()
    # The uniform kernel looks at token ids early, and again.
    return DEPENDENT - {"tokens"} if isinstance(config, HashConfig) else DEPENDENT


def tokens_of(config: AnyHashConfig) -> int:
    """Tokens of a CTA."""
    match config:
        case HashConfig():
            return config.tokens
        case HashLogitsConfig():
            return config.warps
    return 1
