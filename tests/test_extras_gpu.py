"""Extras on a GPU: what the specification makes of a function's result without any.

The result without extras is held to the oracle; with them ids are those of `reference.finish` on
it, and weights within a rounding. And to the contract as a launch: one kernel, no waiting, results
in the given tensors and nowhere else, and a captured graph that takes what its tensors hold.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from cases import FLASH, PRO, Case, Inputs, draw
from device_work import assert_one_kernel
from extras_cases import BIASES, KINDS, LOGITS, draw_extras
from oracle import assert_gated, assert_routing
from torch import Tensor

from cute_router import Extras, Routing, activation_topk, dense_decode, extended, hash_route
from cute_router import reference as ref
from cute_router.gemm import generic
from cute_router.spec import RouterSpec

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
Route = Callable[[Inputs, Case, Extras | None], Routing]


# --- the functions, called alike ----------------------------------------------------------------


def decode(inputs: Inputs, case: Case, extras: Extras | None, **more: Any) -> Routing:
    return dense_decode(*inputs, **case.options, **more, extras=extras)


def prefill(inputs: Inputs, case: Case, extras: Extras | None, **more: Any) -> Routing:
    options = case.options
    factor = options.pop("routed_scaling_factor")
    names = ("top_k", "scoring", "renormalize", "n_group", "topk_group")
    rest = (False, True)  # batch_invariant, pdl
    given = tuple(options[name] for name in names) + rest
    outputs = (more.get("out_weights"), more.get("out_ids"), extras or Extras())
    return extended.dense("gemm.prefill", *inputs, factor, given, *outputs)


def gate(inputs: Inputs, case: Case, extras: Extras | None, **more: Any) -> Routing:
    logits = ref.logits(inputs.x, inputs.W).float()
    return activation_topk(logits, inputs.bias, **case.options, **more, extras=extras)


@cache  # no random numbers within a capture
def table_of(case: Case, device: str) -> Tensor:
    """A table of `case.N` rows of distinct experts, some of which are none."""
    generator = torch.Generator(device).manual_seed(1)
    noise = torch.rand(case.N, case.E, generator=generator, device=device)
    table = noise.argsort(-1)[:, : case.top_k]
    return table.masked_fill(table % 11 == 5, case.E)


def hashed(inputs: Inputs, case: Case, extras: Extras | None, **more: Any) -> Routing:
    tokens = torch.arange(case.N, device=inputs.x.device) - 1  # one has no row
    options = {"routed_scaling_factor": case.factor, "scoring": case.scoring}
    options |= {"renormalize": case.renormalize, "x": inputs.x, "W": inputs.W}
    return hash_route(
        tokens, table_of(case, inputs.x.device.type), **options, **more, extras=extras
    )


def uniform(inputs: Inputs, case: Case, extras: Extras | None, **more: Any) -> Routing:
    tokens = torch.arange(case.N, device=inputs.x.device) - 1
    return hash_route(tokens, table_of(case, inputs.x.device.type), **more, extras=extras)


MISSING = {gate: LOGITS, hashed: LOGITS + BIASES, uniform: LOGITS + BIASES}

CASES = [
    *[(decode, Case("tuned shapes", *shape, N)) for shape in (FLASH, PRO) for N in (1, 7, 64)],
    (decode, Case("ragged", 300, 264, 17, top_k=8, padding=8)),
    (decode, Case("groups", 256, 7168, 9, 8, "sigmoid", True, 8, 4)),
    (decode, Case("softmax", 384, 7168, 5, 8, "softmax", False, has_bias=False)),
    (decode, Case("most experts, most chosen", 1024, 4096, 3, top_k=32)),
    (decode, Case("several launches", 64, 64, 5000)),
    (prefill, Case("tuned shape", *FLASH, 1000)),
    (prefill, Case("the larger shape, many tokens", *PRO, 9000)),
    (prefill, Case("ragged", 300, 264, 129, top_k=8)),
    (prefill, Case("groups", 256, 7168, 300, 8, "sigmoid", True, 8, 4)),
    (prefill, Case("softmax, no bias", 384, 7168, 130, 8, "softmax", False, has_bias=False)),
    (gate, Case("few", 256, 64, 17)),
    (gate, Case("many", 256, 64, 2503)),
    (gate, Case("very many, no bias", 384, 64, 20000, has_bias=False)),
    (gate, Case("groups", 256, 64, 99, 8, "sigmoid", True, 8, 4)),
    (gate, Case("softmax", 300, 64, 99, 8, "softmax")),
    (hashed, Case("gathered", *FLASH, 33)),
    (hashed, Case("the larger shape", *PRO, 64)),
    (hashed, Case("by a product", 256, 4096, 3000)),
    (hashed, Case("softmax", 384, 512, 100, 8, "softmax", False)),
    (uniform, Case("uniform", 256, 64, 100)),
    (uniform, Case("uniform, odd k", 256, 64, 1001, top_k=7)),
]
# Of each kernel.
FEW = [CASES[i] for i in (1, 5, 6, 7, 11, 14, 16, 20, 22, 25)]


def name_of(value: object) -> str:
    return value.id if isinstance(value, Case) else getattr(value, "__name__", str(value))


def kinds_of(route: Route) -> list[str]:
    """The extras that a function has."""
    missing = {"second_bias"} if BIASES[0] in MISSING.get(route, ()) else set()
    missing |= {"logits"} if LOGITS[0] in MISSING.get(route, ()) else set()
    missing |= {"shared", "many shared"} if route is uniform else set()
    return [kind for kind in KINDS if kind not in missing]


def extras_for(route: Route, case: Case, kind: str, seed: int = 0) -> Extras:
    missing = MISSING.get(route, ())
    extras = draw_extras(kind, case.N, case.E, DEVICE, seed, missing)
    return replace(extras, shared_experts=0) if route is uniform else extras


EACH = [
    pytest.param(route, case, kind, id=f"{name_of(route)}-{case.id}-{kind}")
    for route, case in CASES
    for kind in kinds_of(route)
]
OF_FEW = [
    pytest.param(route, case, kind, id=f"{name_of(route)}-{case.id}-{kind}")
    for route, case in FEW
    for kind in ("all", "all, packed")
]
of_each = pytest.mark.parametrize(("route", "case", "kind"), EACH)
of_few = pytest.mark.parametrize(("route", "case", "kind"), OF_FEW)


# --- what is right ------------------------------------------------------------------------------


def with_nan_padding(inputs: Inputs, extras: Extras) -> Inputs:
    """The inputs with NaN in the rows that are no tokens."""
    padding = ~ref.valid_rows(inputs.x.shape[0], extras, inputs.x.device)
    inputs.x.masked_fill_(padding[:, None], torch.nan)
    return inputs


def wanted(route: Route, inputs: Inputs, case: Case, extras: Extras) -> Routing:
    """What the extras make of results without any, which are held to the oracle."""
    weights, ids = checked(route, inputs, case)
    if extras.second_bias is not None:
        other = inputs._replace(bias=extras.second_bias)
        others = checked(route, other, replace(case, has_bias=True))
        mask = extras.second_bias_mask[:, None]
        weights = torch.where(mask, others.weights, weights)
        ids = torch.where(mask, others.ids, ids)
    if route in (hashed, uniform):  # a token id that the table has not
        known = torch.arange(case.N, device=ids.device) > 0
        extras = replace(extras, valid=known if extras.valid is None else extras.valid & known)
    if route is uniform and extras.expert_map is not None:
        nobody = (ids < 0) | (ids >= case.E)
        weights, ids = weights.masked_fill(nobody, 0), ids.masked_fill(nobody, -1)
    return ref.finish(weights, ids, case.E, extras)


def checked(route: Route, inputs: Inputs, case: Case) -> Routing:
    """The result without extras."""
    routing = route(inputs, case, None)
    if route in (hashed, uniform):
        return routing  # `test_hash_gpu.py` holds it to the specification
    if route is gate:
        logits = ref.logits(inputs.x, inputs.W).float()
        assert_gated(*head(routing, logits), inputs.bias, **case.options)
    else:
        assert_routing(*head(routing, inputs.x), inputs.W, inputs.bias, **case.options)
    return routing


def head(routing: Routing, rows: Tensor) -> tuple[Routing, Tensor]:
    """Some rows, so that judging many does not take all of the time."""
    return Routing(routing.weights[:300], routing.ids[:300]), rows[:300]


def assert_same(routing: Routing, expected: Routing) -> None:
    """Equal ids; weights within a rounding, of packed ones another."""
    assert routing.ids.dtype == expected.ids.dtype
    packed = routing.weights.dtype == torch.bfloat16
    ids, right = (r.ids >> 16 if packed else r.ids for r in (routing, expected))
    assert torch.equal(ids, right)
    torch.testing.assert_close(
        routing.weights.float(),
        expected.weights.float(),
        rtol=2.0**-7 if packed else 1e-6,
        atol=1e-30,
        equal_nan=True,
    )


def assert_logits(extras: Extras, inputs: Inputs) -> None:
    """Every logit within its bound, those of NaN rows NaN."""
    if extras.out_logits is not None:
        bound = ref.logit_error_bound(inputs.x, inputs.W)
        error = (extras.out_logits - ref.logits(inputs.x, inputs.W)).abs()
        nan = inputs.x.isnan().any(-1)
        assert (error <= bound)[~nan].all()
        assert extras.out_logits[nan].isnan().all()


@of_each
def test_extras_make_of_a_result_what_the_specification_says(route, case, kind):
    extras = extras_for(route, case, kind)
    inputs = with_nan_padding(draw(case, DEVICE), extras)
    routing = route(inputs, case, extras)
    assert_same(routing, wanted(route, inputs, case, extras))
    assert_logits(extras, inputs)


REPLAYS = [
    (decode, Case("few", *FLASH, 7)),
    (decode, Case("the larger shape", *PRO, 64)),
    (decode, Case("by a product", *FLASH, 3000)),
    (decode, Case("raw sigmoid", 300, 264, 33, 9, "sigmoid", False)),
    (decode, Case("softmax", 384, 512, 65, 8, "softmax")),
    (prefill, Case("raw softmax", 384, 512, 300, 8, "softmax", False)),
    (gate, Case("logits", 256, 64, 300)),
    (gate, Case("softmax of logits", 300, 64, 17, 32, "softmax", False)),
]


@pytest.mark.parametrize("kind", ["none", "num_valid", "all", "all, packed"])
@pytest.mark.parametrize(("route", "case"), REPLAYS, ids=name_of)
def test_recorded_ids_are_weighed_by_this_calls_activations(route, case, kind):
    extras = Extras() if kind == "none" else draw_extras(kind, case.N, case.E, DEVICE)
    record = table_of(case, DEVICE).int()  # a copy
    record[0, 0] = -1
    record[-1, -1] = torch.iinfo(torch.int32).max
    extras = replace(extras.without(*LOGITS), fixed_ids=record)
    inputs = with_nan_padding(draw(case, DEVICE), extras)
    routing = route(inputs, case, extras)
    expected = ref.route(*inputs, **case.options, extras=extras)
    assert torch.equal(routing.ids >> 16, expected.ids >> 16)
    if not extras.packed:
        assert torch.equal(routing.ids, expected.ids)
    torch.testing.assert_close(
        routing.weights.float(),
        expected.weights.float(),
        rtol=2.0**-7 if extras.packed else 1e-5,
        atol=1e-5 * case.factor,
        equal_nan=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_replay_reads_logits_of_every_type(dtype):
    logits = torch.randn(33, 64, device=DEVICE).to(dtype)
    plain = activation_topk(logits)
    assert_same(activation_topk(logits, extras=Extras(fixed_ids=plain.ids)), plain)


@pytest.mark.parametrize("N", [1, 33, 500])
def test_a_batch_invariant_call_takes_extras(N):
    case = Case("batch invariant", *FLASH, N)
    extras = draw_extras("all", N, case.E, DEVICE)
    inputs = with_nan_padding(draw(case, DEVICE), extras)
    routing = decode(inputs, case, extras, batch_invariant=True)
    last = slice(N - 1, N)
    alone = inputs._replace(x=inputs.x[last])
    part = decode(alone, case, extras.rows(N - 1, N), batch_invariant=True)
    assert torch.equal(part.ids, routing.ids[last])
    assert torch.equal(part.weights.view(torch.int32), routing.weights[last].view(torch.int32))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_device_without_kernels_of_its_own_takes_extras(batch_invariant):
    case = Case("generic", 300, 264, 21)
    extras = draw_extras("all", case.N, case.E, DEVICE)
    inputs = with_nan_padding(draw(case, DEVICE), extras)
    shape = (case.N, case.top_k + extras.shared_experts)
    weights = torch.empty(shape, device=DEVICE)
    ids = torch.empty(shape, dtype=extras.ids_dtype, device=DEVICE)
    spec = RouterSpec(case.E, case.K, case.top_k)
    how = {"batch_invariant": batch_invariant, "extras": extras}
    generic.launch(*inputs, weights, ids, spec, case.factor, **how)
    assert_logits(extras, inputs)
    other = ref.route(*inputs, **case.options, extras=extras)
    assert torch.equal(ids[:, -2:], other.ids[:, -2:])
    routed = wanted(gate, inputs, case, extras)
    assert (ids == routed.ids).float().mean() > 0.99  # its logits are rounded, and not the gate's


# --- what a call is -----------------------------------------------------------------------------


@of_few
def test_a_call_with_extras_is_one_kernel_and_waits_for_nothing(route, case, kind):
    inputs, extras = draw(case, DEVICE), extras_for(route, case, kind)
    if route is gate:
        logits = ref.logits(inputs.x, inputs.W).float()

        def call() -> object:
            return activation_topk(logits, inputs.bias, **case.options, extras=extras)
    elif route in (hashed, uniform):
        tokens, table = torch.arange(case.N, device=DEVICE), table_of(case, DEVICE)
        products = {"x": inputs.x, "W": inputs.W} if route is hashed else {}

        def call() -> object:
            return hash_route(tokens, table, **products, extras=extras)
    else:

        def call() -> object:
            return route(inputs, case, extras)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_one_kernel(call)


@of_few
def test_results_go_into_the_given_tensors_and_nowhere_else(route, case, kind):
    inputs, extras = draw(case, DEVICE), extras_for(route, case, kind)
    expected = route(inputs, case, extras)
    columns = expected.ids.shape[1]
    around = [
        torch.full((case.N + 2, columns), -5, dtype=dtype, device=DEVICE)
        for dtype in (expected.ids.dtype, torch.float32)
    ]
    given = {"out_ids": around[0][1:-1]}
    if not extras.packed:
        given["out_weights"] = around[1][1:-1]
    logits = None
    if extras.out_logits is not None:
        logits = torch.full((case.N + 2, case.E), -5.0, device=DEVICE)
        extras = replace(extras, out_logits=logits[1:-1])
        around.append(logits)
    routing = route(inputs, case, extras, **given)
    assert routing.ids.data_ptr() == given["out_ids"].data_ptr()
    assert_same(routing, expected)
    for whole in around:
        assert (whole[0] == -5).all()
        assert (whole[-1] == -5).all()


@pytest.mark.parametrize("kind", ["num_valid", "all", "all, packed"])
@pytest.mark.parametrize(("route", "case"), FEW, ids=name_of)
def test_a_captured_graph_takes_what_its_tensors_hold(route, case, kind):
    inputs, extras = draw(case, DEVICE), extras_for(route, case, kind)
    route(inputs, case, extras)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = route(inputs, case, extras)
    for seed in range(1, 5):
        fresh = extras_for(route, case, kind, seed)
        for name, value in fresh.fields().items():
            if isinstance(value, Tensor) and name != "out_logits":
                getattr(extras, name).copy_(value)
        extras.num_valid.fill_((0, 1, case.N, case.N + 3)[seed - 1])
        for tensor, new in zip(inputs, draw(case, DEVICE, seed), strict=True):
            if tensor is not None:
                tensor.copy_(new)
        with_nan_padding(inputs, extras)
        graph.replay()
        results = Routing(*(t.clone() for t in captured))
        written = None if extras.out_logits is None else extras.out_logits.clone()
        assert_same(results, route(inputs, case, extras))
        assert_same(results, wanted(route, inputs, case, extras))
        if written is not None:
            assert torch.equal(written.nan_to_num(7), extras.out_logits.nan_to_num(7))


def test_a_kernel_right_behind_the_one_that_writes_its_extras_sees_them():
    case = Case("chain", *FLASH, 8)
    inputs = draw(case, DEVICE)
    count = torch.zeros((), dtype=torch.int32, device=DEVICE)
    mask = torch.zeros(case.N, dtype=torch.bool, device=DEVICE)
    extras = Extras(num_valid=count, valid=mask)
    decode(inputs, case, extras)
    plain = decode(inputs, case, None)
    for step in range(50):
        count.fill_(step % 9)
        mask.copy_(torch.arange(case.N, device=DEVICE) % 3 != step % 3)
        result = decode(inputs, case, extras)
        real = (torch.arange(case.N) < step % 9) & (torch.arange(case.N) % 3 != step % 3)
        assert torch.equal((result.ids[:, 0] >= 0).cpu(), real), step
        assert torch.equal(result.ids[real.to(DEVICE)], plain.ids[real.to(DEVICE)])
