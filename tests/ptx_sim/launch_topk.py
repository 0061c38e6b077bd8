"""Runs a kernel of long rows in the simulator, as `cute_router.topk.radix` launches it on a GPU."""

import struct

import numpy as np
import torch
from torch import Tensor

from cute_router.topk.radix_config import RadixConfig, can_implement
from ptx_sim.engine import policy_of
from ptx_sim.errors import SimulationError
from ptx_sim.launch import ptx_of
from ptx_sim.machine import Machine
from ptx_sim.memory import GlobalMemory
from ptx_sim.program import load

FREE = 0xA5A5A5A5  # what nobody has written
GUARD = 8  # words behind every output


def simulate_topk(
    config: RadixConfig,
    scores: Tensor,
    k: int,
    lengths: Tensor | None = None,
    *,
    policy: str = "eager",
    ptx: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(values, indices) of one launch; raises a `SimulationError` if anything goes wrong."""
    can_implement(config)
    rows, length = scores.shape
    assert config.holds(length)
    memory = GlobalMemory()

    def matrix(name: str, words: np.ndarray, columns: int, stride: int) -> bytes:
        return struct.pack("<QiiQ", memory.add(name, words), rows, columns, stride)

    def output(dtype: torch.dtype) -> np.ndarray:
        return np.full(-(-rows * k * dtype.itemsize // 4) + GUARD, FREE, np.uint32)

    stride = scores.stride(0)
    flat = scores.as_strided((stride * (rows - 1) + length,), (1,))  # the last row has no padding
    bits = flat.contiguous().view(torch.uint8).numpy()
    bits = np.pad(bits, (0, -len(bits) % 4), constant_values=0xFF)  # of 16-bit entries, a NaN
    index = torch.int64 if config.index == "int64" else torch.int32
    values, indices = output(scores.dtype), output(index)
    params = [matrix("scores", bits.view(np.uint32).copy(), length, stride)]
    if lengths is not None:
        words = lengths.numpy().view(np.uint32).copy()
        params.append(struct.pack("<Qi4x", memory.add("lengths", words), rows))
    params += [matrix("values", values, k, k), matrix("indices", indices, k, k)]
    Machine(
        load(ptx or ptx_of(config)),
        params,
        memory,
        policy_of(policy),
        grid=(rows * config.cluster, 1),
        cluster_size=config.cluster,
        shared_bytes=config.smem_bytes,
        dependent=frozenset(("scores", "lengths", "values", "indices") if config.pdl else ()),
    ).run()
    for words in (values, indices):
        if (words[-GUARD:] != FREE).any():
            raise SimulationError("the kernel has written behind its outputs")

    def result(words: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(words.copy()).view(dtype)[: rows * k].reshape(rows, k)

    return result(values, scores.dtype), result(indices, index)
