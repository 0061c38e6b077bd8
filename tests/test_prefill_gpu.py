"""dense_prefill and route on a GPU: held to the oracle at many sizes, options and configurations.

Most tests call the host entry, as dense_prefill does once arguments are checked.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import FLASH, PRO, ROWS, SCORINGS, Case, Inputs, draw, draw_hostile, ids
from device_work import assert_one_kernel
from oracle import assert_routing

from cute_router import Routing, dense_decode, dense_prefill, route
from cute_router.arch import target_for
from cute_router.crossover import decode_tokens
from cute_router.prefill_heuristics import prefill_config, token_bucket

pytestmark = pytest.mark.gpu

FUZZ_SEEDS = 20  # for each of the routers

SIZES = [
    Case("one tile and a bit", *FLASH, 65),
    Case("two tiles and a bit", *FLASH, 129),
    Case("split K", *FLASH, 1000, padding=8),
    Case("one tile for each cluster", *FLASH, 8192),
    Case("several tiles for a cluster", *FLASH, 20000),
    Case("the larger shape", *PRO, 129),
    Case("the larger shape, many tokens", *PRO, 9000),
    Case("one token", *PRO, 1),
    Case("ragged K, padded rows", 256, 264, 1000, padding=56),
    Case("ragged K and E", 300, 264, 129, top_k=8),
    Case("one block of K", 144, 8, 3000, has_bias=False),
    Case("few experts", 7, 264, 1000, top_k=3),
    Case("one expert", 1, 8, 65, top_k=1),
    Case("the most experts, the most chosen", 1024, 4096, 300, top_k=32),
    Case("twice the experts", 512, 6144, 2000, top_k=8, scoring="sigmoid"),
    Case("DeepSeek-V3", 256, 7168, 5000, 8, "sigmoid", True, 8, 4, factor=2.5),
    Case("softmax", 384, 7168, 1000, 8, "softmax", False),
]
LISTED = [  # by short lists, from about 4,100 tokens on
    Case("short lists, E split", 300, 264, 5000, top_k=8, padding=8),
    Case("short lists, no bias", 256, 512, 6000, scoring="sigmoid", has_bias=False),
    Case("short lists, several tiles for a cluster", 160, 264, 17000, top_k=1),
]
OPTIONS = [
    Case("options", 256, 512, 300, 6, scoring, renormalize, n_group, topk_group, has_bias)
    for scoring in SCORINGS
    for renormalize, n_group, topk_group, has_bias in (
        (True, 1, 1, True),
        (False, 8, 4, False),
    )
]


def options_of(case: Case, pdl: bool = True, batch_invariant: bool = False) -> tuple[Any, ...]:
    return (
        case.top_k,
        case.scoring,
        case.renormalize,
        case.n_group,
        case.topk_group,
        batch_invariant,
        pdl,
    )


def poisoned(case: Case) -> Routing:
    shape = (case.N, case.top_k)
    return Routing(
        torch.full(shape, -123.0, device="cuda"),
        torch.full(shape, -7, dtype=torch.int32, device="cuda"),
    )


def run(case: Case, inputs: Inputs, **launched: bool) -> Routing:
    from cute_router.gemm import prefill

    out = poisoned(case)
    prefill.launch(*inputs, *out, case.spec, case.factor, options_of(case, **launched))
    return out


def call(function: Callable[..., Routing], case: Case, inputs: Inputs, **options: Any) -> Routing:
    return function(*inputs, **case.options, **options)


def assert_same_bits(actual: Routing, wanted: Routing) -> None:
    assert torch.equal(actual.ids, wanted.ids)
    assert torch.equal(actual.weights.view(torch.int32), wanted.weights.view(torch.int32))


@pytest.mark.parametrize("case", SIZES + LISTED + OPTIONS, ids=ids)
def test_routes_as_the_oracle_does_and_gives_the_same_bits_again(case):
    inputs = draw(case, "cuda")
    first = run(case, inputs)
    assert_routing(first, *inputs, **case.options)
    for _ in range(5):
        assert_same_bits(run(case, inputs), first)
    assert_same_bits(run(case, inputs, pdl=False), first)


@pytest.mark.parametrize("integer", [False, True], ids=["real", "tied"])
@pytest.mark.parametrize("case", [*SIZES[2:4], SIZES[9], *LISTED, *OPTIONS], ids=ids)
def test_routes_rows_of_every_kind_as_the_oracle_does(case, integer):
    inputs = draw(case, "cuda", kinds=["ties"] if integer else list(ROWS), integer=integer)
    assert_routing(run(case, inputs), *inputs, **case.options)


@pytest.mark.parametrize("case", [SIZES[1], *SIZES[10:15:4], SIZES[15]], ids=ids)
def test_the_functions_are_their_host_entries(case):
    inputs = draw(case, "cuda")
    prefilled = call(dense_prefill, case, inputs)
    assert_same_bits(prefilled, run(case, inputs))
    out = poisoned(case)
    call(dense_prefill, case, inputs, out_weights=out.weights, out_ids=out.ids)
    assert_same_bits(out, prefilled)


@pytest.mark.parametrize("case", [SIZES[1], replace(SIZES[14], N=700), OPTIONS[0]], ids=ids)
def test_route_is_decode_up_to_some_tokens_and_prefill_beyond(case):
    most = decode_tokens(case.E, case.K)
    inputs = draw(replace(case, N=most + 1), "cuda")
    assert_same_bits(call(route, case, inputs), call(dense_prefill, case, inputs))
    fewer = inputs._replace(x=inputs.x[:most])
    assert_same_bits(call(route, case, fewer), call(dense_decode, case, fewer))


@pytest.mark.parametrize("case", [*SIZES[2:4], SIZES[6], SIZES[9], SIZES[15]], ids=ids)
def test_a_batch_invariant_token_has_the_same_bits_in_every_function_and_at_every_n(case):
    case = replace(case, N=700)
    inputs = draw(case, "cuda")
    together = call(dense_prefill, case, inputs, batch_invariant=True)
    assert_routing(together, *inputs, **case.options)
    for N in (1, 5, 64, 128, 129, 512):
        some = inputs._replace(x=inputs.x[:N])
        for function in (dense_decode, dense_prefill, route):
            part = call(function, case, some, batch_invariant=True)
            assert_same_bits(part, Routing(together.weights[:N], together.ids[:N]))


@pytest.mark.parametrize("case", [*SIZES[9:13], *SIZES[15:]], ids=ids)
def test_routes_random_hostile_cases_as_the_oracle_does(case):
    for seed in range(FUZZ_SEEDS):
        inputs = draw_hostile(replace(case, N=300), "cuda", seed)
        try:
            assert_routing(call(dense_prefill, case, inputs), *inputs, **case.options)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("case", LISTED, ids=ids)
def test_short_lists_route_random_hostile_cases_as_the_oracle_does(case):
    from cute_router import compile as compiler

    kernel = compiler.kernel(prefill_config(case.spec, case.N, target_for(0)[1]))
    for seed in range(FUZZ_SEEDS):
        inputs = draw_hostile(replace(case, N=700), "cuda", seed)
        out = poisoned(replace(case, N=len(inputs.x)))
        kernel(*inputs, *out, case.factor)
        assert_routing(out, *inputs, **case.options)


@pytest.mark.parametrize("case", [*LISTED, *SIZES[3:4]], ids=ids)
def test_these_cases_are_routed_by_short_lists(case):
    assert prefill_config(case.spec, token_bucket(case.N), target_for(0)[1]).shortlists


def test_a_call_is_one_kernel_and_nothing_else():
    case = SIZES[2]
    inputs = draw(case, "cuda")
    call(dense_prefill, case, inputs)
    assert_one_kernel(lambda: call(dense_prefill, case, inputs))


@pytest.mark.parametrize("case", [replace(SIZES[0], K=512, N=300), SIZES[9]], ids=ids)
def test_every_candidate_is_right(case):
    from cute_router import compile as compiler
    from cute_router.prefill_heuristics import candidates

    inputs = draw(case, "cuda", kinds=["normal", "ties", "nan"])
    for config in candidates(case.spec, target_for(0)[1]):
        out = poisoned(case)
        kernel = compiler.kernel(replace(config, clusters=2))  # so that each has several tiles
        kernel(*inputs, *out, case.factor)
        assert_routing(out, *inputs, **case.options)


def test_a_captured_graph_gives_the_eager_bits_for_what_its_inputs_hold_at_replay():
    case = SIZES[2]
    inputs = draw(case, "cuda")
    run(case, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, inputs)
        run(case, inputs)
    for seed in range(1, 4):
        for tensor, new in zip(inputs, draw(case, "cuda", seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        assert_same_bits(captured, run(case, inputs))
