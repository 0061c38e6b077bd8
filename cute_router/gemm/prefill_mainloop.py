"""The seam between architectures in prefill: all that the rest of the kernel knows of its product.

A mainloop says how x and W lie in shared memory and how TMA brings them there, and hands each
epilogue thread its fp32 sums with the places that they have, in one piece or in several.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import cutlass.cute as cute
from cutlass import Int32

from cute_router.epilogue.outputs import Outputs
from cute_router.gemm.prefill_config import PrefillConfig


class Shared(NamedTuple):
    """What the warps of a CTA share; see the map in `gemm.prefill_kernel`."""

    sX: cute.Tensor  # x tile, STAGE last
    sW: cute.Tensor  # W tile, STAGE last
    sLogits: Any  # (expert, owned token, K part); over sX and sW, or beside them
    sBias: cute.Tensor  # (expert)
    sLists: Any  # (entry, token of a warp, warp), or in their place
    sShort: Any  # short lists, (word, part of E, owned token)
    sDrafts: Any  # and what they are made from, (word, token of a warp, warp)
    full: cute.Pointer  # barriers, one for each stage: loaded
    free: cute.Pointer  # barriers, one for each stage: read, may be loaded again
    done: cute.Pointer  # barriers, one for each buffer: a tile's product is complete (sm_100)
    drained: cute.Pointer  # barriers, one for each buffer: it has been read (sm_100)
    part: cute.Pointer  # barrier: the owned tokens' logits or lists have arrived
    room: cute.Pointer  # barrier: every owner has room for them
    tmem: cute.Pointer  # the address of the accumulators (sm_100)


class Tiles(NamedTuple):
    """The token tiles of a CTA, and its share of each."""

    rank: Int32  # of the CTA in its cluster, of whose tokens it owns the slice of this number
    e_part: Int32  # which experts it multiplies
    k_part: Int32  # over which K
    first: Int32  # the first tile
    step: Int32  # from one tile to the next
    count: Int32  # tiles, at least one
    out: Outputs  # what becomes of them, and which rows are tokens


Start = tuple[Int32, Int32]  # (token, expert) of the first sum of a run, within a CTA's tile


class Pieces(NamedTuple):
    """The sums of a thread, in registers or to be read."""

    number: int
    # A piece, and where its runs of `vector` experts start; a thread's tokens take turns with them.
    load: Callable[[int], tuple[cute.Tensor, list[Start]]]


class Sink(Protocol):
    """Where sums go (`gemm.prefill_exchange`)."""

    def open(self, s: Shared, turn: Int32) -> None:
        """Wait until there is room for what comes of tile `turn`."""

    def send(self, s: Shared, tiles: Tiles, turn: Int32, pieces: Pieces) -> None:
        """Take the sums of a thread."""


class PrefillMainloop(ABC):
    """L[n, e] += sum_k x[n, k] W[e, k] over a CTA's K blocks; tokens -> MMA-M, experts -> MMA-N."""

    vector: int  # experts of a run: sums side by side, of one token
    rows: int  # tokens of a thread
    pieces: int  # in which it hands out its sums

    def __init__(self, config: PrefillConfig):
        self.cfg = config

    @abstractmethod
    def layouts(self) -> tuple[Any, Any]:
        """Shared-memory layouts of the x tile and the W tile, STAGE last."""

    @abstractmethod
    def tma_atoms(self, mX: cute.Tensor, mW: cute.Tensor, layout_x: Any, layout_w: Any) -> Any:
        """(atom, coordinate tensor) for x and for W."""

    @abstractmethod
    def partition(self, atoms: Any, sX: cute.Tensor, sW: cute.Tensor, tiles: Tiles) -> Any:
        """The tiles as TMA sees them: shared (TMA, STAGE); global (TMA, TILE, K_BLOCK) of x,
        (TMA, K_BLOCK) of W."""

    @abstractmethod
    def enter(self, s: Shared) -> None:
        """What the epilogue does before its first tile."""

    @abstractmethod
    def accumulate(self, s: Shared, tid: Int32, tiles: Tiles, turn: Int32, sink: Sink) -> None:
        """Take part in the product of tile `turn`; all of the thread's sums go to `sink`."""

    @abstractmethod
    def free_held(self, s: Shared, turn: Int32) -> None:
        """Free the stages of tile `turn` whose place its logits had taken."""

    @abstractmethod
    def leave(self) -> None:
        """What the epilogue does behind its last."""

    @abstractmethod
    def issue(self, s: Shared, tiles: Tiles, warp: int) -> None:
        """All that the MMA warp does; never run where there is none."""
