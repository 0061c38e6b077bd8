"""The seam between architectures: all that the rest of a kernel knows of its product.

A mainloop says how W and x lie in shared memory and how TMA brings them there, and yields each
epilogue thread its fp32 partial sums with their (expert, token) coordinates. Reduction and epilogue
know nothing else of WGMMA, tcgen05 or TMEM.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from cute_router.gemm.config import DecodeConfig


class Shared(NamedTuple):
    """What a CTA's product and its reduction share; see the map in `gemm.decode_kernel`."""

    sW: cute.Tensor  # W tile, STAGE last
    sX: cute.Tensor  # x tile, STAGE last
    sPart: cute.Tensor  # partial sums of the owned token columns, (column, expert, rank)
    full: cute.Pointer  # barriers, one for each stage: loaded
    free: cute.Pointer  # barriers, one for each stage: read, may be loaded again
    done: cute.Pointer  # barrier: the product is complete (sm_100)
    part: cute.Pointer  # barrier: the partial sums have arrived
    ticket: cute.Pointer  # this tile's place among those of its tokens
    tmem: cute.Pointer  # the address of the accumulators (sm_100)


class Mainloop(ABC):
    """L[e, n] += sum_k W[e, k] x[n, k] over a CTA's K blocks; experts -> MMA-M, tokens -> MMA-N."""

    vector: int  # token columns that lie side by side in a thread's registers
    mma_warp: bool  # whether a warp of its own issues the MMAs; else the epilogue's warps do

    def __init__(self, config: DecodeConfig):
        self.cfg = config

    @abstractmethod
    def layouts(self) -> tuple[Any, Any]:
        """Shared-memory layouts of the W tile and the x tile, STAGE last."""

    @abstractmethod
    def tma_atoms(self, mW: cute.Tensor, mX: cute.Tensor, layout_w: Any, layout_x: Any) -> Any:
        """(atom, coordinate tensor) for W and for x."""

    @abstractmethod
    def partition(
        self, atoms: Any, sW: cute.Tensor, sX: cute.Tensor, tile_e: Int32, tile_n: Int32
    ) -> Any:
        """The tiles of W and of x as TMA sees them: shared (TMA, STAGE), global (TMA, K_BLOCK)."""

    @abstractmethod
    def accumulate(self, s: Shared, tid: Int32) -> tuple[cute.Tensor, cute.Tensor]:
        """The thread's sums over this CTA's K blocks, with their (expert, token) coordinates."""

    @abstractmethod
    def issue(self, s: Shared, warp: int) -> None:
        """All that warp `warp`, the MMA warp, does; never run where there is none."""
