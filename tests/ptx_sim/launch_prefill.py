"""Runs a prefill kernel in the simulator, as `cute_router.gemm.prefill` launches it on a GPU."""

import struct

import numpy as np
from torch import Tensor

from cute_router import Extras, Routing
from cute_router.gemm.config import ceil_div
from cute_router.gemm.prefill_config import PrefillConfig
from ptx_sim.engine import policy_of
from ptx_sim.launch import ptx_of, tensor_param, tma_params
from ptx_sim.machine import Machine
from ptx_sim.memory import GlobalMemory
from ptx_sim.program import load
from ptx_sim.results import DEPENDENT, ExtraParams, Results


def simulate_prefill(
    config: PrefillConfig,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    *,
    policy: str = "eager",
    factor: float = 1.0,
    ptx: str | None = None,
    extras: Extras | None = None,
    races: bool = False,
) -> Routing:
    """The outputs of one launch; raises a `SimulationError` if anything goes wrong on the way.

    races: whether races are looked for in other orders than the eager one too.
    """
    c, N, k = config, x.shape[0], config.spec.top_k
    memory = GlobalMemory()
    results, extra = Results(memory, N, k, c.extras), ExtraParams(memory, extras)

    params = [*tma_params("x", x, c.tile_tokens), *tma_params("W", W, c.tile_experts)]
    if bias is not None:
        params.append(tensor_param(memory, "bias", bias.numpy().view(np.uint32).copy()))
    params += [*results.params, struct.pack("<f", factor), *extra.params]
    Machine(
        load(ptx or ptx_of(c)),
        params,
        memory,
        policy_of(policy),
        grid=(min(ceil_div(N, c.tile_tokens), c.clusters) * c.cluster, 1),
        cluster_size=c.cluster,
        shared_bytes=c.smem_bytes,
        dependent=DEPENDENT,
        races=races,
    ).run()
    extra.finish()
    return results.routing()
