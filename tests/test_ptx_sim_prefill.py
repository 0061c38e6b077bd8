"""The prefill kernels, simulated from their PTX under eager, lazy and random asynchronous order.

Simulated means functionally, on a CPU, by the PTX ISA as `ptx_sim` reads it; no GPU takes part.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import oracle
import pytest
import torch
from cases import ROWS, Case, draw
from ptx_sim.errors import Hazard, Misuse
from ptx_sim.launch import ptx_of
from ptx_sim.launch_prefill import simulate_prefill
from ptx_sim.problem import assert_same, exact_inputs, expected, options_of

from cute_router.gemm.prefill_config import PrefillConfig, can_implement
from cute_router.spec import RouterSpec

ORDERS = ["eager", "lazy", "random0", "random1"]
GROUPS = {"n_group": 8, "topk_group": 4}

# (config, N). K ends within a block; a CTA has one tile and several, a last one that is not full
# and one in which some owners have no token; rings turn, and are longer than K.
CONFIGS = [
    (PrefillConfig(RouterSpec(100, 200), "sm_90a", 64, 1, 1, 3), 50),
    (PrefillConfig(RouterSpec(64, 264), "sm_90a", 64, 1, 2, 2, 1), 100),
    (PrefillConfig(RouterSpec(300, 200), "sm_90a", 128, 2, 1, 2, 1), 150),
    (PrefillConfig(RouterSpec(256, 328), "sm_90a", 64, 2, 2, 2, 1, 16), 100),
    (PrefillConfig(RouterSpec(144, 264), "sm_90a", 64, 2, 3, 2, 1, 16, True), 140),
    (PrefillConfig(RouterSpec(100, 200), "sm_90a", 64, 1, 1, 2, 1, 8, overlay=True), 150),
    (PrefillConfig(RouterSpec(144, 328), "sm_90a", 128, 2, 1, 3, 1, 4, True), 260),
    (PrefillConfig(RouterSpec(64, 2120), "sm_90a", 64, 1, 1, 3, 1, 8, overlay=True), 70),
    (PrefillConfig(RouterSpec(144, 128, 32, has_bias=False), "sm_90a", 64, 4, 2, 2, 1, 8), 70),
    (PrefillConfig(RouterSpec(300, 128, 8), "sm_90a", 128, 4, 1, 3, 1, 8), 140),
    (PrefillConfig(RouterSpec(7, 8, 3, renormalize=False), "sm_90a", 128, 1, 1, 4, 1, 4), 1),
    (PrefillConfig(RouterSpec(300, 200, 8, "softmax"), "sm_90a", 64, 2, 2, 2, lanes=32), 65),
    (PrefillConfig(RouterSpec(256, 72, 8, "sigmoid", **GROUPS), "sm_90a", 128, lanes=32), 33),
    (PrefillConfig(RouterSpec(100, 200), "sm_100a", 128, 1, 1, 3), 50),
    (PrefillConfig(RouterSpec(300, 264), "sm_100a", 128, 2, 2, 2, 1), 150),
    (PrefillConfig(RouterSpec(200, 200, 1, "sigmoid"), "sm_100a", 128, 1, 2, 2, 1, 4), 130),
    (PrefillConfig(RouterSpec(200, 72), "sm_100a", 128, 1, 1, 2, 1), 500),
    (PrefillConfig(RouterSpec(144, 136), "sm_100a", 128, 2, 1, 3, 1, 8), 700),
    (PrefillConfig(RouterSpec(144, 72, 32), "sm_100a", 128, 4, 2, 4, 1, 16), 129),
    (PrefillConfig(RouterSpec(256, 72, 8, "softmax", **GROUPS), "sm_100a", 128, lanes=32), 33),
    (PrefillConfig(RouterSpec(224, 4168), "sm_90a", 64, 1, 1, 4, 1, 8, overlay=True), 70),
    (PrefillConfig(RouterSpec(144, 712), "sm_90a", 64, 4, 4, 3, 1, 32), 70),
    (PrefillConfig(RouterSpec(144, 712), "sm_90a", 128, 2, 8, 2, 1, 16, overlay=True), 150),
    (PrefillConfig(RouterSpec(144, 712), "sm_100a", 128, 4, 4, 3, 1, 16), 150),
    (PrefillConfig(RouterSpec(144, 520), "sm_90a", 64, 2, 4, 2, 1, 32, overlay=True), 140),
    (PrefillConfig(RouterSpec(100, 520), "sm_90a", 64, 3, 3, 2, 1, 32, overlay=True), 140),
]

# The same with short lists. Owners have as many tokens as their warps look at, and fewer.
LISTS = [
    (replace(PrefillConfig(*shape), lanes=lanes, shortlists=True), N)
    for shape, lanes, N in (
        ((RouterSpec(100, 200), "sm_90a", 64, 1, 1, 3, 1), 4, 150),
        ((RouterSpec(256, 72, 8, "sigmoid"), "sm_90a", 128, 1, 1, 2, 1), 4, 50),
        ((RouterSpec(300, 264), "sm_90a", 128, 2, 1, 2, 1), 4, 260),
        ((RouterSpec(144, 328, 1, has_bias=False), "sm_90a", 64, 3, 1, 3, 1), 8, 70),
        ((RouterSpec(512, 72), "sm_90a", 128, 8, 1, 3, 1), 4, 150),
        ((RouterSpec(100, 200), "sm_100a", 128, 1, 1, 3, 1), 4, 150),
        ((RouterSpec(384, 72), "sm_100a", 128, 3, 1, 3, 1), 8, 300),
        ((RouterSpec(300, 264, 8, "sigmoid"), "sm_100a", 128, 2, 1, 2, 1), 4, 260),
    )
]
CONFIGS += LISTS


def name_of(value: object) -> str:
    if not isinstance(value, PrefillConfig):
        return f"N{value}"
    c, s = value, value.spec
    split = f"tile{c.tile_tokens}-e{c.split_e}-k{c.split_k}"
    split += "-overlay" * c.overlay + "-lists" * c.shortlists
    return f"{c.arch}-E{s.num_experts}-K{s.hidden_size}-k{s.top_k}-{s.scoring}-{split}"


@pytest.mark.parametrize(("config", "N"), CONFIGS, ids=name_of)
def test_right_in_every_order_and_the_same_bits_in_all(config, N):
    can_implement(config)
    for ties in (False, True):
        inputs = exact_inputs(config.spec, N, ties=ties)
        wanted, first = expected(config.spec, *inputs), None
        for order in ORDERS[ties::2]:
            routing = simulate_prefill(config, *inputs, policy=order)
            assert_same(routing, wanted)
            first = first or routing
            assert torch.equal(routing.weights, first.weights), f"{order}: not the same bits"


@pytest.mark.parametrize(
    "config", [CONFIGS[i][0] for i in (3, 6, 14, 20)] + [c for c, _ in LISTS], ids=name_of
)
def test_rows_of_every_kind_are_within_the_specification(config):
    case = Case("every kind", config.spec.num_experts, config.spec.hidden_size, len(ROWS))
    x, W, bias = draw(case, "cpu", kinds=list(ROWS))
    bias = bias if config.spec.has_bias else None
    routing = simulate_prefill(config, x, W, bias, policy="random7", factor=2.5, races=True)
    oracle.assert_routing(routing, x, W, bias, routed_scaling_factor=2.5, **options_of(config.spec))


@pytest.mark.parametrize(
    "config", [c for c, _ in (CONFIGS[0], CONFIGS[6], LISTS[0], LISTS[5])], ids=name_of
)
def test_scores_that_differ_in_their_last_bits_are_told_apart(config):
    x, W, bias = exact_inputs(config.spec, 20, ties=False)
    bias = 1 + torch.randperm(config.spec.num_experts) * 2.0**-22
    x = x * 0
    routing = simulate_prefill(config, x, W, bias)
    best = bias.topk(config.spec.top_k).indices
    assert routing.ids.tolist() == [best.tolist()] * 20


@pytest.mark.parametrize("config", [LISTS[0][0], LISTS[5][0]], ids=name_of)
def test_short_lists_have_the_best_wherever_these_are(config):
    """T is a maximum of groups of experts: 16 that are far apart in a row are of one group."""
    E, k = config.spec.num_experts, config.spec.top_k
    logits = -4 + torch.rand(4, E, generator=torch.Generator().manual_seed(1))
    expert = torch.arange(E)
    if config.sum_lanes == 4:  # pairs of experts on lanes in turn, 8 groups of each lane
        lane, entry = expert // 2 % 4, expert // 8 * 2 + expert % 2
        group = lane * 8 + entry % 8
    else:
        group = expert % 32
    for n, groups in enumerate((1, k - 1, k, 2 * k)):  # that the greatest logits are in
        logits[n, group < groups] += 4
    x = torch.eye(4, config.spec.hidden_size).bfloat16()
    W = torch.zeros(E, config.spec.hidden_size).bfloat16()
    W[:, :4] = logits.T
    bias = torch.zeros(E)
    assert_same(simulate_prefill(config, x, W, bias), expected(config.spec, x, W, bias))


# --- what the simulator would say if a barrier were missing -----------------------------------


def without(text: str, instruction: Callable[[str], bool]) -> str:
    """PTX without the statements that are `instruction`."""
    return "\n".join(line for line in text.splitlines() if not instruction(line))


@pytest.mark.parametrize(
    "config", [c for c, _ in (*CONFIGS[3:5], CONFIGS[14], LISTS[2], LISTS[7])], ids=name_of
)
def test_a_reader_that_does_not_say_that_there_is_room_is_noticed(config):
    config = replace(config, clusters=1)
    ptx = without(
        ptx_of(config),
        lambda line: (
            "mbarrier.arrive.release.cluster" in line  # what `Exchange` says
            or (config.overlay and "mbarrier.arrive.relaxed.cluster" in line)
        ),
    )
    inputs = exact_inputs(config.spec, 2 * config.tile_tokens, ties=False)
    with pytest.raises(Exception, match="deadlock"):
        simulate_prefill(config, *inputs, policy="random0", ptx=ptx)


@pytest.mark.parametrize("config", [CONFIGS[i][0] for i in (4, 5, 6)], ids=name_of)
def test_logits_over_a_ring_that_others_still_read_are_noticed(config):
    wait = r"mbarrier\.try_wait\.parity\.acquire\.cluster[^;]*;"  # the first one is for room
    ptx = re.sub(wait, "setp.eq.u32 p, 0, 0;", ptx_of(config), count=1)
    inputs = exact_inputs(config.spec, config.tile_tokens, ties=False)
    with pytest.raises(Hazard, match="an MMA reads what was stored"):
        simulate_prefill(config, *inputs, policy="random1", ptx=ptx)


def test_accumulators_that_are_not_said_to_be_read_are_not_written_again():
    config = PrefillConfig(RouterSpec(64, 72), "sm_100a", 128, 1, 1, 2, 1)
    arrival = "mbarrier.arrive.shared.b64"
    ptx = without(ptx_of(config), lambda line: arrival in line)
    for tiles in (config.buffers, config.buffers + 1):
        inputs = exact_inputs(config.spec, tiles * config.tile_tokens, ties=False)
        noticed = pytest.raises(Exception, match="deadlock")
        with noticed if tiles > config.buffers else nullcontext():
            simulate_prefill(config, *inputs, policy="random0", ptx=ptx)


@pytest.mark.parametrize(("config", "N"), [CONFIGS[i] for i in (3, 21, 22, 23)], ids=name_of)
def test_sums_for_a_cta_that_has_no_barriers_yet_are_noticed(config, N):
    ptx = without(ptx_of(config), lambda line: "barrier.cluster.wait" in line)
    inputs = exact_inputs(config.spec, N, ties=False)
    with pytest.raises(Misuse, match="no mbarrier has been initialised"):
        simulate_prefill(config, *inputs, policy="random1", ptx=ptx)
