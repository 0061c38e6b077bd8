"""Runs the gate kernel in the simulator, as `cute_router.topk.gate` launches it on a GPU."""

import struct

from torch import Tensor

from cute_router import Extras, Routing
from cute_router.gemm.config import ceil_div
from cute_router.topk.config import WARP, GateConfig
from cute_router.topk.sieve import Sieve
from ptx_sim.engine import policy_of
from ptx_sim.launch import matrix_param, ptx_of, tensor_param, words_of
from ptx_sim.machine import Machine
from ptx_sim.memory import GlobalMemory
from ptx_sim.program import load
from ptx_sim.results import DEPENDENT as WRITTEN
from ptx_sim.results import ExtraParams, Results

DEPENDENT = WRITTEN | {"logits"}  # of the kernel ahead, or like its


def simulate_gate(
    config: GateConfig,
    logits: Tensor,
    bias: Tensor | None,
    *,
    policy: str = "eager",
    factor: float = 1.0,
    ptx: str | None = None,
    extras: Extras | None = None,
) -> Routing:
    """The outputs of one launch; raises a `SimulationError` if anything goes wrong on the way.

    Rows of logits may be apart; what is between them is given to the kernel, as on a GPU.
    """
    N, k = logits.shape[0], config.spec.top_k
    memory = GlobalMemory()
    results, extra = Results(memory, N, k, config.extras), ExtraParams(memory, extras)
    params = [matrix_param(memory, "logits", logits)]
    if bias is not None:
        params.append(tensor_param(memory, "bias", words_of(bias)))
    params += [*results.params, struct.pack("<f", factor), *extra.params]
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
    return results.routing()


def shared_bytes(config: GateConfig) -> int:
    """What the kernel allocates: the bias; its warps' logits, activations, where they take more
    than logits, and lists, or their experts' keys."""
    c, E = config, config.spec.num_experts
    lay = Sieve(E, c.spec.top_k, c.lanes, c.run, ragged=False)
    bias = 4 * lay.room * (2 if c.extras.second_bias else c.spec.has_bias)
    keys = 4 * ceil_div(E, WARP) * WARP
    of_token = lay.room * (4 if c.dtype == "float32" else 2 + 4) + 2 * lay.capacity
    return bias + c.warps * (of_token * (WARP // c.lanes) if c.by_threshold else keys)
