"""dense_decode on a GPU: held to the oracle at every size and on every kind of data.

And to its contract as a launch: one kernel, no copies, no waiting, the same bits again.
"""

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    FLASH,
    INVARIANT,
    ODD,
    ONE_OF_EACH,
    OPTIONS,
    PRO,
    ROUTERS,
    ROWS,
    SMALL,
    TUNED,
    Case,
    Inputs,
    draw,
    draw_hostile,
    ids,
)
from device_work import assert_neither_allocates_nor_waits, assert_one_kernel, device_work
from oracle import assert_routing, check_decode
from torch import Tensor

from cute_router import RouterSpec, Routing, dense_decode, warmup

pytestmark = pytest.mark.gpu

FUZZ_SEEDS = 25  # for each of the routers: 1,000 cases and more


def run(case: Case, inputs: Inputs, **options: object) -> Routing:
    return dense_decode(*inputs, **case.options, **options)


def assert_same_bits(actual: Routing, expected: Routing) -> None:
    assert torch.equal(actual.ids, expected.ids)
    assert torch.equal(actual.weights.view(torch.int32), expected.weights.view(torch.int32))


# --- right at every size, option and kind of data ---------------------------------------------


@pytest.mark.parametrize("case", TUNED + ROUTERS + OPTIONS, ids=ids)
def test_routes_as_the_oracle_does(case):
    check_decode(*draw(case, "cuda"), **case.options)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("case", OPTIONS, ids=ids)
def test_routes_rows_of_every_kind_as_the_oracle_does(case, kind):
    check_decode(*draw(case, "cuda", kinds=[kind], integer=kind == "ties"), **case.options)


@pytest.mark.parametrize("case", ROUTERS, ids=ids)
def test_routes_random_hostile_cases_as_the_oracle_does(case):
    for seed in range(FUZZ_SEEDS):
        try:
            check_decode(*draw_hostile(case, "cuda", seed), **case.options)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids)
@pytest.mark.parametrize("launch", [{"pdl": False}, {"batch_invariant": True}], ids=str)
def test_routes_as_the_oracle_does_however_it_is_launched(case, launch):
    check_decode(*draw(case, "cuda"), **case.options, **launch)


@pytest.mark.parametrize("factor", [0.0, 1, 2.5])
def test_the_factor_is_a_run_time_value(factor):
    case = replace(SMALL, factor=factor)
    check_decode(*draw(case, "cuda"), **case.options)


@pytest.mark.parametrize("case", OPTIONS, ids=ids)
def test_a_row_of_nan_takes_the_first_experts_and_keeps_its_nan_to_itself(case):
    inputs = draw(case, "cuda")
    clean = run(case, inputs)
    inputs.x[3] = math.nan
    weights, chosen = run(case, inputs)
    assert chosen[3].tolist() == list(range(case.top_k))
    assert weights[3].isnan().all()
    others = [0, 1, 2, 4]
    assert_same_bits(
        Routing(weights[others], chosen[others]), Routing(clean.weights[others], clean.ids[others])
    )


def test_equal_scores_go_to_the_lowest_ids_in_equal_parts():
    x, W, _ = draw(SMALL, "cuda", kinds=["all equal"])
    weights, chosen = dense_decode(x, W, **SMALL.options)
    assert chosen.tolist() == [list(range(SMALL.top_k))] * SMALL.N
    torch.testing.assert_close(
        weights, torch.full_like(weights, SMALL.factor / SMALL.top_k), rtol=1e-5, atol=0
    )


def test_very_negative_logits_still_share_the_whole_factor():
    assert SMALL.scoring == "sqrtsoftplus"
    weights, _ = run(SMALL, draw(SMALL, "cuda", kinds=["low"]))
    torch.testing.assert_close(
        weights.sum(-1), torch.full((SMALL.N,), SMALL.factor, device="cuda"), rtol=1e-5, atol=0
    )


def test_no_tokens_give_empty_tensors():
    weights, chosen = run(SMALL, draw(replace(SMALL, N=0), "cuda"))
    assert weights.shape == chosen.shape == (0, SMALL.top_k)
    assert weights.is_cuda
    assert chosen.is_cuda


# --- tensors as they come ------------------------------------------------------------------------


def guarded(rows: int, columns: int, dtype: torch.dtype, filling: float) -> tuple[Tensor, Tensor]:
    """A matrix, and the larger one in whose middle it lies."""
    whole = torch.full((rows + 2, columns), filling, dtype=dtype, device="cuda")
    return whole[1:-1], whole


@pytest.mark.parametrize("case", [SMALL, *ONE_OF_EACH, ODD], ids=ids)
def test_results_go_into_the_given_tensors_and_nowhere_else(case):
    inputs = draw(case, "cuda")
    weights, around_weights = guarded(case.N, case.top_k, torch.float32, -5)
    chosen, around_ids = guarded(case.N, case.top_k, torch.int32, -5)
    result = run(case, inputs, out_weights=weights, out_ids=chosen)
    assert result.weights.data_ptr() == weights.data_ptr()
    assert result.ids.data_ptr() == chosen.data_ptr()
    assert_routing(Routing(weights, chosen), *inputs, **case.options)
    for whole in (around_weights, around_ids):
        assert (whole[0] == -5).all()
        assert (whole[-1] == -5).all()


@pytest.mark.parametrize("case", [SMALL, ODD], ids=ids)
def test_inputs_are_read_where_they_lie(case):
    storage = torch.full((case.N + 9, case.K + 24), math.nan, dtype=torch.bfloat16, device="cuda")
    x = storage[5 : 5 + case.N, 8 : 8 + case.K]
    W_storage = torch.full((case.E + 2, case.K + 8), math.nan, device="cuda").bfloat16()
    W = W_storage[1:-1, : case.K]
    bias = torch.full((case.E + 2,), math.nan, device="cuda")[1:-1]
    there = Inputs(x, W, bias)
    for seed in range(2):  # a copy taken at the first call would not see the second
        inputs = draw(case, "cuda", seed)
        for tensor, values in zip(there, inputs, strict=True):
            tensor.copy_(values)
        assert_same_bits(run(case, there), run(case, inputs))


@pytest.mark.parametrize("stride", [513, 514, 1000])
def test_the_row_stride_of_a_single_row_is_ignored(stride):
    case = replace(SMALL, N=1)
    inputs = draw(case, "cuda")
    storage = torch.full((1, stride), math.nan, dtype=torch.bfloat16, device="cuda")
    x = storage[:, : case.K]
    x.copy_(inputs.x)
    assert_same_bits(run(case, inputs._replace(x=x)), run(case, inputs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("device", [0, 1])
def test_tensors_decide_the_device_whichever_is_current(device):
    with torch.cuda.device(1 - device):
        routing = check_decode(*draw(SMALL, f"cuda:{device}"), **SMALL.options)
        assert torch.cuda.current_device() == 1 - device
    assert routing.ids.device.index == device


# --- what a call is ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TUNED, ids=ids)
def test_a_call_is_one_kernel_and_nothing_else(case):
    inputs = draw(case, "cuda")
    run(case, inputs)
    assert_one_kernel(lambda: run(case, inputs))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids)
def test_a_captured_call_is_one_kernel_and_nothing_else(case):
    inputs = draw(case, "cuda")
    run(case, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            run(case, inputs)
    work = device_work(graph.replay)
    assert len(work) == 5, work


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids)
def test_a_call_with_outputs_given_allocates_nothing_and_waits_for_nothing(case):
    inputs = draw(case, "cuda")
    weights, chosen = run(case, inputs)
    assert_neither_allocates_nor_waits(
        lambda: run(case, inputs, out_weights=weights, out_ids=chosen)
    )


@pytest.mark.parametrize("case", TUNED + INVARIANT, ids=ids)
def test_the_same_inputs_give_the_same_bits(case):
    inputs = draw(case, "cuda")
    first = run(case, inputs)
    for _ in range(5):
        assert_same_bits(run(case, inputs), first)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids)
def test_pdl_does_not_change_the_bits(case):
    inputs = draw(case, "cuda")
    assert_same_bits(run(case, inputs, pdl=False), run(case, inputs))


@pytest.mark.parametrize("case", [*TUNED, SMALL], ids=ids)
def test_a_captured_graph_gives_the_eager_bits_for_what_its_inputs_hold_at_replay(case):
    inputs = draw(case, "cuda")
    run(case, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, inputs)
    for seed in range(1, 4):
        for tensor, new in zip(inputs, draw(case, "cuda", seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        assert_same_bits(captured, run(case, inputs))
        assert_routing(captured, *inputs, **case.options)


def test_after_warmup_the_first_call_may_be_a_captured_one():
    case = Case("warmed, never called", 96, 1024, 4)
    inputs = draw(case, "cuda")
    warmup(RouterSpec(case.E, case.K, case.top_k), tokens=[case.N])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, inputs)
    graph.replay()
    assert_routing(captured, *inputs, **case.options)


def test_calls_on_several_streams_do_not_disturb_each_other():
    cases = [Case("streams", E, K, N) for E, K in (FLASH, PRO) for N in (1, 17, 64)]
    work = [(case, draw(case, "cuda", seed)) for seed, case in enumerate(cases)]
    quiet = []
    for case, inputs in work:
        quiet.append(run(case, inputs))
        torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in work]
    results = []
    for _ in range(20):
        for stream, (case, inputs) in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(case, inputs))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert_same_bits(result, quiet[i % len(work)])


# --- batch invariance ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", INVARIANT, ids=ids)
def test_a_batch_invariant_token_has_the_same_bits_in_any_batch(case):
    inputs = draw(case, "cuda")
    together = run(case, inputs, batch_invariant=True)
    assert_routing(together, *inputs, **case.options)
    for N in (1, 3, 17, 64):
        for start in (0, 63, case.N - N):
            rows = slice(start, start + N)
            part = run(case, inputs._replace(x=inputs.x[rows]), batch_invariant=True)
            assert_same_bits(part, Routing(together.weights[rows], together.ids[rows]))


@pytest.mark.parametrize("case", INVARIANT, ids=ids)
@pytest.mark.parametrize("company", ["normal", "huge", "nan"])
def test_a_batch_invariant_token_has_the_same_bits_in_any_company(case, company):
    inputs = draw(case, "cuda")
    token = inputs.x[:1]
    alone = run(case, inputs._replace(x=token), batch_invariant=True)
    for N in (3, 17, 64, 200):
        for position in (0, N // 2, N - 1):
            others = draw(replace(case, N=N), "cuda", seed=N, kinds=[company])
            others.x[position] = token[0]
            crowd = run(case, inputs._replace(x=others.x), batch_invariant=True)
            row = slice(position, position + 1)
            assert_same_bits(Routing(crowd.weights[row], crowd.ids[row]), alone)
