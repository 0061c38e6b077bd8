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
and the packets of `exchange` only after it. Dependents are triggered at the start: they wait for
this grid's end anyway, and meanwhile load weights of their own.
"""

from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import BFloat16, Boolean, Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator, TmemAllocator

from cute_router.epilogue.by_candidates import ByCandidates
from cute_router.epilogue.by_logits import ByLogits
from cute_router.epilogue.owner import Outputs, Owner
from cute_router.gemm.config import TILE_K, DecodeConfig
from cute_router.gemm.exchange import draw_ticket
from cute_router.gemm.mainloop_sm90 import MainloopSm90
from cute_router.gemm.mainloop_sm100 import MainloopSm100
from cute_router.gemm.split_k import SplitK

EPILOGUE_BARRIER, TMEM_BARRIER = 1, 2  # named barriers; 0 is the CTA's own


class Shared(NamedTuple):
    """A CTA's shared memory outside the choice."""

    sW: cute.Tensor  # W tile, STAGE last
    sX: cute.Tensor  # x tile, STAGE last
    sPart: cute.Tensor  # (column, expert, rank)
    full: cute.Pointer
    free: cute.Pointer
    done: cute.Pointer
    part: cute.Pointer
    ticket: cute.Pointer
    tmem: cute.Pointer  # where the TMEM allocator leaves its address


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
        mWeights: cute.Tensor,  # (N, k) fp32
        mIds: cute.Tensor,  # (N, k) int32
        mScratch: cute.Tensor,  # words, see `exchange`
        factor: Float32,
        stream: cuda.CUstream,
    ):
        c = self.cfg
        layout_w, layout_x = self.mainloop.layouts()
        atoms = self.mainloop.tma_atoms(mW, mX, layout_w, layout_x)
        token_tiles = cute.ceil_div(cute.size(mX, mode=[0]), c.tile_tokens)
        (atom_w, tW), (atom_x, tX) = atoms
        self.kernel.set_name_prefix("cute_router_decode", remove_cutlass_symbol=True)
        self.kernel(
            atom_w, tW, atom_x, tX, mBias, mWeights, mIds, mScratch, factor, layout_w, layout_x
        ).launch(
            grid=[c.expert_tiles * c.split_k, token_tiles, 1],
            block=[c.threads, 1, 1],
            cluster=[c.split_k, 1, 1],
            stream=stream,
            use_pdl=c.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        atom_w: cute.CopyAtom,
        tW: cute.Tensor,
        atom_x: cute.CopyAtom,
        tX: cute.Tensor,
        mBias: cute.Tensor | None,
        mWeights: cute.Tensor,
        mIds: cute.Tensor,
        mScratch: cute.Tensor,
        factor: Float32,
        layout_w: cute.ComposedLayout,
        layout_x: cute.ComposedLayout,
    ):
        c = self.cfg
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
            self.init_barriers(s, place)
            self.load_weights(atom_w, loads[0], s.full, place.rank)
        cute.arch.sync_threads()
        cute.arch.cluster_arrive_relaxed()  # the barriers of this CTA are there for its peers

        if warp < self.load_warp:
            self.epilogue(s, choice, place, tid, mBias, mScratch, Outputs(mWeights, mIds, factor))
        elif warp == self.load_warp:
            self.load(atom_w, atom_x, loads, s, place.rank)
        else:
            self.multiply(s)

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
    def init_barriers(self, s: Shared, place: Place) -> None:
        """Initialise the CTA's barriers and arm the split-K barrier of an owner. One warp calls."""
        c = self.cfg
        readers = 1 if cutlass.const_expr(c.blackwell) else c.epilogue_threads // 32
        with cute.arch.elect_one():
            for stage in cutlass.range_constexpr(c.stages):
                cute.arch.mbarrier_init(s.full + stage, 1)
                cute.arch.mbarrier_init(s.free + stage, readers)
            cute.arch.mbarrier_init(s.done, 1)
            cute.arch.mbarrier_init(s.part, 1)
            if place.owned > 0:
                self.split_k.expect(s.part, place.owned)
        cute.arch.mbarrier_init_fence()

    @cute.jit
    def load_weights(self, atom: cute.CopyAtom, tiles, full: cute.Pointer, rank: Int32) -> None:
        """Load the first K blocks of W, as many as shared memory holds."""
        c = self.cfg
        tWsW, tWgW = tiles
        for block in cutlass.range_constexpr(c.stages):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + block, c.tile_bytes)
            self.load_block(atom, tWsW, tWgW, full, rank, block, True)

    @cute.jit
    def load(self, atom_w: cute.CopyAtom, atom_x: cute.CopyAtom, loads, s: Shared, rank: Int32):
        """Load x behind the kernel ahead, then what of both did not fit at first."""
        c = self.cfg
        (tWsW, tWgW), (tXsX, tXgX) = loads
        cute.arch.griddepcontrol_wait()
        for block in cutlass.range_constexpr(c.k_blocks):
            stage = block % c.stages
            if cutlass.const_expr(block >= c.stages):
                cute.arch.mbarrier_wait(s.free + stage, (block // c.stages - 1) % 2)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(s.full + stage, c.tile_bytes)
                self.load_block(atom_w, tWsW, tWgW, s.full, rank, block, True)
            self.load_block(atom_x, tXsX, tXgX, s.full, rank, block)

    def load_block(self, atom, tSs, tSg, full, rank, block: int, is_w=False) -> None:
        """One TMA load: K block `block` of this CTA's slice."""
        c = self.cfg
        stage = block % c.stages
        source = tSg[(None, rank * c.k_blocks + block)]
        import os
        xp = os.environ.get("XP", "")
        pol = {"first": 0x12F0000000000000, "last": 0x14F0000000000000}.get(xp)
        if pol and is_w:
            cute.copy(atom, source, tSs[(None, stage)], tma_bar_ptr=full + stage, cache_policy=Int64(pol))
        else:
            cute.copy(atom, source, tSs[(None, stage)], tma_bar_ptr=full + stage)

    @cute.jit
    def multiply(self, s: Shared) -> None:
        """The MMA warp of sm_100."""
        if cutlass.const_expr(self.mainloop.mma_warp):
            tmem = self.tmem_allocator(s)
            tmem.allocate(self.mainloop.tmem_columns)
            tmem.wait_for_alloc()
            pointer = tmem.retrieve_ptr(Float32)
            self.mainloop.multiply(pointer, s.sW, s.sX, s.full, s.free, s.done)
            tmem.relinquish_alloc_permit()
            self.tmem_read().arrive_and_wait()
            tmem.free(pointer)

    def tmem_allocator(self, s: Shared) -> TmemAllocator:
        """The allocator of the accumulators: the MMA warp allocates, the epilogue retrieves."""
        threads = self.cfg.epilogue_threads + 32
        barrier = pipeline.NamedBarrier(TMEM_BARRIER, threads)
        return TmemAllocator(
            s.tmem, barrier_for_retrieve=barrier, allocator_warp_id=self.mma_warp
        )

    def tmem_read(self) -> pipeline.NamedBarrier:
        """Where the MMA warp waits until the accumulators are read, before it frees them."""
        return pipeline.NamedBarrier(TMEM_BARRIER, self.cfg.epilogue_threads + 32)

    @cute.jit
    def accumulators(self, s: Shared, tid: Int32):
        """The seam: the thread's partial sums and their (expert, token) coordinates."""
        if cutlass.const_expr(self.mainloop.mma_warp):
            tmem = self.tmem_allocator(s)
            tmem.wait_for_alloc()
            rAcc, coords = self.mainloop.read(tid, tmem.retrieve_ptr(Float32), s.done)
            self.tmem_read().arrive()
        else:
            rAcc, coords = self.mainloop.accumulate(tid, s.sW, s.sX, s.full, s.free)
        return rAcc, coords

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
            if cutlass.const_expr(c.expert_tiles > 1):
                if place.owned > 0:
                    s.ticket.store(draw_ticket(mScratch, place.tile_n, place.rank, c.expert_tiles))
            cute.arch.griddepcontrol_launch_dependents()
        expert = tid % c.tile_experts
        bias = self.bias_of(mBias, place.tile_e * c.tile_experts + expert)
        if cutlass.const_expr(not c.by_candidates):
            self.load_bias(mBias, choice.sBias, tid)

        rAcc, coords = self.accumulators(s, tid)
        cute.arch.griddepcontrol_wait()  # nothing global is written before this
        cute.arch.cluster_wait()  # the peers' barriers are initialised
        self.split_k.scatter(rAcc, coords, s.sPart, s.part, place.rank, place.columns)
        if place.owned > 0:
            self.split_k.wait(s.part)
            column = tid // c.tile_experts * self.split_k.vector
            while column < place.owned:
                for v in cutlass.range_constexpr(self.split_k.vector):
                    logit = self.split_k.sum(s.sPart, column + v, expert)
                    self.choice.put(choice, place.tile_e, expert, column + v, logit, bias)
                column = column + c.epilogue_threads // c.tile_experts * self.split_k.vector
            self.meet.arrive_and_wait()
            merging = Boolean(True)
            if cutlass.const_expr(c.expert_tiles > 1):
                merging = s.ticket.load() == c.expert_tiles - 1
            first = place.tile_n * c.tile_tokens + place.rank * c.owned
            owner = Owner(tid, place.tile_e, first, place.owned, merging)
            self.choice.finish(choice, mScratch, owner, out)

    @cute.jit
    def bias_of(self, mBias: cute.Tensor | None, expert: Int32) -> Float32:
        """The bias of an expert; 0 for padding and where there is none."""
        value = Float32(0.0)
        if cutlass.const_expr(mBias is not None):
            if expert < self.cfg.spec.num_experts:
                value = mBias[expert]
        return value

    @cute.jit
    def load_bias(self, mBias: cute.Tensor | None, sBias: cute.Tensor, tid: Int32) -> None:
        """All biases to shared memory, for the choice by logits."""
        expert = tid
        while expert < cute.size(sBias):
            sBias[expert] = self.bias_of(mBias, expert)
            expert = expert + self.cfg.epilogue_threads


def trace(config: DecodeConfig) -> tuple[DecodeKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    spec, N = config.spec, cute.sym_int32()
    E, K, k = spec.num_experts, spec.hidden_size, spec.top_k

    def matrix(rows):
        return make_fake_tensor(
            BFloat16, (rows, K), (cute.sym_int64(divisibility=8), 1), assumed_align=16
        )

    return DecodeKernel(config), (
        matrix(N),
        matrix(E),
        make_fake_tensor(Float32, (E,), (1,), assumed_align=4) if spec.has_bias else None,
        make_fake_tensor(Float32, (N, k), (k, 1), assumed_align=4),
        make_fake_tensor(Int32, (N, k), (k, 1), assumed_align=4),
        make_fake_tensor(Int32, (cute.sym_int32(),), (1,), assumed_align=16),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
