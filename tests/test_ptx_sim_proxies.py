"""Shared memory that threads write and TMA or MMAs use, without the proxy fence: always found.

No decode kernel does so. Here words of an operand tile are read and stored back, planted in their
PTX, each by one thread: no value changes, and the only thing wrong, if anything, is the missing
fence.
"""

import numpy as np
import pytest
from ptx_sim.errors import Hazard
from ptx_sim.launch import ptx_of, simulate
from ptx_sim.problem import assert_same, exact_inputs, expected
from ptx_sim.proxies import STRANGERS, Issue, Proxies

from cute_router.gemm.config import DecodeConfig
from cute_router.spec import RouterSpec

N = 13
SM100 = DecodeConfig(RouterSpec(64, 2 * 2 * 64 - 24), "sm_100a", 64, 16, 2, 2)
SM90 = DecodeConfig(RouterSpec(64, 2 * 2 * 64 - 24), "sm_90a", 64, 16, 2, 2)
MMA = {SM100: "tcgen05.mma", SM90: "wgmma.fence"}  # what the first product begins with
MEET = {SM100: "", SM90: "bar.sync 1, 128; "}  # what the MMAs of one warp read, all four wrote
BOTH = pytest.mark.parametrize("config", [SM100, SM90], ids=["sm_100a", "sm_90a"])
ORDERS = ("eager", "lazy", "random0")

LOAD = "cp.async.bulk.tensor"  # the first is of W, to where shared memory starts: [%r1]
REWRITE = (
    "{ .reg .b32 w; .reg .b32 at; mov.u32 at, %tid.x; shl.b32 at, at, 2; add.s32 at, at, %r1;"
    " ld.shared.b32 w, [at]; st.shared.b32 [at], w; } "
)


def planted(config: DecodeConfig, before: str, text: str) -> str:
    """The kernel with `text` ahead of the first statement that begins with `before`."""
    ptx = ptx_of(config)
    assert f"{LOAD}.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes" in ptx
    at = ptx.index(before)
    return ptx[:at] + text + ptx[at:]


def run(config: DecodeConfig, ptx: str, order: str) -> None:
    inputs = exact_inputs(config.spec, N, ties=False)
    routing = simulate(config, *inputs, policy=order, ptx=ptx)
    assert_same(routing, expected(config.spec, *inputs))


@BOTH
@pytest.mark.parametrize("fence", ["", "fence.proxy.async.global; "])
def test_an_operand_that_a_thread_stored_needs_a_fence(config, fence):
    ptx = planted(config, MMA[config], REWRITE + fence + MEET[config])
    for order in ORDERS:
        with pytest.raises(Hazard, match="an MMA reads what was stored without"):
            run(config, ptx, order)


@BOTH
@pytest.mark.parametrize("fence", ["fence.proxy.async; ", "fence.proxy.async.shared::cta; "])
def test_with_a_fence_behind_the_store_nothing_is_wrong(config, fence):
    ptx = planted(config, MMA[config], REWRITE + fence + MEET[config])
    for order in ORDERS:
        run(config, ptx, order)


@BOTH
def test_a_fence_ahead_of_the_store_does_not_help(config):
    ptx = planted(config, MMA[config], "fence.proxy.async; " + REWRITE + MEET[config])
    with pytest.raises(Hazard, match="an MMA reads"):
        run(config, ptx, "eager")


@BOTH
def test_a_load_over_what_a_thread_stored_needs_a_fence(config):
    with pytest.raises(Hazard, match="a TMA load overwrites what was stored without"):
        run(config, planted(config, LOAD, REWRITE), "eager")
    run(config, planted(config, LOAD, REWRITE + "fence.proxy.async; "), "lazy")


@BOTH
def test_a_store_to_where_a_load_is_under_way_shows_though_the_load_hides_it(config):
    ptx = ptx_of(config)
    end = ptx.index(";", ptx.index(LOAD)) + 1
    with pytest.raises(Hazard, match="a TMA load under way"):
        run(config, ptx[:end] + " " + REWRITE + ptx[end:], "lazy")


def test_a_fence_counts_for_its_own_thread_and_for_what_that_thread_issues():
    proxies, words, five = Proxies("memory", 64), np.array([8]), np.array([5])
    proxies.stored(words, 2, five, now=1)
    assert proxies.stores(slice(9, 10))
    assert not proxies.stores(slice(10, 64))
    proxies.fence(np.array([6]), now=2)
    with pytest.raises(Hazard):
        proxies.check(slice(0, 16), Issue(2, fenced=0), "it reads")
    proxies.check(slice(0, 16), Issue(2, fenced=2), "thread 6 reads")
    proxies.fence(five, now=3)
    proxies.check(slice(0, 16), Issue(3, fenced=0), "it reads")


def test_a_store_behind_the_issue_is_not_excused_by_any_fence():
    proxies, five = Proxies("memory", 64), np.array([5])
    proxies.stored(np.array([8]), 1, five, now=4)
    proxies.fence(five, now=5)
    with pytest.raises(Hazard):
        proxies.check(slice(8, 9), Issue(3, fenced=0), "it reads")


def test_what_a_peer_sent_needs_a_fence_by_the_thread_that_issues():
    proxies = Proxies("memory", 64)
    proxies.stored(np.arange(32), 1, STRANGERS, now=1)
    with pytest.raises(Hazard):
        proxies.check(slice(0, 4), Issue(1, fenced=0), "it reads")
    proxies.check(slice(0, 4), Issue(2, fenced=2), "it reads")
