"""Runs topk of short rows in the simulator, as `cute_router.topk.rows` launches it on a GPU."""

import numpy as np
import torch
from torch import Tensor

from cute_router.gemm.config import ceil_div
from cute_router.topk.config import WARP, RowsConfig
from cute_router.topk.sieve import Sieve
from ptx_sim.engine import policy_of
from ptx_sim.launch import matrix_param, ptx_of, tensor_param, words_of
from ptx_sim.machine import Machine
from ptx_sim.memory import GlobalMemory
from ptx_sim.program import load

UNWRITTEN = 0x7E  # each byte of the outputs at first: no result is like that
DEPENDENT = frozenset(("scores", "lengths", "values", "indices"))  # of the kernel ahead, or like


def simulate_rows(
    config: RowsConfig,
    scores: Tensor,
    lengths: Tensor | None = None,
    *,
    policy: str = "eager",
    ptx: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(values, indices) of one launch; raises a `SimulationError` if anything goes wrong.

    Rows of scores may be apart; what is between them is given to the kernel, as on a GPU.
    """
    R, k = scores.shape[0], config.top_k
    memory = GlobalMemory()
    outputs = {}

    def output(name: str, dtype: torch.dtype) -> bytes:
        size = R * k * dtype.itemsize
        outputs[name] = np.full(-(-size // 4) * 4, UNWRITTEN, np.uint8), size, dtype
        return tensor_param(memory, name, outputs[name][0].view(np.uint32), (R,), size=size)

    def written(name: str) -> Tensor:
        filled, size, dtype = outputs[name]
        return torch.from_numpy(filled[:size]).view(dtype).view(R, k)

    params = [matrix_param(memory, "scores", scores)]
    if lengths is not None:
        params.append(tensor_param(memory, "lengths", words_of(lengths), (R,)))
    params.append(output("values", scores.dtype))
    params.append(output("indices", getattr(torch, config.index)))
    Machine(
        load(ptx or ptx_of(config)),
        params,
        memory,
        policy_of(policy),
        grid=(ceil_div(R, config.warps * (WARP // config.lanes)), 1),
        cluster_size=1,
        shared_bytes=shared_bytes(config),
        dependent=DEPENDENT if config.pdl else frozenset(),
    ).run()
    return written("values"), written("indices")


def shared_bytes(config: RowsConfig) -> int:
    """What the kernel allocates: the lists of its warps' rows."""
    c = config
    lay = Sieve(c.length, c.top_k, c.lanes, c.run, ragged=c.lengths is not None)
    return lay.capacity * (WARP // c.lanes) * c.warps * 4
