"""Runs the gate kernel in the simulator, as `cute_router.topk.gate` launches it on a GPU."""

import struct

import numpy as np
import torch
from torch import Tensor

from cute_router import Routing
from cute_router.gemm.config import ceil_div
from cute_router.topk.config import GateConfig
from ptx_sim.engine import policy_of
from ptx_sim.launch import EMPTY, ptx_of, tensor_param
from ptx_sim.machine import Machine
from ptx_sim.memory import GlobalMemory
from ptx_sim.program import load

SHARED_BYTES = 48 << 10  # what every launch can have; how much this one asks for is not known here
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
    (N, E), k = logits.shape, config.spec.top_k
    ptx = ptx or ptx_of(config)
    memory = GlobalMemory()
    weights = np.full(N * k, EMPTY, np.uint32)
    ids = weights.copy()
    stride = logits.stride(0)
    flat = logits.as_strided(((N - 1) * stride + E,), (1,))  # no padding behind the last row
    params = [tensor_param(memory, "logits", words_of(flat), (N,), (stride,))]
    if bias is not None:
        params.append(tensor_param(memory, "bias", words_of(bias)))
    params.append(tensor_param(memory, "weights", weights, (N,)))
    params.append(tensor_param(memory, "ids", ids, (N,)))
    params.append(struct.pack("<f", factor))
    Machine(
        load(ptx),
        params,
        memory,
        policy_of(policy),
        grid=(ceil_div(N, config.warps), 1),
        cluster_size=1,
        shared_bytes=SHARED_BYTES,
        # One that never waits for the kernel ahead is launched behind its end.
        dependent=DEPENDENT if "griddepcontrol.wait" in ptx else frozenset(),
    ).run()
    return Routing(
        torch.from_numpy(weights.view(np.float32).reshape(N, k)),
        torch.from_numpy(ids.view(np.int32).reshape(N, k)),
    )


def words_of(vector: Tensor) -> np.ndarray:
    """A copy of the bits of fp32 values."""
    return vector.numpy().view(np.uint32).copy()
