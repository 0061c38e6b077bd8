"""Runs a decode kernel in the simulator, as `cute_router.gemm.decode` launches it on a GPU.

A tensor map is a handle to the kernel. What it stands for is what `DecodeKernel` asks for when it
makes the TMA atoms: rows of W and of x, boxes of a tile's rows by 64 columns, 128-byte swizzle.
"""

import functools
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cute_router import Extras, Routing
from cute_router.arch import MAX_CLUSTER
from cute_router.compile import trace_and_compile
from cute_router.gemm.config import TICKETS, DecodeConfig, ceil_div
from ptx_sim.engine import policy_of
from ptx_sim.errors import SimulationError
from ptx_sim.machine import Machine
from ptx_sim.memory import GlobalMemory
from ptx_sim.program import load
from ptx_sim.results import DEPENDENT as WRITTEN
from ptx_sim.results import ExtraParams, Results
from ptx_sim.tensor import TensorMap

EMPTY = 0xFFFFFFFF
DEPENDENT = WRITTEN | {"scratch"}  # of the kernel ahead, or like its


@functools.cache
def ptx_of(config: Any) -> str:
    """The PTX of a configuration, by the DSL's option to keep it."""
    with tempfile.TemporaryDirectory() as folder:
        text = trace_and_compile(config, f"--keep-ptx --dump-dir {folder}").__ptx__
        return text if "\n" in text else Path(text).read_text()


def simulate(
    config: DecodeConfig,
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    *,
    policy: str = "eager",
    factor: float = 1.0,
    ptx: str | None = None,
    extras: Extras | None = None,
) -> Routing:
    """The outputs of one launch; raises a `SimulationError` if anything goes wrong on the way."""
    c, N, k = config, x.shape[0], config.spec.top_k
    memory = GlobalMemory()
    scratch = np.full(TICKETS + N * c.packet_words, EMPTY, np.uint32)
    scratch[:TICKETS] = 0
    results, extra = Results(memory, N, k, c.extras), ExtraParams(memory, extras)

    params = [*tma_params("W", W, c.tile_experts), *tma_params("x", x, c.tile_tokens)]
    if bias is not None:
        params.append(tensor_param(memory, "bias", bias.numpy().view(np.uint32).copy()))
    params += results.params
    params.append(tensor_param(memory, "scratch", scratch, (scratch.size,)))
    params += [struct.pack("<f", factor), *extra.params]
    Machine(
        load(ptx or ptx_of(c)),
        params,
        memory,
        policy_of(policy),
        grid=(c.expert_tiles * c.split_k, ceil_div(N, c.tile_tokens)),
        cluster_size=c.split_k,
        shared_bytes=c.smem_bytes,
        dependent=DEPENDENT,
    ).run()
    check_scratch(scratch)
    extra.finish()
    return results.routing()


def tma_params(name: str, matrix: Tensor, rows: int) -> tuple[TensorMap, bytes]:
    """A tensor map of boxes of `rows`, and the sizes of the coordinate tensor that goes with it."""
    bits = matrix.contiguous().view(torch.int16).numpy().view(np.uint16)
    sizes = struct.pack("<2i", *matrix.shape)
    return TensorMap(name, bits, matrix.shape[1], rows, after_wait=name == "x"), sizes


def tensor_param(
    memory: GlobalMemory,
    name: str,
    words: np.ndarray,
    sizes: tuple[int, ...] = (),
    strides: tuple[int, ...] = (),
    *,
    size: int | None = None,
) -> bytes:
    """A kernel's parameter for a tensor: its address, then what of it run time alone knows.

    Its memory are the words, or only the first `size` bytes of them.
    """
    head = struct.pack(f"<Q{len(sizes)}i", memory.add(name, words, size), *sizes)
    return head.ljust(-(-len(head) // 8) * 8, b"\xff") + struct.pack(f"<{len(strides)}q", *strides)


def matrix_param(memory: GlobalMemory, name: str, rows: Tensor) -> bytes:
    """A copy of a matrix whose rows may be apart; what is between them the kernel could see."""
    (R, L), stride = rows.shape, rows.stride(0)
    flat = rows.as_strided(((R - 1) * stride + L,), (1,))  # no padding behind the last row
    return tensor_param(memory, name, words_of(flat), (R,), (stride,), size=flat.nbytes)


def words_of(t: Tensor) -> np.ndarray:
    """The bits of a dense tensor, as 32-bit words."""
    bits = t.contiguous().view(-1).view(torch.uint8).numpy().copy()
    return np.pad(bits, (0, -bits.size % 4)).view(np.uint32)


def check_scratch(scratch: np.ndarray) -> None:
    """Raise unless the next launch finds the scratch as this one did."""
    tickets = np.flatnonzero(scratch[:TICKETS])
    if tickets.size:
        tile, rank = divmod(int(tickets[0]), MAX_CLUSTER)
        raise SimulationError(f"the ticket of token tile {tile}, rank {rank} is not back at 0")
    full = np.flatnonzero(scratch[TICKETS:] != EMPTY)
    if full.size:
        raise SimulationError(f"{full.size} words of packets are left, the first at {full[0]}")
