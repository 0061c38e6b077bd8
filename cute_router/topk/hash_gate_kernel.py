"""Hash routing weighed by the gate: only the products of the experts that the table chooses.

    l_j = sum_k x_k W[e_j, k];   a = activation(l);   w = a / sum(a) * factor

A CTA has one token. Each thread takes 16-byte chunks of K, of x once and of all k rows of W:

    every warp   x -> registers;  token id -> table row -> rows of W -> registers -> k sums
    warp 0       sums of the warps -> logits -> activations -> weights, lane j slot j

    token id -> table row -> rows of W: three dependent reads, the last one all at once. x and the
    token ids may be the work of the kernel ahead and are read after griddepcontrol.wait.

Every sum is taken in one fixed order. Within a chunk even and odd elements are summed apart, so
that up to K = 8192 no element goes through more than 16 roundings.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_router.epilogue.outputs import Outputs, extra_of
from cute_router.epilogue.scoring import activate
from cute_router.spec import HIDDEN_MULTIPLE
from cute_router.topk.config import WARP
from cute_router.topk.hash_config import HashGateConfig
from cute_router.topk.hash_row import (
    fake_extras,
    fake_lookup,
    fake_outputs,
    is_real,
    look_up,
    store_row,
)

CHUNK = HIDDEN_MULTIPLE  # bf16 elements of one load
WORDS = CHUNK // 2  # pairs of them


class HashGateKernel:
    """One configuration of the kernel, ready for `cute.compile`."""

    def __init__(self, config: HashGateConfig):
        self.cfg = config
        self.k = config.spec.top_k
        self.columns = 1 << (self.k - 1).bit_length()  # k, as halves need it
        self.warps = config.threads // WARP
        self.ragged = config.chunks % (config.threads * config.flight) != 0

    @cute.jit
    def __call__(
        self,
        mTokens: cute.Tensor | None,  # (N) token ids
        mTable: cute.Tensor,  # (vocab, k)
        mX: cute.Tensor,  # (N, K) bf16
        mW: cute.Tensor,  # (E, K) bf16
        mWeights: cute.Tensor | None,  # results, see `epilogue.outputs`
        mIds: cute.Tensor,
        factor: Float32,
        stream: cuda.CUstream,
        *extra,
    ):
        """Launch; traced into the kernel's host code."""
        self.kernel.set_name_prefix("cute_router_hash_gate", remove_cutlass_symbol=True)
        self.kernel(mTokens, mTable, mX, mW, mWeights, mIds, factor, extra_of(extra)).launch(
            grid=[cute.size(mX, mode=[0]), 1, 1],
            block=[self.cfg.threads, 1, 1],
            stream=stream,
            use_pdl=self.cfg.overlaps,
            min_blocks_per_mp=1,  # or ptxas saves registers, and waits between the loads
        )

    @cute.kernel
    def kernel(
        self,
        mTokens: cute.Tensor | None,
        mTable: cute.Tensor,
        mX: cute.Tensor,
        mW: cute.Tensor,
        mWeights: cute.Tensor | None,
        mIds: cute.Tensor,
        factor: Float32,
        extra: Any,
    ):
        """A CTA routes one token."""
        c, out = self.cfg, Outputs(mWeights, mIds, factor, extra)
        token, tid, lane = cute.arch.block_idx()[0], cute.arch.thread_idx()[0], cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        sPart = SmemAllocator().allocate_tensor(Float32, cute.make_layout((self.k, self.warps)), 16)
        if cutlass.const_expr(c.overlaps):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()

        rSum = cute.make_rmem_tensor(self.k, Float32)
        rX = self.load(mX, Int64(token), tid)  # on its way while the experts are looked up
        expert = look_up(mTokens, mTable, token, mW.shape[0], lane)
        real = is_real(mTokens, mTable, token, out)
        self.accumulate(rSum, rX, mW, expert, tid, first=True)
        for portion in cutlass.range(1, -(-c.steps // c.flight)):
            chunk = tid + portion * (c.flight * c.threads)
            self.accumulate(rSum, self.load(mX, Int64(token), chunk), mW, expert, chunk)

        self.gather(sPart[(None, warp)], rSum, lane)
        cute.arch.sync_threads()
        if warp == 0:
            slot = cutlass.min(lane, self.k - 1)
            sums = [sPart[slot, w] for w in range(self.warps)]
            activation = activate(sum_of(sums), c.spec.scoring)
            store_row(expert, activation, out, token, mW.shape[0], real, lane, c.spec)

    @cute.jit
    def load(self, matrix: cute.Tensor, row: Int64, chunk: Int32) -> cute.Tensor:
        """A row's chunks `chunk`, `chunk + threads`, ..., `flight` of them; zeros past K."""
        c = self.cfg
        rows = cute.make_rmem_tensor((WORDS, c.flight), Int32)
        for step in cutlass.range_constexpr(c.flight):
            at = chunk + step * c.threads
            if cutlass.const_expr(self.ragged):
                rows[(None, step)].fill(0)
                if at < c.chunks:
                    rows[(None, step)].store(words_at(matrix, row, at).load())
            else:
                rows[(None, step)].store(words_at(matrix, row, at).load())
        return rows  # (WORDS, flight)

    @cute.jit
    def accumulate(
        self,
        rSum: cute.Tensor,
        rX: cute.Tensor,
        mW: cute.Tensor,
        expert: Int32,
        chunk: Int32,
        first: cutlass.Constexpr = False,
    ) -> None:
        """Add the products of these chunks of x with those of every slot's row to its sum.

        The `first` ones are the sums.
        """
        c = self.cfg
        for start in cutlass.range_constexpr(0, self.k, c.slots):
            rW = []
            for slot in cutlass.range_constexpr(start, min(start + c.slots, self.k)):
                # A slot without expert reads the first row, for nothing.
                row = cutlass.max(cute.arch.shuffle_sync(expert, slot), 0)
                rW.append(self.load(mW, Int64(row), chunk))
            for i in cutlass.range_constexpr(len(rW)):
                products = [dot(rX[(None, s)], rW[i][(None, s)]) for s in range(c.flight)]
                total = sum_of(products)
                if cutlass.const_expr(not first):
                    total = rSum[start + i] + total
                rSum[start + i] = total

    @cute.jit
    def gather(self, sSums: cute.Tensor, rSum: cute.Tensor, lane: Int32) -> None:
        """The warp's k sums over its lanes, to shared memory.

        Halves of the warp exchange halves of the slots, until a lane has one: 9 shuffles for six
        or eight slots, where a sum for each slot by itself takes 5 a slot.
        """
        values = [rSum[j] if j < self.k else None for j in range(self.columns)]
        apart = WARP // 2
        while cutlass.const_expr(len(values) > 1):
            upper = (lane & apart) != 0
            pairs = zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True)
            values = [fold(low, high, upper, apart) for low, high in pairs]
            apart = apart // 2
        total = values[0]
        while cutlass.const_expr(apart > 0):
            total = total + cute.arch.shuffle_sync_bfly(total, offset=apart)
            apart = apart // 2
        lanes = WARP // self.columns  # that hold the same sum
        slot = lane // lanes
        if lane % lanes == 0 and slot < self.k:
            sSums[slot] = total


@cute.jit
def fold(low, high, upper, apart: cutlass.Constexpr):
    """Lower lanes get a slot's sum of both halves, upper lanes another's; None is no slot."""
    if cutlass.const_expr(high is None):
        total = low if cutlass.const_expr(low is None) else low + bfly(low, apart)
    else:
        kept, sent = cutlass.select_(upper, high, low), cutlass.select_(upper, low, high)
        total = kept + bfly(sent, apart)
    return total


def bfly(value: Float32, apart: int) -> Float32:
    """The value of the lane `apart` from this one."""
    return cute.arch.shuffle_sync_bfly(value, offset=apart)


def words_at(matrix: cute.Tensor, row: Int64, chunk: Int32) -> cute.Tensor:
    """A chunk of a row, as words of two elements each."""
    at = cute.assume(row * matrix.stride[0] + chunk * CHUNK, divby=CHUNK)
    words = cute.recast_ptr(matrix.iterator + at, dtype=Int32)
    return cute.make_tensor(words, cute.make_layout(WORDS))


def dot(rX: cute.Tensor, rW: cute.Tensor) -> Float32:
    """The product of two chunks."""
    even, odd = (a * b for a, b in zip(numbers(rX[0]), numbers(rW[0]), strict=True))
    for i in range(1, WORDS):
        (x_even, x_odd), (w_even, w_odd) = numbers(rX[i]), numbers(rW[i])
        even, odd = cute.math.fma(x_even, w_even, even), cute.math.fma(x_odd, w_odd, odd)
    return even + odd


def numbers(word: Int32) -> tuple[Float32, Float32]:
    """The two elements of a word: a bf16 is the upper half of an fp32."""
    return (word << 16).bitcast(Float32), (word & Int32(-0x10000)).bitcast(Float32)


def sum_of(values: list[Float32]) -> Float32:
    """The sum of a list, as a tree."""
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[2 * len(pairs) :]
    return values[0]


def trace(config: HashGateConfig) -> tuple[HashGateKernel, tuple[Any, ...]]:
    """The kernel of `config` and stand-ins for its arguments, for `cute.compile`."""
    K, N = config.spec.hidden_size, cute.sym_int32()

    def matrix(rows):
        stride = cute.sym_int64(divisibility=CHUNK)
        return make_fake_tensor(BFloat16, (rows, K), (stride, 1), assumed_align=16)

    return HashGateKernel(config), (
        *fake_lookup(config, N),
        matrix(N),
        matrix(cute.sym_int32()),
        *fake_outputs(config, N),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        *fake_extras(config, N),
    )
