"""Races in shared memory, found in any one order: small kernels, and faults planted in ours.

Every simulation in eager order looks for them, in whatever file.
"""

import re

import numpy as np
import pytest
from ptx_sim.errors import Hazard
from ptx_sim.launch import ptx_of
from ptx_sim.launch_prefill import simulate_prefill
from ptx_sim.problem import assert_same, exact_inputs, expected
from ptx_sim.races import AGENTS, COPIES, Access, Clock, History, Words
from test_ptx_sim_units import run

from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.spec import RouterSpec

ORDERS = ("eager", "lazy", "random0")

# Every thread stores a word and loads that of another one.
SWAP = """
  shl.b32 %r8, %r1, 2; add.s32 %r8, %r8, %r2; xor.b32 %r7, %r8, {apart};
  st.shared.b32 [%r8], %r1; {between} ld.shared.b32 %r9, [%r7];"""
LANE, OTHER_WARP = 4, 128  # bytes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("apart", "between"),
    [
        (LANE, "bar.warp.sync -1;"),
        (LANE, "bar.sync 0;"),
        (OTHER_WARP, "bar.sync 0;"),
        (0, ""),
    ],
)
def test_what_a_barrier_orders_is_no_race(order, apart, between):
    out = run(SWAP.format(apart=apart, between=between), 64, order)
    assert out.tolist() == [i ^ apart // 4 for i in range(64)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("apart", "between"),
    [
        (LANE, ""),
        (LANE, "shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;"),
        (OTHER_WARP, ""),
        (OTHER_WARP, "bar.warp.sync -1;"),
        (OTHER_WARP, "fence.acq_rel.cta;"),
    ],
)
def test_what_no_barrier_orders_is_a_race(order, apart, between):
    with pytest.raises(Hazard, match="a race"):
        run(SWAP.format(apart=apart, between=between), 64, order)


def test_a_word_is_not_written_again_before_others_have_read_it():
    again = SWAP.format(apart=LANE, between="bar.warp.sync -1;") + " {} st.shared.b32 [%r8], %r9;"
    run(again.format("bar.warp.sync -1;"))
    with pytest.raises(Hazard, match=r"warp 0 writes word 0x0, which CTA 0 warp 0 read"):
        run(again.format(""))


SIGNAL = """
  setp.eq.u32 %p1, %r1, 0; setp.lt.u32 %p2, %r1, 32;
  @%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0; @!%p2 bra READ;
  shl.b32 %r8, %r1, 2; add.s32 %r8, %r8, %r2; st.shared.b32 [%r8+64], %r1; {before}
  setp.ne.u32 %p3, %r1, 0; @%p3 bra SENT; mbarrier.arrive.shared.b64 %rd5, [%r2]; SENT:
  mov.b32 %r9, 0; bra.uni END;
  READ: {wait} and.b32 %r7, %r1, 31; shl.b32 %r7, %r7, 2; add.s32 %r7, %r7, %r2;
  ld.shared.b32 %r9, [%r7+64]; END:"""
WAIT = "mbarrier.try_wait.parity.shared.b64 %p4, [%r2], 0;"


@pytest.mark.parametrize("order", ORDERS)
def test_one_lane_arrives_for_those_that_it_has_met(order):
    out = run(SIGNAL.format(before="bar.warp.sync -1;", wait=WAIT), 64, order)
    assert out[32:].tolist() == list(range(32))
    with pytest.raises(Hazard, match="a race"):  # its own store only
        run(SIGNAL.format(before="", wait=WAIT), 64, order)
    with pytest.raises(Hazard, match="a race"):
        run(SIGNAL.format(before="bar.warp.sync -1;", wait=""), 64, order)


def test_operations_of_one_warp_do_not_know_each_other():
    history, clock = History("memory", 64, rank=0, warps=2), Clock(2 * AGENTS)
    words = Words.of_operation(np.arange(8))
    history.writes(Access(COPIES, 1, clock, 0), words)
    with pytest.raises(Hazard, match="a copy of CTA 0 warp 0 writes word 0x0, which a copy"):
        history.writes(Access(COPIES, 2, clock, 0), words)
    clock.whole[COPIES] = 1  # its barrier has been waited for
    history.writes(Access(COPIES, 2, clock, 0), words)


def test_a_clock_knows_the_lanes_that_it_was_told_of():
    told, agents = Clock(AGENTS), np.array([0, 0, 0])
    told.whole[0], told.part[0], told.lanes[0] = 4, 6, 0b1
    clock = Clock(AGENTS)
    clock.join(told)
    times, lanes = np.array([4, 6, 6]), np.array([0b10, 0b1, 0b10], np.uint32)
    assert clock.knows(agents, times, lanes).tolist() == [True, True, False]
    later = Clock(AGENTS)
    later.whole[0] = 5
    clock.join(later)
    assert clock.knows(agents, times, lanes).tolist() == [True, True, False]
    later.whole[0] = 6
    clock.join(later)
    assert clock.knows(agents, times, lanes).all()


# --- our kernels with one thing less ------------------------------------------------------------

LOGITS = PrefillConfig(RouterSpec(300, 200), "sm_90a", 128, 2, 1, 2, 1)
OVERLAY = PrefillConfig(RouterSpec(144, 328), "sm_90a", 128, 2, 1, 3, 1, 4, True)
LISTS = PrefillConfig(RouterSpec(300, 264), "sm_90a", 128, 2, 1, 2, 1, 4, shortlists=True)
LISTS_SM100 = PrefillConfig(
    RouterSpec(300, 264, 8, "sigmoid"), "sm_100a", 128, 2, 1, 2, 1, 4, shortlists=True
)
SYNC_WARP = r"bar\.warp\.sync[^;]*;"
FENCE = r"fence\.acq_rel\.cluster[^;]*;"
RELEASE = r"(mbarrier\.arrive\.)release(\.cluster)"
MEET = r"(?<!\w)bar\.sync\s+1, 256;"  # of the epilogue's threads


@pytest.mark.parametrize(
    ("config", "pattern", "instead"),
    [
        (LOGITS, SYNC_WARP, ""),
        (LOGITS, RELEASE, r"\1relaxed\2"),
        (OVERLAY, FENCE, ""),
        (OVERLAY, MEET, ""),
        (LISTS, SYNC_WARP, ""),
        (LISTS, RELEASE, r"\1relaxed\2"),
        (LISTS, MEET, ""),
        (LISTS_SM100, RELEASE, r"\1relaxed\2"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value.arch}-{value.shortlists}",
)
def test_a_kernel_without_it_races(config, pattern, instead):
    inputs = exact_inputs(config.spec, 2 * config.tile_tokens, ties=False)
    ptx = ptx_of(config)
    assert_same(simulate_prefill(config, *inputs, ptx=ptx), expected(config.spec, *inputs))
    mutant, count = re.subn(pattern, instead, ptx)
    assert count
    with pytest.raises(Hazard, match="a race"):
        simulate_prefill(config, *inputs, ptx=mutant)
