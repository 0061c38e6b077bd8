"""How what is known of a token meets: every CTA of a tile sends its part to the token's owner.

The r-th CTA of a cluster owns the r-th slice of the tile's tokens. What it gets is either

    logits    (expert, owned token, K part)      K parts are summed where they are read
    lists     of the experts that matter         `gemm.prefill_lists`

by st.async, which counts its bytes on the owner's barrier `part`; what is its own a CTA stores, and
its threads meet, but in large clusters it sends that too. Before any may come, every owner has told
every CTA of the cluster that there is `room`: where they have a place of their own, that those of
the last tile have been read; where they take that of the ring, each of its warps tells that its own
product is complete: all of them have emptied it.
"""

from abc import ABC, abstractmethod

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_mainloop import Pieces, PrefillMainloop, Shared, Start, Tiles
from cute_router.gemm.ptx import (
    arrive_at_peer,
    arrive_relaxed_at_peer,
    at_peer,
    store_async,
    wait_cluster,
    wait_for_peers,
)


class Exchange(ABC):
    """From accumulators to the owners' shared memory."""

    def __init__(self, config: PrefillConfig, mainloop: PrefillMainloop, meet):
        self.cfg = config
        self.vector = mainloop.vector  # experts of a run
        self.rows = mainloop.rows
        self.meet = meet  # named barrier of the epilogue's threads

    @abstractmethod
    def send(self, s: Shared, tiles: Tiles, turn: Int32, pieces: Pieces) -> None:
        """Send what is known from a thread's sums."""

    @cute.jit
    def expect(self, s: Shared, tiles: Tiles, tid: Int32) -> None:
        """Arm this owner's barrier for a tile."""
        c = self.cfg
        if cutlass.const_expr(c.cluster > 1):
            if tid == 0:
                owned = cutlass.min(c.tile_tokens - tiles.rank * c.owned, c.owned)
                sent = cutlass.max(owned, 0) * c.token_bytes
                cute.arch.mbarrier_arrive_and_expect_tx(s.part, sent)

    @cute.jit
    def open(self, s: Shared, turn: Int32) -> None:
        """Wait until the owners have room for what comes of tile `turn`."""
        if turn == 0:
            wait_for_peers(self.cfg.cluster)
        if cutlass.const_expr(self.cfg.overlay):
            # Each warp by itself, behind its product and the fence of the last `close`. If they met
            # first, while others wait at `meet`, racecheck would take their logits for races.
            self.say_room(s, cute.arch.lane_idx(), arrive_relaxed_at_peer)
            wait_cluster(s.room, turn % 2)
        elif cutlass.const_expr(self.cfg.cluster > 1):
            if turn > 0:
                wait_cluster(s.room, (turn - 1) % 2)

    @cute.jit
    def say_room(self, s: Shared, thread: Int32, arrive: cutlass.Constexpr) -> None:
        """Tell the cluster that there is room here; `arrive` says so to a peer."""
        if thread < self.cfg.cluster:
            arrive(s.room, thread)
        cute.arch.sync_warp()  # what follows takes whole warps

    @cute.jit
    def wait(self, s: Shared, turn: Int32) -> None:
        """Wait until all is here of the owned tokens of tile `turn`."""
        if cutlass.const_expr(self.cfg.stores_own):
            self.meet.arrive_and_wait()
        elif cutlass.const_expr(self.cfg.overlay):
            wait_cluster(s.room, turn % 2)  # warps that multiply nothing, for those that do
        if cutlass.const_expr(self.cfg.cluster > 1):
            wait_cluster(s.part, turn % 2)

    @cute.jit
    def close(self, s: Shared, tid: Int32) -> None:
        """This owner has read it: let the next ones come, or the next loads."""
        self.meet.arrive_and_wait()
        if cutlass.const_expr(self.cfg.cluster > 1):
            if cutlass.const_expr(self.cfg.overlay):
                cute.arch.fence_acq_rel_cluster()  # once, and not with every arrival at a peer
            else:
                self.say_room(s, tid, arrive_at_peer)


class LogitExchange(Exchange):
    """Rows of logits."""

    def send(self, s: Shared, tiles: Tiles, turn: Int32, pieces: Pieces) -> None:
        """Send sums to the owners of their tokens."""
        for piece in range(pieces.number):
            self.send_piece(s, tiles, *pieces.load(piece))

    @cute.jit
    def send_piece(self, s: Shared, tiles: Tiles, rAcc: cute.Tensor, at: list[Start]) -> None:
        """Send a piece of them, run by run."""
        c = self.cfg
        owners = [at[row][0] // c.owned for row in range(self.rows)]
        slots = [self.slot(s, tiles, at[row]) for row in range(self.rows)]
        if cutlass.const_expr(not c.stores_own):
            self.store_async(s, owners, slots, rAcc, at, range(len(at)))
        else:
            for row in cutlass.range_constexpr(self.rows):
                runs = range(row, len(at), self.rows)
                if cutlass.const_expr(c.cluster == 1) or owners[row] == tiles.rank:
                    self.store(slots[row], rAcc, at, runs)
                else:
                    self.store_async(s, owners, slots, rAcc, at, runs)

    def slot(self, s: Shared, tiles: Tiles, start: Start) -> cute.Pointer:
        """Where the owner of a run keeps it."""
        c, (token, expert) = self.cfg, start
        crd = (tiles.e_part * c.tile_experts + expert, token % c.owned, tiles.k_part)
        return s.sLogits.iterator + cute.assume(
            cute.crd2idx(crd, s.sLogits.layout), divby=self.vector
        )

    def store(self, slot: cute.Pointer, rAcc: cute.Tensor, at: list[Start], runs: range) -> None:
        """A token's sums to this CTA's own memory; its first run to `slot`."""
        v = self.vector
        for i in runs:
            rRun = cute.make_rmem_tensor(v, Float32)
            for j in range(v):
                rRun[j] = rAcc[v * i + j]
            distance = cute.assume(at[i][1] - at[runs[0]][1], divby=v)
            cute.make_tensor((slot + distance).align(4 * v), cute.make_layout(v)).store(rRun.load())

    def store_async(
        self,
        s: Shared,
        owners: list[Int32],
        slots: list[cute.Pointer],
        rAcc: cute.Tensor,
        at: list[Start],
        runs: range,
    ) -> None:
        """Sums to the owners of their tokens; the first run of each token to its slot there."""
        v, rows = self.vector, {i % self.rows for i in runs}
        there = {row: at_peer(slots[row], owners[row]) for row in rows}
        barriers = {row: at_peer(s.part, owners[row]) for row in rows}
        for i in runs:
            row = i % self.rows
            words = tuple(rAcc[v * i + j].bitcast(Int32) for j in range(v))
            store_async(there[row] + 4 * (at[i][1] - at[row][1]), words, barriers[row])
