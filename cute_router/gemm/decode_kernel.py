"""The fused decode router: weights, ids = renorm(topk(act(x W^T) + bias)), one launch.

    experts E -> MMA-M   tokens N -> MMA-N   (swap-AB: decode has few tokens, and MMA-M is wide)
    grid  (expert tiles x S, token tiles)    cluster of S CTAs: the K slices of one tile

    warp      role      work
    0..3(7)   epilogue  ticket, trigger dependents; [sm_90: WGMMA]; accumulators -> split-K scatter;
                        in owner CTAs: sum -> activation -> choice -> store
    next      load      barriers; TMA W, wait for the kernel ahead, TMA x
    last      mma       [sm_100 only] TMEM, tcgen05.mma

    barrier   producer -> consumer           arrivals            bytes
    full[s]   load -> mma                    1                   W tile + x tile
    free[s]   mma -> load (ring only)        1 or warps          -
    done      mma -> epilogue (sm_100)       1 (tcgen05.commit)  -
    part      cluster -> owner's epilogue    1                   S x MT x columns x 4

W and bias do not depend on the kernel ahead and are read before griddepcontrol.wait; x, the outputs
and the packets of `exchange` only after it. Dependents are triggered early (`trigger`): they wait
for this grid's end anyway, and meanwhile load weights of their own.
"""

from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import BFloat16, Boolean, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_router.epilogue.by_candidates import ByCandidates
from cute_router.epilogue.by_logits import ByLogits
from cute_router.epilogue.outputs import Outputs, extra_of, fake_extra, fake_results, put_logit
from cute_router.epilogue.owner import Owner
from cute_router.extras import PLAIN
from cute_router.gemm.config import DecodeConfig
from cute_router.gemm.exchange import draw_ticket
from cute_router.gemm.inputs import fake_inputs
from cute_router.gemm.mainloop import Shared
from cute_router.gemm.mainloop_sm90 import MainloopSm90
from cute_router.gemm.mainloop_sm100 import MainloopSm100
from cute_router.gemm.ptx import wait_for_peers
from cute_router.gemm.split_k import SplitK

# W is read once a step: it must not drive from the L2 the activations that others wait for. Worth
# 0.2 to 0.3 us of a chain at every N, for x is then still there (H200, benchmarks/router.py).
EVICT_FIRST = 0x12F0000000000000
EPILOGUE_BARRIER = 1  # named barrier of the epilogue's threads; 0 is the CTA's own


class Place(NamedTuple):
    """Where a CTA stands."""

    rank: Int32  # in the cluster: which K slice it multiplies, which token columns it owns
    tile_e: Int32
    tile_n: Int32
    columns: Int32  # of the tile that hold tokens
    owned: Int32  # of those, this CTA's; not positive where it owns none


class DecodeKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: DecodeConfig):
        self.cfg = config
        self.mainloop = (MainloopSm100 if config.blackwell else MainloopSm90)(config)
        self.split_k = SplitK(config, self.mainloop.vector)
        self.meet = pipeline.NamedBarrier(EPILOGUE_BARRIER, config.epilogue_threads)
        self.choice = (ByCandidates if config.by_candidates else ByLogits)(config, self.meet)
        self.load_warp = config.epilogue_threads // 32
        self.mma_warp = self.load_warp + 1

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # (N, K) bf16
        mW: cute.Tensor,  # (E, K) bf16
        mBias: cute.Tensor | None,  # (E) fp32
        mWeights: cute.Tensor | None,  # results, see `epilogue.outputs`
        mIds: cute.Tensor,
        mScratch: cute.Tensor,  # words, see `exchange`
        factor: Float32,
        stream: cuda.CUstream,
        *extra,
    ):
        """Make the TMA descriptors and launch; traced into the kernel's host code."""
        c = self.cfg
        layout_w, layout_x = self.mainloop.layouts()
        atoms = self.mainloop.tma_atoms(mW, mX, layout_w, layout_x)
        token_tiles = cute.ceil_div(cute.size(mX, mode=[0]), c.tile_tokens)
        (atom_w, tW), (atom_x, tX) = atoms
        self.kernel.set_name_prefix("cute_router_decode", remove_cutlass_symbol=True)
        results = mWeights, mIds, mScratch, factor, extra_of(extra)
        self.kernel(atom_w, tW, atom_x, tX, mBias, *results, layout_w, layout_x).launch(
            grid=[c.expert_tiles * c.split_k, token_tiles, 1],
            block=[c.threads, 1, 1],
            cluster=[c.split_k, 1, 1],
            stream=stream,
            smem=c.smem_bytes,
            use_pdl=c.pdl,
            # With extras ptxas would rather spill than let fewer CTAs share an SM.
            min_blocks_per_mp=0 if c.extras == PLAIN else 1,
        )

    @cute.kernel
    def kernel(
        self,
        atom_w: cute.CopyAtom,
        tW: cute.Tensor,
        atom_x: cute.CopyAtom,
        tX: cute.Tensor,
        mBias: cute.Tensor | None,
        mWeights: cute.Tensor | None,
        mIds: cute.Tensor,
        mScratch: cute.Tensor,
        factor: Float32,
        extra: Any,
        layout_w: cute.ComposedLayout,
        layout_x: cute.ComposedLayout,
    ):
        """The roles of a CTA's warps."""
        tid = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        place = self.locate(cute.size(mIds, mode=[0]))
        smem = SmemAllocator()
        s = self.allocate(smem, layout_w, layout_x)
        choice = self.choice.allocate(smem)

        loads = self.mainloop.partition(
            ((atom_w, tW), (atom_x, tX)), s.sW, s.sX, place.tile_e, place.tile_n
        )
        if warp == self.load_warp:
            cpasync.prefetch_descriptor(atom_w)
            cpasync.prefetch_descriptor(atom_x)
            self.init_barriers(s)
            self.load_weights(atom_w, loads[0], s.full, place.rank)
        cute.arch.sync_threads()
        cute.arch.cluster_arrive_relaxed()  # the barriers of this CTA are there for its peers

        if warp < self.load_warp:
            out = Outputs(mWeights, mIds, factor, extra)
            self.epilogue(s, choice, place, tid, mBias, mScratch, out)
        elif warp == self.load_warp:
            self.load(atom_w, atom_x, loads, s, place.rank)
        else:
            self.mainloop.issue(s, self.mma_warp)

    def locate(self, N: Int32) -> Place:
        """This CTA's place in the grid."""
        c = self.cfg
        bx, tile_n, _ = cute.arch.block_idx()
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        columns = cutlass.min(N - tile_n * c.tile_tokens, c.tile_tokens)
        owned = cutlass.min(columns - rank * c.owned, c.owned)
        return Place(rank, bx // c.split_k, tile_n, columns, owned)

    def allocate(self, smem: SmemAllocator, layout_w, layout_x) -> Shared:
        """Shared memory of the product and its reduction."""
        c = self.cfg
        sW, sX = (
            smem.allocate_tensor(BFloat16, layout.outer, 1024, swizzle=layout.inner)
            for layout in (layout_w, layout_x)
        )
        sPart = smem.allocate_tensor(Float32, self.split_k.layout(), 16)
        full, free = (smem.allocate_array(Int64, c.stages, byte_alignment=8) for _ in range(2))
        done, part = (smem.allocate_array(Int64, 1, byte_alignment=8) for _ in range(2))
        ticket, tmem = (smem.allocate_array(Int32, 1, byte_alignment=8) for _ in range(2))
        return Shared(sW, sX, sPart, full, free, done, part, ticket, tmem)

    @cute.jit
    def init_barriers(self, s: Shared) -> None:
        """Initialise the CTA's barriers and arm those of the first loads. One warp calls."""
        c = self.cfg
        readers = 1 if cutlass.const_expr(c.blackwell) else c.epilogue_threads // 32
        with cute.arch.elect_one():
            for stage in cutlass.range_constexpr(c.stages):
                cute.arch.mbarrier_init(s.full + stage, 1)
                cute.arch.mbarrier_init(s.free + stage, readers)
            cute.arch.mbarrier_init(s.done, 1)
            cute.arch.mbarrier_init(s.part, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()  # the lane elected next may be another
        with cute.arch.elect_one():
            for stage in cutlass.range_constexpr(c.stages):
                cute.arch.mbarrier_arrive_and_expect_tx(s.full + stage, c.tile_bytes)

    @cute.jit
    def load_weights(self, atom: cute.CopyAtom, tiles, full: cute.Pointer, rank: Int32) -> None:
        """Load the first K blocks of W, as many as shared memory holds."""
        tWsW, tWgW = tiles
        for block in cutlass.range_constexpr(self.cfg.stages):
            self.load_block(atom, tWsW, tWgW, full, rank, block, Int64(EVICT_FIRST))

    @cute.jit
    def load(self, atom_w: cute.CopyAtom, atom_x: cute.CopyAtom, loads, s: Shared, rank: Int32):
        """Load x behind the kernel ahead, then what of both did not fit at first."""
        c = self.cfg
        (tWsW, tWgW), (tXsX, tXgX) = loads
        cute.arch.griddepcontrol_wait()
        for block in cutlass.range_constexpr(c.stages):
            self.load_block(atom_x, tXsX, tXgX, s.full, rank, block)
        wait_for_peers(c.split_k)
        if cutlass.const_expr(not c.resident):
            for block in cutlass.range(c.stages, c.k_blocks):
                stage = block % c.stages
                cute.arch.mbarrier_wait(s.free + stage, (block // c.stages - 1) % 2)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(s.full + stage, c.tile_bytes)
                self.load_block(atom_w, tWsW, tWgW, s.full, rank, block, Int64(EVICT_FIRST))
                self.load_block(atom_x, tXsX, tXgX, s.full, rank, block)
        # See the loads through: a thread that arrived at a barrier should not leave before it.
        for block in cutlass.range(c.k_blocks - c.stages, c.k_blocks, unroll_full=c.resident):
            cute.arch.mbarrier_wait(s.full + block % c.stages, block // c.stages % 2)

    def load_block(self, atom, tSs, tSg, full, rank, block, policy=None) -> None:
        """One TMA load: K block `block` of this CTA's slice."""
        c = self.cfg
        stage = block % c.stages
        source = tSg[(None, rank * c.k_blocks + block)]
        cute.copy(atom, source, tSs[(None, stage)], tma_bar_ptr=full + stage, cache_policy=policy)

    @cute.jit
    def epilogue(
        self,
        s: Shared,
        choice: NamedTuple,
        place: Place,
        tid: Int32,
        mBias: cute.Tensor | None,
        mScratch: cute.Tensor,
        out: Outputs,
    ) -> None:
        """From partial sums to stored weights and ids."""
        c = self.cfg
        if tid == 0:
            if place.owned > 0:
                self.split_k.expect(s.part, place.owned)
                if cutlass.const_expr(c.expert_tiles > 1):
                    s.ticket.store(draw_ticket(mScratch, place.tile_n, place.rank, c.expert_tiles))
            if cutlass.const_expr(c.trigger == "start"):
                cute.arch.griddepcontrol_launch_dependents()
        first = place.tile_n * c.tile_tokens + place.rank * c.owned
        o = Owner(tid, place.tile_e, first, place.owned, Boolean(True))
        mine = place.tile_e * c.tile_experts + o.item(c, 0)[0]
        biases = [self.bias_of(mBias, mine)]
        if cutlass.const_expr(c.extras.second_bias):
            biases.append(self.bias_of(out.extra.mSecondBias, mine))
        self.choice.prepare(choice, mBias, tid, out)

        wait_for_peers(c.split_k)
        cute.arch.griddepcontrol_wait()  # nothing global is written before this
        if cutlass.const_expr(c.trigger == "wait"):
            if tid == 0:
                cute.arch.griddepcontrol_launch_dependents()
        self.choice.look(choice, o, out)
        rAcc, coords = self.mainloop.accumulate(s, tid)
        if cutlass.const_expr(c.trigger == "product"):
            if tid == 0:
                cute.arch.griddepcontrol_launch_dependents()
        self.split_k.scatter(rAcc, coords, s.sPart, s.part, place.rank, place.columns)
        if place.owned > 0:
            self.split_k.wait(s.part)
            for step in cutlass.range_constexpr(c.passes):
                expert, column, part = o.item(c, step)
                logit = self.split_k.sum(s.sPart, column, expert, part, c.parts)
                self.choice.put(choice, step, o, expert, column, logit, biases)
                if cutlass.const_expr(c.extras.logits):
                    if part == 0 and column < place.owned and mine < c.spec.num_experts:
                        put_logit(out, first + column, mine, logit)
            self.meet.arrive_and_wait()
            if cutlass.const_expr(c.expert_tiles > 1):
                o = o._replace(merging=s.ticket.load() == c.expert_tiles - 1)
            self.choice.finish(choice, mScratch, o, out)

    @cute.jit
    def bias_of(self, mBias: Any, expert: Int32) -> Float32:
        """The bias of an expert; 0 for padding and where there is none."""
        value = Float32(0.0)
        if cutlass.const_expr(mBias is not None):
            if expert < self.cfg.spec.num_experts:
                value = mBias[expert]
        return value


def trace(config: DecodeConfig) -> tuple[DecodeKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    spec, N = config.spec, cute.sym_int32()
    return DecodeKernel(config), (
        *fake_inputs(spec, N),
        *fake_results(N, spec.top_k, config.extras),
        make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=16),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *fake_extra(N, spec.num_experts, config.extras),
    )
