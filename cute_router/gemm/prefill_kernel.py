"""The fused prefill router: weights, ids = renorm(topk(act(x W^T) + bias)), one launch.

    tokens N -> MMA-M   experts E -> MMA-N
    cluster of split_e x split_k CTAs: the experts and the K slices of one token tile. Each of them
    owns some of the tile's tokens, and gets all their logits, or short lists of the experts that
    matter (`epilogue.shortlist`). Clusters take tiles in turns. Logits never leave the cluster.

    warp        role      work
    0..7 (3)    epilogue  bias; for each tile
                          [sm_90: WGMMA, a warpgroup for 64 tokens]; accumulators -> logits or
                          lists of the owners (trigger dependents) -> choice -> store
    next        load      barriers; TMA some W, wait for the kernel ahead, TMA x and W; a ring
                          [sm_90: of a warpgroup that trades registers; its other warps leave]
    last        mma       [sm_100 only] TMEM, tcgen05.mma

    barrier     producer -> consumer           arrivals                     bytes
    full[s]     load -> mma                    1                            x tile + W tile
    free[s]     mma -> load                    warps, or 1 (tcgen05.commit) -
    done[b]     mma -> epilogue (sm_100)       1 (tcgen05.commit)           -
    drained[b]  epilogue -> mma (sm_100)       its warps                    -
    part        cluster -> owner's epilogue    1                            owned tokens' part
    room        owners -> cluster's epilogues  CTAs, or warps that multiply -

A CTA waits for everything that others send it, so that none exits too early and no barrier of the
cluster stands at the end.

W and bias do not depend on the kernel ahead and are read before griddepcontrol.wait; x and the
outputs only after it. Dependents are triggered behind the last product: they wait for this grid's
end anyway, and before, their loads would meet this grid's.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint16
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_router.epilogue.by_lists import ByLists
from cute_router.epilogue.by_rows import ByRows
from cute_router.epilogue.outputs import Outputs, extra_of, fake_extra, fake_results, put_biases
from cute_router.gemm.inputs import fake_inputs
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.gemm.prefill_exchange import LogitExchange
from cute_router.gemm.prefill_lists import ListExchange
from cute_router.gemm.prefill_mainloop import Shared, Tiles
from cute_router.gemm.prefill_sm90 import PrefillSm90
from cute_router.gemm.prefill_sm100 import PrefillSm100
from cute_router.gemm.ptx import wait_for_peers
from cute_router.topk.config import WARP

EPILOGUE_REGISTERS, LOAD_REGISTERS = 240, 24  # where they are traded: 504 for 4 threads of an SM
EPILOGUE_BARRIER = 1  # named barrier of the epilogue's threads; 0 is the CTA's own
# K blocks of W that are loaded before the wait for the kernel ahead. In a CTA that starts late, for
# want of a free SM, the wait is short, and more would be in the way of x.
AHEAD = 2


class PrefillKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: PrefillConfig):
        self.cfg = config
        self.mainloop = (PrefillSm100 if config.blackwell else PrefillSm90)(config)
        self.meet = pipeline.NamedBarrier(EPILOGUE_BARRIER, config.epilogue_threads)
        exchange = ListExchange if config.shortlists else LogitExchange
        self.exchange = exchange(config, self.mainloop, self.meet)
        self.choice = (ByLists if config.shortlists else ByRows)(config)
        self.load_warp = config.epilogue_threads // WARP
        self.mma_warp = self.load_warp + 1
        self.all_multiply = config.mma_threads == config.epilogue_threads
        self.head = min(config.stages, config.k_blocks)  # K blocks that find their stage empty
        self.ahead = min(self.head, AHEAD)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (N, K) bf16
        mW: cute.Tensor,  # (E, K) bf16
        mBias: cute.Tensor | None,  # (E) fp32
        mWeights: cute.Tensor | None,  # results, see `epilogue.outputs`
        mIds: cute.Tensor,
        factor: Float32,
        stream: cuda.CUstream,
        *extra,
    ):
        """Make the TMA descriptors and launch; traced into the kernel's host code."""
        c = self.cfg
        layout_x, layout_w = self.mainloop.layouts()
        (atom_x, tX), (atom_w, tW) = self.mainloop.tma_atoms(mX, mW, layout_x, layout_w)
        self.kernel.set_name_prefix("cute_router_prefill", remove_cutlass_symbol=True)
        results = mWeights, mIds, factor, extra_of(extra)
        self.kernel(atom_x, tX, atom_w, tW, mBias, *results, layout_x, layout_w).launch(
            grid=[self.grid(cute.size(mX, mode=[0]))[1] * c.cluster, 1, 1],
            block=[c.threads, 1, 1],
            cluster=[c.cluster, 1, 1],
            stream=stream,
            smem=c.smem_bytes,
            use_pdl=c.pdl,
            min_blocks_per_mp=1,
        )

    def grid(self, N: Int32) -> tuple[Int32, Int32]:
        """Token tiles, and clusters that take them in turns."""
        tiles = cute.ceil_div(N, self.cfg.tile_tokens)
        return tiles, cutlass.min(tiles, self.cfg.clusters)

    @cute.kernel
    def kernel(
        self,
        atom_x: cute.CopyAtom,
        tX: cute.Tensor,
        atom_w: cute.CopyAtom,
        tW: cute.Tensor,
        mBias: cute.Tensor | None,
        mWeights: cute.Tensor | None,
        mIds: cute.Tensor,
        factor: Float32,
        extra: Any,
        layout_x: cute.ComposedLayout,
        layout_w: cute.ComposedLayout,
    ):
        """The roles of a CTA's warps."""
        c = self.cfg
        tid = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tiles = self.locate(Outputs(mWeights, mIds, factor, extra))
        s = self.allocate(SmemAllocator(), layout_x, layout_w)
        loads = self.mainloop.partition(((atom_x, tX), (atom_w, tW)), s.sX, s.sW, tiles)
        if warp == self.load_warp:
            cpasync.prefetch_descriptor(atom_x)
            cpasync.prefetch_descriptor(atom_w)
            self.init_barriers(s)
            for block in cutlass.range_constexpr(self.ahead):
                self.load_weights(atom_w, loads, s, tiles, Int32(block))
        cute.arch.sync_threads()
        if cutlass.const_expr(c.cluster > 1):
            cute.arch.cluster_arrive_relaxed()  # the barriers of this CTA are there for its peers

        if warp < self.load_warp:
            if cutlass.const_expr(not c.blackwell):
                cute.arch.setmaxregister_increase(EPILOGUE_REGISTERS)
            self.epilogue(s, tiles, tid, mBias)
        else:
            if cutlass.const_expr(not c.blackwell):
                cute.arch.setmaxregister_decrease(LOAD_REGISTERS)
            if warp == self.load_warp:
                self.load(atom_x, atom_w, loads, s, tiles)
            elif cutlass.const_expr(c.blackwell):
                self.mainloop.issue(s, tiles, self.mma_warp)

    def locate(self, out: Outputs) -> Tiles:
        """This CTA's tiles and its share of them."""
        c = self.cfg
        tiles, clusters = self.grid(cute.size(out.mIds, mode=[0]))
        cluster = cute.arch.block_idx()[0] // c.cluster
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        return Tiles(
            rank,
            e_part=rank % c.split_e,
            k_part=rank // c.split_e,
            first=cluster,
            step=clusters,
            count=(tiles - cluster + clusters - 1) // clusters,
            out=out,
        )

    def allocate(self, smem: SmemAllocator, layout_x, layout_w) -> Shared:
        """Shared memory of a CTA."""
        c = self.cfg
        sX, sW = (
            smem.allocate_tensor(BFloat16, layout.outer, 1024, swizzle=layout.inner)
            for layout in (layout_x, layout_w)
        )
        sLogits = self.allocate_logits(smem, sX)
        biases = cute.make_layout((c.padded, 2) if c.extras.second_bias else c.padded)
        sBias = smem.allocate_tensor(Float32, biases, 16)
        sLists = sShort = sDrafts = None
        if c.shortlists:
            shapes = c.short_lists, c.drafts
            layouts = (cute.make_layout(shape) for shape in shapes)
            sShort, sDrafts = (smem.allocate_tensor(Int32, layout, 16) for layout in layouts)
        elif c.by_threshold:
            code = {1: Uint8, 2: Uint16}[c.list_bytes]
            sLists = smem.allocate_tensor(code, cute.make_layout(c.lists), 16)
        lists = sLists, sShort, sDrafts
        full, free = (smem.allocate_array(Int64, c.stages, byte_alignment=8) for _ in range(2))
        done, drained = (smem.allocate_array(Int64, c.buffers, byte_alignment=8) for _ in range(2))
        part, room = (smem.allocate_array(Int64, 1, byte_alignment=8) for _ in range(2))
        tmem = smem.allocate_array(Int32, 1, byte_alignment=8)
        barriers = full, free, done, drained, part, room
        return Shared(sX, sW, sLogits, sBias, *lists, *barriers, tmem)

    def allocate_logits(self, smem: SmemAllocator, sX: cute.Tensor) -> cute.Tensor | None:
        """Room for the owned tokens' logits; None where only lists are exchanged."""
        c = self.cfg
        if c.shortlists:
            return None
        logits = cute.make_layout(c.logits)
        if not c.overlay:
            return smem.allocate_tensor(Float32, logits, 16)
        excess = cute.cosize(logits) * 4 - c.stages * c.tile_bytes
        if excess > 0:
            smem.allocate(excess, 16)
        return cute.make_tensor(cute.recast_ptr(sX.iterator, None, Float32), logits)

    @cute.jit
    def init_barriers(self, s: Shared) -> None:
        """Initialise the CTA's barriers and arm those of the first loads. One warp calls."""
        c = self.cfg
        readers = 1 if c.blackwell else c.mma_threads // WARP
        with cute.arch.elect_one():
            for stage in cutlass.range_constexpr(c.stages):
                cute.arch.mbarrier_init(s.full + stage, 1)
                cute.arch.mbarrier_init(s.free + stage, readers)
            for buffer in cutlass.range_constexpr(c.buffers):
                cute.arch.mbarrier_init(s.done + buffer, 1)
                cute.arch.mbarrier_init(s.drained + buffer, c.epilogue_threads // WARP)
            cute.arch.mbarrier_init(s.part, 1)
            cute.arch.mbarrier_init(s.room, c.room_arrivals)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()  # the lane elected next may be another
        with cute.arch.elect_one():
            for stage in cutlass.range_constexpr(self.head):
                cute.arch.mbarrier_arrive_and_expect_tx(s.full + stage, c.tile_bytes)

    def load_weights(self, atom_w, loads, s: Shared, tiles: Tiles, block: Int32) -> None:
        """One TMA load of W; blocks are counted over all tiles."""
        c, (tWsW, tWgW) = self.cfg, loads[1]
        stage, depth = block % c.stages, tiles.k_part * c.k_blocks + block % c.k_blocks
        cute.copy(atom_w, tWgW[(None, depth)], tWsW[(None, stage)], tma_bar_ptr=s.full + stage)

    def load_tokens(self, atom_x, loads, s: Shared, tiles: Tiles, block: Int32) -> None:
        """One TMA load of x."""
        c, (tXsX, tXgX) = self.cfg, loads[0]
        stage, depth = block % c.stages, tiles.k_part * c.k_blocks + block % c.k_blocks
        tile = tiles.first + block // c.k_blocks * tiles.step
        source = tXgX[(None, tile, depth)]
        cute.copy(atom_x, source, tXsX[(None, stage)], tma_bar_ptr=s.full + stage)

    @cute.jit
    def load(self, atom_x: cute.CopyAtom, atom_w: cute.CopyAtom, loads, s: Shared, tiles: Tiles):
        """Load x behind the kernel ahead, and what of W is not under way yet."""
        c = self.cfg
        cute.arch.griddepcontrol_wait()
        for block in cutlass.range_constexpr(self.head):
            self.load_tokens(atom_x, loads, s, tiles, Int32(block))
            if cutlass.const_expr(block >= self.ahead):
                self.load_weights(atom_w, loads, s, tiles, Int32(block))
        for block in cutlass.range(self.head, c.k_blocks):
            self.load_behind(atom_x, atom_w, loads, s, tiles, block)
        wait_for_peers(c.cluster)
        for block in cutlass.range(c.k_blocks, tiles.count * c.k_blocks):
            self.load_behind(atom_x, atom_w, loads, s, tiles, block)

    @cute.jit
    def load_behind(self, atom_x, atom_w, loads, s: Shared, tiles: Tiles, block: Int32) -> None:
        """Load a block to where another one was."""
        c = self.cfg
        self.wait_free(s, block)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(s.full + block % c.stages, c.tile_bytes)
        self.load_tokens(atom_x, loads, s, tiles, block)
        self.load_weights(atom_w, loads, s, tiles, block)

    @cute.jit
    def wait_free(self, s: Shared, block: Int32) -> None:
        """Wait until the block before this one in its stage has been read."""
        c = self.cfg
        barrier, phase = s.free + block % c.stages, (block // c.stages + 1) % 2
        cute.arch.mbarrier_wait(barrier, phase)
        if cutlass.const_expr(c.overlay):
            if block % c.k_blocks < c.held:  # logits were there
                cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def epilogue(self, s: Shared, tiles: Tiles, tid: Int32, mBias: Any) -> None:
        """From products to stored weights and ids, tile by tile."""
        c = self.cfg
        if cutlass.const_expr(c.extras.second_bias):
            put_biases(s.sBias, mBias, tiles.out.extra, c.spec.num_experts, tid, c.epilogue_threads)
        elif cutlass.const_expr(mBias is not None):
            expert = tid
            while expert < c.spec.num_experts:
                s.sBias[expert] = mBias[expert]
                expert = expert + c.epilogue_threads
        cute.arch.griddepcontrol_wait()  # nothing global is written before this
        self.meet.arrive_and_wait()
        self.mainloop.enter(s)
        if cutlass.const_expr(not self.all_multiply):
            if tid >= c.mma_threads:  # the others do so behind their product
                wait_for_peers(c.cluster)
        for turn in cutlass.range(tiles.count):
            self.tile(s, tiles, turn, tid)
        self.mainloop.leave()

    @cute.jit
    def tile(self, s: Shared, tiles: Tiles, turn: Int32, tid: Int32) -> None:
        """One token tile."""
        c, out = self.cfg, tiles.out
        last = turn + 1 == tiles.count
        self.exchange.expect(s, tiles, tid)
        if cutlass.const_expr(self.all_multiply) or tid < c.mma_threads:
            self.mainloop.accumulate(s, tid, tiles, turn, self.exchange)
            if last:  # no load will meet logits
                cute.arch.griddepcontrol_launch_dependents()
                self.mainloop.free_held(s, turn)
        self.exchange.wait(s, turn)
        has_bias = c.spec.has_bias or c.extras.second_bias
        sBias = s.sBias if cutlass.const_expr(has_bias) else None
        tile = (tiles.first + turn * tiles.step) * c.tile_tokens
        first = tile + tiles.rank * c.owned
        end = cutlass.min(tile + c.tile_tokens, cute.size(out.mIds, mode=[0]))
        count = cutlass.min(end - first, c.owned)
        self.choice.choose(s, sBias, first, count, out)
        if not last:
            self.exchange.close(s, tid)
            if cutlass.const_expr(self.all_multiply) or tid < c.mma_threads:
                self.mainloop.free_held(s, turn)


def trace(config: PrefillConfig) -> tuple[PrefillKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    spec, N = config.spec, cute.sym_int32()
    return PrefillKernel(config), (
        *fake_inputs(spec, N),
        *fake_results(N, spec.top_k, config.extras),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *fake_extra(N, spec.num_experts, config.extras),
    )
