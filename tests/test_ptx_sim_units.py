"""The simulator's parts against NumPy, and against layouts of the PTX ISA written out by hand."""

import numpy as np
import pytest
import torch
from ptx_sim import tensor
from ptx_sim.engine import policy_of
from ptx_sim.errors import Deadlock, Hazard, Misuse, OutOfBounds
from ptx_sim.machine import Machine
from ptx_sim.memory import POISON, SHARED_BASE, GlobalMemory, Shared, Tmem
from ptx_sim.program import load
from ptx_sim.tensor import TensorMap

KERNEL = """
.version 9.4
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 __dynamic_shmem__0[];
.visible .entry k(.param .align 8 .b8 k_param_0[8])
.reqntid {threads}, 1, 1
{{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<99>;
  .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [k_param_0];
  mov.u32 %r1, %tid.x;
  mov.b32 %r2, __dynamic_shmem__0;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd1, %rd1, %rd2;
  {body}
  st.global.b32 [%rd1], %r9;
  ret;
}}
"""


def run(body: str, threads: int = 32, policy: str = "eager", *, races: bool = True) -> np.ndarray:
    """What every thread leaves in %r9; it starts with its number in %r1."""
    out = np.zeros(threads, np.uint32)
    memory = GlobalMemory()
    address = memory.add("out", out).to_bytes(8, "little")
    program = load(KERNEL.format(threads=threads, body=body))
    kwargs = {"grid": (1, 1), "cluster_size": 1, "shared_bytes": 4096, "races": races}
    Machine(program, [address], memory, policy_of(policy), **kwargs).run()
    return out


def bf16(values: np.ndarray) -> np.ndarray:
    """The bits of whole numbers in bf16."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def descriptor(address: int, blackwell: bool) -> int:
    """A K-major operand in 128-byte swizzled atoms of 8 rows, 1024 bytes apart."""
    layout = (2 << 61 | 1 << 46) if blackwell else 1 << 62
    return layout | 1024 >> 4 << 32 | address >> 4


def tiles(M: int, N: int) -> tuple[Shared, np.ndarray, np.ndarray]:
    """A (M, 64) and B (N, 64) in shared memory, by TMA: A at its start, B at 16384."""
    rng = np.random.default_rng(M + N)
    A, B = rng.integers(-8, 9, (M, 64)), rng.integers(-8, 9, (N, 64))
    shared = Shared(0, 65536)
    for matrix, at in ((A, 0), (B, 16384)):
        tensor_map = TensorMap("m", bf16(matrix), 64, len(matrix))
        tensor_map.write(shared, SHARED_BASE + at, tensor_map.box(0, 0))
    return shared, A, B


def product(M: int, N: int, tmem: Tmem, column: int, off: tuple = (0, 0, 0, 0)) -> np.ndarray:
    """A B^T in TMEM, in four steps of K = 16."""
    shared, A, B = tiles(M, N)
    bits = 1 << 4 | 1 << 7 | 1 << 10 | N // 8 << 17 | M // 16 << 24
    a, b = descriptor(SHARED_BASE, True), descriptor(SHARED_BASE + 16384, True)
    for k in range(4):
        disabled = np.array(off, np.uint32)
        tensor.tcgen05_mma(shared, tmem, column, a + 2 * k, b + 2 * k, bits, disabled, k > 0)
    return A @ B.T


def test_tma_stores_with_the_128_byte_swizzle():
    matrix = np.arange(16 * 64, dtype=np.uint16).reshape(16, 64)
    shared = Shared(1, 8192)
    TensorMap("m", matrix, 64, 16).write(shared, shared.base + 3072, matrix)
    for row in range(16):
        for piece in range(8):  # of 16 bytes
            at = (3072 + 128 * row + 16 * (piece ^ row % 8)) // 2
            assert (shared.halves[at : at + 8] == matrix[row, 8 * piece : 8 * piece + 8]).all()


def test_tma_reads_zeros_out_of_bounds():
    tensor_map = TensorMap("m", np.ones((10, 100), np.uint16), 80, 8)  # rows of 80, padded
    assert tensor_map.box(64, 8)[:2, :16].all()
    assert tensor_map.box(64, 8).sum() == 2 * 16
    assert tensor_map.box(0, 10).sum() == tensor_map.box(128, 0).sum() == 0
    assert tensor_map.box_bytes == 8 * 128


@pytest.mark.parametrize("N", [16, 32, 64, 256])
def test_mma_of_128_rows_read_by_32x32b(N):
    tmem = Tmem(32)
    column = tmem.allocate(N if N >= 32 else 32)
    wanted = product(128, N, tmem, column)
    for warp in range(4):
        address = column + (32 * warp << 16)
        registers = tensor.tmem_load(tmem, "32x32b", N, address, warp)
        rows = np.stack(registers, 1).view(np.float32)
        assert (rows == wanted[32 * warp : 32 * warp + 32]).all()


@pytest.mark.parametrize("N", [8, 16, 64])
def test_mma_of_64_rows_read_by_16x256b(N):
    tmem = Tmem(0)
    column = tmem.allocate(64)
    wanted = product(64, N, tmem, column)
    for warp in range(4):
        registers = tensor.tmem_load(tmem, "16x256b", N // 8, column + (32 * warp << 16), 4 + warp)
        for lane in range(32):
            for i, value in enumerate(registers):
                row, half = 16 * warp + lane // 4, i // 2 % 2
                n = i // 4 * 8 + lane % 4 * 2 + i % 2
                assert value.view(np.float32)[lane] == wanted[row + 8 * half, n]


def test_mma_leaves_disabled_lanes_alone():
    tmem = Tmem(0)
    column = tmem.allocate(32)
    product(128, 16, tmem, column, off=(0, 1 << 3, 0, 0xFFFFFFFF))
    untouched = np.isnan(tmem.words.view(np.float32)[:, column : column + 16]).all(1)
    assert np.flatnonzero(untouched).tolist() == [35, *range(96, 128)]


@pytest.mark.parametrize("N", [8, 64])
def test_wgmma_is_the_product(N):
    shared, A, B = tiles(64, N)
    a, b = descriptor(SHARED_BASE, False), descriptor(SHARED_BASE + 16384, False)
    for warp in range(4):
        sums = sum(tensor.wgmma(shared, a + 2 * k, b + 2 * k, N, warp) for k in range(4))
        for lane in range(32):
            for i in range(N // 2):
                row = 16 * warp + lane // 4 + i // 2 % 2 * 8
                n = i // 4 * 8 + lane % 4 * 2 + i % 2
                assert sums[i, lane] == (A @ B.T)[row, n]


def test_a_warp_reaches_its_own_tmem_lanes_only():
    tmem = Tmem(0)
    column = tmem.allocate(32)
    with pytest.raises(Misuse, match="cannot read"):
        tensor.tmem_load(tmem, "32x32b", 8, column, 1)
    with pytest.raises(Misuse, match="not allocated"):
        tensor.tmem_load(tmem, "32x32b", 64, column, 0)


MEET = " bar.warp.sync -1; "
ARITHMETIC = {
    "add.s32 %r9, %r1, -3": lambda i: i - 3,
    "shr.s32 %r8, %r1, 1; sub.s32 %r7, 5, %r8; shr.s32 %r9, %r7, 2": lambda i: (5 - i // 2) >> 2,
    "not.b32 %r8, %r1; mul.hi.u32 %r9, %r8, 10": lambda i: (2**32 - 1 - i) * 10 >> 32,
    "mad.lo.s32 %r9, %r1, %r1, 7": lambda i: i * i + 7,
    "shl.b32 %r9, %r1, 32": lambda i: 0,
    "min.s32 %r8, %r1, -1; max.u32 %r9, %r8, 3": lambda i: -1,
    "cvt.u16.u32 %rs1, %r1; mul.lo.s16 %rs2, %rs1, 7; cvt.u32.u16 %r9, %rs2": lambda i: 7 * i,
    "sub.s32 %r8, %r1, 130; cvt.s8.s32 %rs1, %r8; cvt.s32.s8 %r9, %rs1": lambda i: (
        (i - 130 + 128) % 256 - 128
    ),
    "mov.b64 %rd4, {%r1, 5}; mov.b64 {%r8, %r9}, %rd4": lambda i: 5,
    "setp.lt.u32 %p1, %r1, 9; selp.b32 %r9, 1, 2, %p1": lambda i: 1 if i < 9 else 2,
    "mov.b32 %r9, 4; setp.eq.b32 %p1, %r1, 3; @!%p1 add.s32 %r9, %r9, 1": lambda i: 5 - (i == 3),
    "shfl.sync.bfly.b32 %r9, %r1, 4, 31, -1": lambda i: i ^ 4,
    "shfl.sync.idx.b32 %r9, %r1, 7, 31, -1": lambda i: 7,
    "redux.sync.max.u32 %r9, %r1, -1": lambda i: 31,
    "elect.sync %r9|%p1, -1": lambda i: 0,
    "lop3.b32 %r9, %r1, 12, 3, 0xBA": lambda i: i & ~12 | 3,
    "shf.l.wrap.b32 %r9, 0xC0000001, %r1, 1": lambda i: 2 * i + 1,
    "shf.l.wrap.b32 %r9, 0xC0000001, %r1, 34": lambda i: 4 * i + 3,
    "prmt.b32 %r9, %r1, 0x80FF, 0x5C40": lambda i: 0x80FFFF00 | i,
    "prmt.b32 %r8, %r1, 300, 0x5410; dp2a.lo.u32.u32 %r9, %r8, 0x70503, 2": lambda i: (
        3 * i + 5 * 300 + 2
    ),
    "prmt.b32 %r8, %r1, 300, 0x5410; dp2a.hi.u32.u32 %r9, %r8, 0x6070503, 2": lambda i: (
        7 * i + 6 * 300 + 2
    ),
    "mov.b16 %rs1, 0x4200; mov.b32 %r8, 0x3F800000; sub.rn.f32.f16 %r9, %rs1, %r8": lambda i: (
        0x40000000  # 3 - 1
    ),
    "mov.b16 %rs1, 0x4040; mov.b32 %r8, 0x3F800000; add.rn.f32.bf16 %r9, %rs1, %r8": lambda i: (
        0x40800000  # 3 + 1
    ),
    "bfind.u32 %r9, %r1": lambda i: i.bit_length() - 1,
    "popc.b32 %r9, %r1": int.bit_count,
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1}": lambda i: i << 16,
    "setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r9, %p1, -1": lambda i: 31,
    "setp.eq.b32 %p1, %r1, 9; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 2, %p2": lambda i: (
        1
    ),
    "cvt.u16.u32 %rs1, %r1; st.global.b16 [%rd1+2], %rs1; ld.global.b32 %r9, [%rd1]": lambda i: (
        i << 16
    ),
    f"st.shared.b32 [%r2], 131077;{MEET}ld.shared.b16 %rs1, [%r2+2]; cvt.u32.u16 %r9, %rs1": (
        lambda i: 2
    ),
    f"st.shared.b32 [%r2], 0;{MEET}st.shared.b16 [%r2+2], %r1;{MEET}ld.shared.b32 %r9, [%r2]": (
        lambda i: 31 << 16
    ),
    f"st.shared.b32 [%r2], 0;{MEET}st.shared.b8 [%r2+1], 515;{MEET}"
    "ld.shared.v2.b8 {%rs1, %rs2}, [%r2]; mov.b32 %r9, {%rs1, %rs2}": lambda i: 3 << 16,
    "st.global.b32 [%rd1], 0x4433FF11; ld.global.b8 %rs1, [%rd1+1]; cvt.u32.u16 %r9, %rs1": (
        lambda i: 0xFF
    ),
    "sub.s32 %r8, 5, %r1; st.global.b32 [%rd1], %r8; ld.global.s32 %rd5, [%rd1];"
    " mov.b64 {%r8, %r9}, %rd5": lambda i: 0 if i <= 5 else -1,
    "cvt.u64.u32 %rd5, %r1; mul.hi.u64 %rd5, %rd5, -1; mov.b64 {%r9, %r8}, %rd5": (
        lambda i: max(i - 1, 0)
    ),
    "st.global.b32 [%rd1], %r1; ld.global.b32 %rd5, [%rd1]; mov.b64 {%r8, %r9}, %rd5": lambda i: 0,
    "mov.b32 %r8, 0fFFC00001; add.f32 %r9, %r8, 0f00000000": lambda i: 0x7FFFFFFF,
    "mov.b32 %r8, 0fFFC00001; mov.f32 %r9, %r8": lambda i: 0xFFC00001,
    "mov.b16 %rs1, 0x4000; mov.b16 %rs2, 0xC000; setp.lt.f16 %p1, %rs2, %rs1;"
    " setp.num.bf16 %p2, %rs1, %rs2; and.pred %p3, %p1, %p2; selp.b32 %r9, 1, 0, %p3": lambda i: 1,
}


@pytest.mark.parametrize("body", ARITHMETIC)
def test_integer_instructions(body):
    wanted = [ARITHMETIC[body](i) & 0xFFFFFFFF for i in range(32)]
    assert run(body + ";").tolist() == wanted


FLOATS = {
    "fma.rn.f32 %r9, %r8, %r8, 0fBF800000": lambda a: (a.double() * a - 1).float(),
    "max.f32 %r9, %r8, 0f7FC00000": lambda a: a,
    "div.rn.f32 %r9, 0f40400000, %r8": lambda a: 3 / a,
    "ex2.approx.ftz.f32 %r9, %r8": torch.exp2,
    "sqrt.approx.ftz.f32 %r9, %r8": torch.sqrt,
    "rcp.approx.ftz.f32 %r9, %r8": torch.reciprocal,
    "mov.b16 %rs1, 0x4200; cvt.f32.f16 %r9, %rs1": lambda a: torch.full_like(a, 3),
    "cvt.rn.bf16.f32 %rs1, %r8; mov.b16 %rs2, 0; mov.b32 %r9, {%rs2, %rs1}": (
        lambda a: a.bfloat16().float()
    ),
    "mov.b32 %r8, 0f7F812345; cvt.rn.bf16.f32 %rs1, %r8; cvt.f32.bf16 %r9, %rs1;"
    " max.f32 %r9, %r9, 0f40400000": lambda a: torch.full_like(a, 3),
    "mov.b32 %r8, 0f3F808000; cvt.rn.bf16.f32 %rs1, %r8; cvt.f32.bf16 %r9, %rs1": torch.ones_like,
    "mov.b16 %rs1, 0x4040; cvt.f32.bf16 %r9, %rs1": lambda a: torch.full_like(a, 3),
}


@pytest.mark.parametrize("body", FLOATS)
def test_floating_point_instructions(body):
    a = torch.arange(32) / 7 + 0.25
    out = run(
        f"cvt.rn.f32.u32 %r7, %r1; mov.b32 %r6, 0f40E00000; div.rn.f32 %r7, %r7, %r6;"
        f" add.f32 %r8, %r7, 0f3E800000; {body};"
    )
    torch.testing.assert_close(torch.from_numpy(out.view(np.float32)), FLOATS[body](a))


def test_divergent_loops_reconverge():
    """Lane i runs its loop i times; then all shuffle, which only a whole warp can."""
    body = """
      mov.b32 %r8, 0; mov.b32 %r7, 0;
      LOOP: setp.ge.u32 %p1, %r7, %r1; @%p1 bra DONE;
      add.s32 %r7, %r7, 1; add.s32 %r8, %r8, %r7; bra.uni LOOP;
      DONE: shfl.sync.bfly.b32 %r9, %r8, 0, 31, -1;"""
    assert run(body).tolist() == [i * (i + 1) // 2 for i in range(32)]


def test_a_shuffle_of_part_of_a_warp_is_refused():
    body = """
      setp.lt.u32 %p1, %r1, 9; @%p1 bra END; shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1; END:"""
    with pytest.raises(Misuse, match="23 lanes"):
        run(body)


EXCHANGE = """
  shl.b32 %r8, %r1, 2; add.s32 %r8, %r8, %r2; st.shared.b32 [%r8], %r1;
  {barrier} xor.b32 %r7, %r8, 128; ld.shared.b32 %r9, [%r7];"""


def test_warps_meet_at_a_barrier():
    for policy in ("eager", "lazy", "random1", "random2"):
        out = run(EXCHANGE.format(barrier="bar.sync 0;"), 64, policy)
        assert out.tolist() == [i ^ 32 for i in range(64)]


def test_a_missing_barrier_shows():
    with pytest.raises(Hazard, match="a race"):
        run(EXCHANGE.format(barrier=""), 64)


# Odd lanes copy four words, of which one is their number; even ones copy nothing from nowhere.
COPY = """
  st.global.b32 [%rd1], %r1; and.b32 %r5, %r1, 1; setp.eq.b32 %p1, %r5, 1;
  and.b64 %rd3, %rd1, -16; selp.b64 %rd3, %rd3, 16, %p1; selp.b32 %r5, 16, 0, %p1;
  shl.b32 %r4, %r1, 4; add.s32 %r4, %r4, %r2;
  cp.async.cg.shared.global [%r4], [%rd3], 16, %r5; cp.async.commit_group;
  cp.async.wait_group {pending}; and.b32 %r6, %r1, 3; shl.b32 %r6, %r6, 2; add.s32 %r6, %r6, %r4;
  ld.shared.b32 %r9, [%r6]; cp.async.wait_group 0;"""


@pytest.mark.parametrize("policy", ["eager", "lazy", "random1"])
def test_copies_have_landed_when_they_were_waited_for(policy):
    out = run(COPY.format(pending=0), policy=policy)
    assert out.tolist() == [i if i % 2 else 0 for i in range(32)]


def test_lazy_copies_land_no_earlier():
    assert (run(COPY.format(pending=1), policy="lazy", races=False) == POISON).all()


@pytest.mark.parametrize("policy", ["eager", "lazy", "random1"])
def test_to_read_where_copies_are_under_way_is_a_race(policy):
    with pytest.raises(Hazard, match="a race"):
        run(COPY.format(pending=1), policy=policy)


def test_a_deadlock_names_the_barrier():
    body = """
      setp.ne.b32 %p1, %r1, 0; @%p1 bra GO; mbarrier.init.shared.b64 [%r2], 2;
      mbarrier.arrive.shared.b64 %rd5, [%r2]; GO:
      mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; mov.b32 %r9, 1;"""
    with pytest.raises(Deadlock, match=r"1 of 2 arrivals and 0 bytes outstanding"):
        run(body)


def test_an_access_out_of_bounds_names_the_memory():
    with pytest.raises(OutOfBounds, match="shared memory of CTA 0"):
        run("ld.shared.b32 %r9, [%r2+4096];")
    with pytest.raises(OutOfBounds, match="out"):
        run("ld.global.b32 %r9, [%rd1+4];")


def test_an_array_may_end_within_a_word():
    memory, one = GlobalMemory(), np.arange(32) == 0
    address = np.full(32, memory.add("odd", np.zeros(1, np.uint32), 2), np.uint64)
    memory.array(address, one).load_halves(address, one, 1)
    with pytest.raises(OutOfBounds, match="2 bytes at offsets 0x0 to 0x2 of 2"):
        memory.array(address, one).load_halves(address + np.uint64(2), one, 1)
    with pytest.raises(OutOfBounds, match="4 bytes"):
        memory.array(address, one).load(address, one, 1)
