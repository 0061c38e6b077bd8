"""Runs the gate kernel in the simulator, as `cute_router.topk.gate` launches it on a GPU."""

import struct

import numpy as np
import torch
from torch import Tensor

from cute_router import Routing
from cute_router.gemm.config import ceil_div
from cute_router.topk.config import WARP, GateConfig
from cute_router.topk.lanes import Lanes
from ptx_sim.engine import policy_of
from ptx_sim.launch import EMPTY, matrix_param, ptx_of, tensor_param, words_of
from ptx_sim.machine import Machine
from ptx_sim.memory import GlobalMemory
from ptx_sim.program import load

DEPENDENT = frozenset(("logits", "weights", "ids"))  # of the kernel ahead, or like its


def simulate_gate(
    config: GateConfig,
    logits: Tensor,
    bias: Tensor | None,
    *,
    policy: str = "eager",
    factor: float = 1.0,
    ptx: str | None = None,
) -> Routing:
    """The outputs of one launch; raises a `SimulationError` if anything goes wrong on the way.

    Rows of logits may be apart; what is between them is given to the kernel, as on a GPU.
    """
    N, k = logits.shape[0], config.spec.top_k
    memory = GlobalMemory()
    weights = np.full(N * k, EMPTY, np.uint32)
    ids = weights.copy()
    params = [matrix_param(memory, "logits", logits)]
    if bias is not None:
        params.append(tensor_param(memory, "bias", words_of(bias)))
    params.append(tensor_param(memory, "weights", weights, (N,)))
    params.append(tensor_param(memory, "ids", ids, (N,)))
    params.append(struct.pack("<f", factor))
    Machine(
        load(ptx or ptx_of(config)),
        params,
        memory,
        policy_of(policy),
        grid=(ceil_div(N, config.warps * (WARP // config.lanes)), 1),
        cluster_size=1,
        shared_bytes=shared_bytes(config),
        dependent=DEPENDENT if config.pdl else frozenset(),
    ).run()
    return Routing(
        torch.from_numpy(weights.view(np.float32).reshape(N, k)),
        torch.from_numpy(ids.view(np.int32).reshape(N, k)),
    )


def shared_bytes(config: GateConfig) -> int:
    """What the kernel allocates: the bias, then its warps' logits, or their experts' keys."""
    c, E = config, config.spec.num_experts
    room = Lanes(E, c.spec.top_k, c.lanes, c.run, exact=False).room
    bias = 4 * room if c.spec.has_bias else 0
    keys = 4 * ceil_div(E, WARP) * WARP
    of_warp = room * (WARP // c.lanes) * (16 // c.run) if c.by_words else keys
    return bias + c.warps * of_warp
