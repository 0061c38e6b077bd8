"""activation_topk on a GPU: held to the oracle for every router and on every kind of logits.

And to its contract as a launch: one kernel, the same bits again, in any batch, captured or not.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from device_work import assert_neither_allocates_nor_waits, assert_one_kernel
from gate_cases import BIASES, FEW, GATES, LOGITS, MANY, Gate, draw, ids
from oracle import assert_gated
from topk_oracle import GUARD, POISON, guarded
from torch import Tensor

from cute_router import RouterSpec, Routing, activation_topk, reference
from cute_router import compile as compiler
from cute_router.spec import HIDDEN_MULTIPLE
from cute_router.topk import gate as gating

pytestmark = pytest.mark.gpu(capability=(8, 0))

DEVICE = "cuda"
FUZZ_SEEDS = 12  # for each of the gates: 360 cases
CHECKED = 1 << 22  # comparisons of a chosen expert with another at a time

# Where a token must not notice its company: few lanes to a token, a warp to a token.
INVARIANT = [
    Gate(256),
    Gate(384, 8, "sigmoid", False, has_bias=False, dtype=torch.bfloat16),
    Gate(144, 16, dtype=torch.bfloat16),
    Gate(256, 8, "sigmoid", n_group=8, topk_group=4),
    Gate(384, 6, "softmax"),
]
COMPANY = (1, 3, 17, 64, 200, 9000)

# Whose choice is exactly that of the kernel's own activations; a bias here is of zeros.
OWN = [
    Gate(256, renormalize=False, has_bias=False, N=64),
    Gate(256, renormalize=False, has_bias=False, N=MANY),
    Gate(256, renormalize=False, N=64),
    Gate(256, 6, "sigmoid", False, has_bias=False, N=64),
]
LAUNCHED = [Gate(256), Gate(384, N=MANY), Gate(256, 8, "sigmoid", n_group=8, topk_group=4)]

over_gates = pytest.mark.parametrize("gate", GATES, ids=ids)
over_launched = pytest.mark.parametrize("gate", LAUNCHED, ids=ids)


def run(gate: Gate, logits: Tensor, bias: Tensor | None, **options: Any) -> Routing:
    return activation_topk(logits, bias, **gate.options, **options)


def check(gate: Gate, logits: Tensor, bias: Tensor | None, **options: Any) -> Routing:
    """Call the function into guarded outputs and hold the result to the oracle."""
    shape = (logits.shape[0], gate.k)
    weights, around_weights = guarded(shape, torch.float32, logits.device)
    chosen, around_ids = guarded(shape, torch.int32, logits.device)
    routing = run(gate, logits, bias, out_weights=weights, out_ids=chosen, **options)
    assert routing.weights is weights
    assert routing.ids is chosen
    step = max(1, CHECKED // (gate.k * gate.E))
    parts = zip(weights.split(step), chosen.split(step), logits.split(step), strict=True)
    for some_weights, some_ids, some in parts:
        assert_gated(Routing(some_weights, some_ids), some, bias, **gate.options)
    for whole in (around_weights, around_ids):
        outside = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert (outside == POISON).all(), "something is written beside the outputs"
    return routing


def assert_same_bits(actual: Routing, expected: Routing) -> None:
    assert torch.equal(actual.ids, expected.ids)
    assert torch.equal(actual.weights.view(torch.int32), expected.weights.view(torch.int32))


def rows_of(routing: Routing, rows: slice) -> Routing:
    return Routing(routing.weights[rows], routing.ids[rows])


# --- right for every router and kind of logits --------------------------------------------------


@pytest.mark.parametrize("kind", LOGITS)
@over_gates
def test_logits_of_any_kind_are_routed_as_the_oracle_does(gate, kind):
    check(gate, *draw(gate, [kind], DEVICE, bias="ties" if kind == "few values" else "normal"))


@over_gates
def test_random_batches_of_mixed_rows_are_routed_as_the_oracle_does(gate):
    for seed in range(FUZZ_SEEDS):
        random = Random(f"{gate.id} {seed}")
        tokens = random.randint(2, 200) if gate.N == FEW else gate.N
        kinds = random.choices(list(LOGITS), k=5)
        inputs = draw(replace(gate, N=tokens), kinds, DEVICE, seed, random.choice(BIASES))
        try:
            check(gate, *inputs)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, N={tokens}, {kinds}: {error}") from error


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 31, 33, 1023, 2048])
@pytest.mark.parametrize("gate", [Gate(256), Gate(300, n_group=12, topk_group=4)], ids=ids)
def test_tokens_that_fill_no_cta_are_routed(gate, N):
    check(gate, *draw(replace(gate, N=N), ["normal"], DEVICE))


@pytest.mark.parametrize("N", [2049, 2051, 4096, 65537])
def test_many_tokens_that_fill_no_warp_are_routed(N):
    gate = Gate(256, N=N)
    check(gate, *draw(gate, ["normal"], DEVICE))


def own_activations(gate: Gate, logits: Tensor) -> Tensor:
    """The activations of all logits by a kernel, that of one expert."""
    column = logits.reshape(-1, 1)
    options = {"top_k": 1, "scoring": gate.scoring, "renormalize": False, "batch_invariant": True}
    return activation_topk(column, **options).weights.view_as(logits)


@pytest.mark.parametrize("kind", ["normal", "near ties", "near ties at the edge", "tiny", "lower"])
@pytest.mark.parametrize("gate", OWN, ids=ids)
def test_the_choice_is_the_exact_one_among_the_kernels_own_activations(gate, kind):
    logits, bias = draw(gate, [kind], DEVICE)
    bias = None if bias is None else torch.zeros_like(bias)
    a = own_activations(gate, logits)
    options = gate.options | {"routed_scaling_factor": 1.0}
    routing = activation_topk(logits, bias, **options)
    wanted = reference.select(a.double(), gate.k)
    assert_same_bits(routing, Routing(a.gather(1, wanted), wanted.int()))


@over_gates
def test_a_row_of_nan_takes_the_first_experts_and_keeps_its_nan_to_itself(gate):
    logits, bias = draw(gate, ["normal"], DEVICE)
    clean = run(gate, logits, bias)
    logits[3] = torch.nan
    routing = run(gate, logits, bias)
    assert routing.ids[3].tolist() == list(range(gate.k))
    assert routing.weights[3].isnan().all()
    for others in (slice(0, 3), slice(4, None)):
        assert_same_bits(rows_of(routing, others), rows_of(clean, others))


def test_the_factor_is_a_run_time_value():
    gate = Gate(256)
    logits, bias = draw(gate, ["normal"], DEVICE)
    for factor in (0.0, 1, 2.5):
        options = gate.options | {"routed_scaling_factor": factor}
        assert_gated(activation_topk(logits, bias, **options), logits, bias, **options)


# --- tensors as they come -----------------------------------------------------------------------


@pytest.mark.parametrize("gate", [Gate(256), Gate(256, N=MANY)], ids=ids)
@pytest.mark.parametrize(("start", "padding"), [(0, 4), (4, 4), (1, 3), (3, 0), (1, 1)])
def test_logits_are_read_where_they_lie(gate, start, padding):
    stride = gate.E + start + padding
    logits = torch.full((gate.N, stride), torch.nan, device=DEVICE)[:, start : start + gate.E]
    values, bias = draw(gate, ["normal"], DEVICE)
    logits.copy_(values)
    assert_same_bits(check(gate, logits, bias), run(gate, values, bias))


@pytest.mark.parametrize(
    "gate", [Gate(256, N=1), Gate(256, 8, "sigmoid", n_group=8, topk_group=4, N=1)], ids=ids
)
@pytest.mark.parametrize("stride", [1, 3, 255, 257])
def test_the_row_stride_of_a_single_row_is_ignored(gate, stride):
    logits, bias = draw(gate, ["normal"], DEVICE)
    odd = logits.as_strided((1, gate.E), (stride, 1))
    assert_same_bits(check(gate, odd, bias), run(gate, logits, bias))


def test_the_row_stride_of_a_single_result_is_ignored():
    gate = Gate(256, N=1)
    logits, bias = draw(gate, ["normal"], DEVICE)
    weights = torch.empty(gate.k, device=DEVICE).as_strided((1, gate.k), (3, 1))
    chosen = torch.empty(gate.k, dtype=torch.int32, device=DEVICE).as_strided((1, gate.k), (3, 1))
    result = run(gate, logits, bias, out_weights=weights, out_ids=chosen)
    assert result.weights is weights
    assert_same_bits(result, run(gate, logits, bias))


def test_the_stride_of_a_single_bias_and_logit_is_ignored():
    gate = Gate(1, 1)
    logits, bias = draw(gate, ["normal"], DEVICE)
    spread = torch.zeros(gate.N, 2, device=DEVICE)[:, :1].copy_(logits)
    expected = run(gate, logits, bias)
    assert_same_bits(run(gate, spread, bias.as_strided((1,), (5,))), expected)
    assert_same_bits(run(gate, spread.as_strided((gate.N, 1), (2, 7)), bias), expected)


def test_no_tokens_give_empty_tensors():
    weights, chosen = activation_topk(torch.empty(0, 256, device=DEVICE))
    assert weights.shape == chosen.shape == (0, 6)
    assert weights.is_cuda
    assert chosen.is_cuda


# --- what a call is -----------------------------------------------------------------------------


@pytest.mark.parametrize("gate", INVARIANT, ids=ids)
def test_a_batch_invariant_token_has_the_same_bits_in_any_batch(gate):
    logits, bias = draw(replace(gate, N=COMPANY[-1]), ["normal"], DEVICE)
    together = check(gate, logits, bias, batch_invariant=True)
    for N in COMPANY:
        for first in (0, 63, COMPANY[-1] - N):
            rows = slice(first, first + N)
            part = run(gate, logits[rows], bias, batch_invariant=True)
            assert_same_bits(part, rows_of(together, rows))


@over_gates
def test_the_same_logits_give_the_same_bits(gate):
    inputs = draw(gate, ["normal", "any bits"], DEVICE)
    first = run(gate, *inputs)
    for _ in range(5):
        assert_same_bits(run(gate, *inputs), first)


def test_pdl_does_not_change_the_bits():
    inputs = draw(Gate(256), ["normal"], DEVICE)
    assert_same_bits(run(Gate(256, pdl=False), *inputs), run(Gate(256), *inputs))


@over_launched
def test_a_captured_graph_gives_the_eager_bits_for_what_its_inputs_hold_at_replay(gate):
    logits, bias = draw(gate, ["normal"], DEVICE)
    run(gate, logits, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(gate, logits, bias)
    for seed in range(1, 4):
        for tensor, new in zip((logits, bias), draw(gate, ["normal"], DEVICE, seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        assert_same_bits(captured, run(gate, logits, bias))
        assert_gated(captured, logits, bias, **gate.options)


def test_a_call_sees_what_the_one_ahead_wrote_and_does_not_outrun_its_readers():
    first, second, rounds = Gate(256, 32, N=64), Gate(32, 8, N=64), 20
    inputs = [draw(first, ["normal"], DEVICE, seed) for seed in range(rounds)]
    between = run(first, *inputs[0])
    results = [run(second, between.weights, None) for _ in inputs]

    def chain() -> None:  # `between` is written again as soon as it has been read
        for (logits, bias), (weights, chosen) in zip(inputs, results, strict=True):
            run(first, logits, bias, out_weights=between.weights, out_ids=between.ids)
            run(second, between.weights, None, out_weights=weights, out_ids=chosen)

    wanted = [run(second, run(first, *given).weights, None) for given in inputs]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for play in (chain, graph.replay, graph.replay):
        for result in results:
            result.weights.zero_()
        play()
        for result, right in zip(results, wanted, strict=True):
            assert_same_bits(result, right)


def test_calls_on_two_streams_do_not_disturb_each_other():
    work = [(gate, draw(gate, ["normal"], DEVICE, seed)) for seed, gate in enumerate(LAUNCHED)]
    wanted = [run(gate, *inputs) for gate, inputs in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for turn in range(10):
        for i, (gate, inputs) in enumerate(work):
            with torch.cuda.stream(streams[(turn + i) % 2]):
                found.append(run(gate, *inputs))
    torch.cuda.synchronize()
    for i, routing in enumerate(found):
        assert_same_bits(routing, wanted[i % len(work)])


@over_launched
def test_a_call_is_one_kernel_and_nothing_else(gate):
    inputs = draw(gate, ["normal"], DEVICE)
    run(gate, *inputs)
    assert_one_kernel(lambda: run(gate, *inputs))


@over_launched
def test_a_call_with_outputs_given_allocates_nothing_and_waits_for_nothing(gate):
    inputs = draw(gate, ["normal"], DEVICE)
    weights, chosen = run(gate, *inputs)
    assert_neither_allocates_nor_waits(
        lambda: run(gate, *inputs, out_weights=weights, out_ids=chosen)
    )


@over_launched
def test_a_call_of_an_engine_takes_the_short_way(gate):
    inputs = draw(gate, ["normal"], DEVICE)
    options = (gate.k, gate.scoring, gate.renormalize, gate.n_group, gate.topk_group, False, True)
    found = gating.fast(*inputs, gate.options["routed_scaling_factor"], options, None, None)
    assert found is not None
    assert_gated(found, *inputs, **gate.options)


# --- what is compiled ---------------------------------------------------------------------------


def calls() -> list[tuple[Gate, bool]]:
    """A call, batch invariant or not, for each kernel of this page."""
    one_expert = [Gate(1, 1, gate.scoring, False, has_bias=False) for gate in OWN]
    odd_rows = [Gate(256, N=N, padding=1) for N in (FEW, MANY)]
    chained = [Gate(256, 32, N=64), Gate(32, 8, has_bias=False, N=64)]
    plain = [*GATES, *LAUNCHED, *OWN, *odd_rows, *chained]
    invariant = [*INVARIANT, *one_expert]
    return [*((gate, False) for gate in plain), *((gate, True) for gate in invariant)]


def configurations(arch: str = "sm_90a") -> list[Any]:
    """All configurations that dispatch chooses on a Hopper GPU, to fill a kernel cache with."""
    found: dict[Any, Callable[..., None]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "kernel", lambda c: found.setdefault(c, lambda *_: None))
        patch.setattr(gating, "target_for", lambda device: ("sm_90", arch))
        patch.setattr(gating, "kernel_of", gating.kernel_of.__wrapped__)
        for gate, batch_invariant in calls():
            queue_on_nothing(gate, batch_invariant)
    return list(found)


def queue_on_nothing(gate: Gate, batch_invariant: bool) -> None:
    """Launch a call on memory that is never touched."""
    logits = torch.empty(gate.N, gate.E + gate.padding, dtype=gate.dtype)[:, : gate.E]
    weights = torch.empty(gate.N, gate.k)
    spec = RouterSpec(
        gate.E,
        HIDDEN_MULTIPLE,
        gate.k,
        gate.scoring,
        gate.renormalize,
        gate.has_bias,
        gate.n_group,
        gate.topk_group,
    )
    gating.launch(
        logits,
        None,
        weights,
        weights,
        spec,
        1.0,
        batch_invariant=batch_invariant,
        pdl=gate.pdl,
    )
