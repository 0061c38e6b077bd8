"""hash_route on a GPU: held to the reference for every form of call and on hostile data.

And to its contract as a launch: one kernel, the same bits again, captured or not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch
from cases import FLASH, PRO, ROWS, Case, draw
from device_work import assert_neither_allocates_nor_waits, assert_one_kernel
from oracle import (
    LARGEST_SUM,
    activation_intervals,
    assert_weights,
    exact_logits,
)
from torch import Tensor

from cute_router import Routing, hash_route, reference
from cute_router.topk import hash as hashing

pytestmark = pytest.mark.gpu(capability=(8, 0))

DEVICE = "cuda"
INTEGERS = (torch.int32, torch.int64)
VOCAB = 1000
# Beyond this the error of a logit can move a weight by more than 1e-5, for here any expert can be
# chosen: where all those of a token have small activations, these follow their logits' errors.
ORDINARY_BOUND = 2.0**-17
FUZZ_SEEDS = 30  # for each of the gates


@dataclass(frozen=True)
class Gate:
    """One gated hash router; what is compiled follows from it."""

    E: int
    K: int
    k: int = 6
    scoring: str = "sqrtsoftplus"
    renormalize: bool = True
    token_dtype: torch.dtype = torch.int64
    table_dtype: torch.dtype = torch.int64

    @property
    def options(self) -> dict[str, object]:
        return {"scoring": self.scoring, "renormalize": self.renormalize}


TUNED = [Gate(*FLASH), Gate(*PRO)]
GATES = [
    *TUNED,
    Gate(*FLASH, 8, "sigmoid", False, torch.int32, torch.int32),
    Gate(*PRO, 6, "softmax", True, torch.int32, torch.int64),
    Gate(7, 264, 32, "sqrtsoftplus", True, torch.int64, torch.int32),
    Gate(1, 8, 1),
    Gate(300, 5120, 4, "softmax", False),
    Gate(1024, 16392, 17, "sigmoid"),
    Gate(64, 2880, 3, renormalize=False),
    Gate(160, 65544, 31),
]


def name(gate: Gate) -> str:
    raw = "" if gate.renormalize else "-raw"
    return f"E{gate.E}-K{gate.K}-k{gate.k}-{gate.scoring}{raw}"


def tokens_and_table(
    N: int, k: int, E: int, token_dtype: torch.dtype, table_dtype: torch.dtype, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Random ones, without anything wrong in them."""
    token_ids = torch.randint(VOCAB, (N,), dtype=token_dtype, device=DEVICE)
    storage = torch.full((VOCAB, k + padding), 10**9, dtype=table_dtype, device=DEVICE)
    table = storage[:, :k]
    table.copy_(torch.randint(E, (VOCAB, k), device=DEVICE))
    return token_ids, table


def spoil(token_ids: Tensor, table: Tensor, E: int) -> None:
    """Ids that the table does not have, entries that are no expert, repeated ones."""
    lowest, highest = torch.iinfo(token_ids.dtype).min, torch.iinfo(token_ids.dtype).max
    for start, value in enumerate((-1, VOCAB, lowest, highest), start=1):
        token_ids[start::7] = value
    table[::5, 0] = -1
    table[1::5, -1] = E
    table[2::5] = table[2::5, :1].clone()
    table[3::25] = torch.iinfo(table.dtype).max
    table[4::25] = torch.iinfo(table.dtype).min


def gated_inputs(gate: Gate, N: int, seed: int = 0, kinds=("normal",), integer: bool = False):
    case = Case("hash", gate.E, gate.K, N, padding=8)
    return draw(case, DEVICE, seed, kinds, integer)[:2]


def assert_gated(
    routing: Routing, token_ids: Tensor, table: Tensor, x: Tensor, W: Tensor, gate: Gate, factor
) -> None:
    """The reference's ids; weights within what fp32 logits allow."""
    N, E = x.shape[0], W.shape[0]
    expected = reference.hash_route(
        token_ids, table, x=x, W=W, routed_scaling_factor=factor, **gate.options
    )
    assert torch.equal(routing.ids, expected.ids)
    nobody = expected.ids < 0
    assert not routing.weights[nobody].any()
    logit, magnitude = reference.logits(x, W), reference.logits(x.abs(), W.abs())
    bound = reference.logit_error_bound(x, W).masked_fill(exact_logits(x, W, logit, magnitude), 0)
    intervals = activation_intervals(logit, bound, gate.scoring)
    # Expert E, of activation 0, is nobody; beside a NaN its 0 would not stay one.
    a = type(intervals)(*(torch.cat([t, t.new_zeros(N, 1)], 1) for t in intervals))
    ids = expected.ids.long().masked_fill(nobody, E)
    weighed = reference.weigh(a.value, ids, factor, gate.renormalize).float()
    weights = torch.where(nobody, weighed, routing.weights)
    known = ~(magnitude.isfinite() & (magnitude > LARGEST_SUM)).any(-1)
    ordinary = bound.amax(-1) <= ORDINARY_BOUND
    assert_weights(weights, ids, a, factor, gate.renormalize, ordinary, known)


def assert_same_bits(actual: Routing, expected: Routing) -> None:
    assert torch.equal(actual.ids, expected.ids)
    assert torch.equal(actual.weights.view(torch.int32), expected.weights.view(torch.int32))


# --- equal weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 31, 33, 128, 1000, 65537])
@pytest.mark.parametrize("k", [1, 2, 6, 7, 8, 12, 31, 32])
@pytest.mark.parametrize("token_dtype", INTEGERS)
@pytest.mark.parametrize("table_dtype", INTEGERS)
def test_rows_are_copied_and_the_factor_divided(N, k, token_dtype, table_dtype):
    token_ids, table = tokens_and_table(N, k, 256, token_dtype, table_dtype)
    for padding in (0, 1, 2, 4):
        _, table = tokens_and_table(1, k, 256, token_dtype, table_dtype, padding)
        spoil(token_ids, table, 256)
        routing = hash_route(token_ids, table, routed_scaling_factor=2.5)
        assert_same_bits(routing, reference.hash_route(token_ids, table, routed_scaling_factor=2.5))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_tensors_are_read_and_written_where_they_lie(offset):
    token_ids, table = tokens_and_table(50, 8, 256, torch.int64, torch.int32)
    expected = reference.hash_route(token_ids, table)
    storage = torch.empty(table.numel() + 4, dtype=torch.int32, device=DEVICE)
    moved = storage[offset : offset + table.numel()].view(table.shape).copy_(table)
    assert_same_bits(hash_route(token_ids, moved), expected)
    weights = torch.full((410,), -5.0, device=DEVICE)
    ids = torch.full((410,), -5, dtype=torch.int32, device=DEVICE)
    out = {
        "out_weights": weights[offset : offset + 400].view(50, 8),
        "out_ids": ids[offset : offset + 400].view(50, 8),
    }
    assert_same_bits(hash_route(token_ids, table, **out), expected)
    for whole in (weights, ids):
        assert (whole[:offset] == -5).all()
        assert (whole[offset + 400 :] == -5).all()


@pytest.mark.parametrize("factor", [0, 1, 2.5, 0.1])
@pytest.mark.parametrize("pdl", [False, True])
def test_the_factor_is_a_run_time_value(factor, pdl):
    token_ids, table = tokens_and_table(40, 6, 256, torch.int64, torch.int64)
    routing = hash_route(token_ids, table, routed_scaling_factor=factor, pdl=pdl)
    assert_same_bits(routing, reference.hash_route(token_ids, table, routed_scaling_factor=factor))


def test_strides_of_dimensions_of_size_1_say_nothing():
    token_ids = torch.arange(30, device=DEVICE)[::3][2:3]  # stride 3
    _, table = tokens_and_table(1, 6, 256, torch.int64, torch.int64)
    expected = reference.hash_route(token_ids, table)
    weights = torch.empty(2, 7, device=DEVICE)[:1, :6]
    ids = torch.empty(2, 7, dtype=torch.int32, device=DEVICE)[:1, :6]
    assert_same_bits(hash_route(token_ids, table), expected)
    result = hash_route(token_ids, table, out_weights=weights, out_ids=ids)
    assert result.weights is weights
    assert_same_bits(result, expected)
    one_row = torch.arange(100, device=DEVICE).as_strided((1, 6), (3, 1))
    zeros = token_ids * 0
    assert_same_bits(hash_route(zeros, one_row), reference.hash_route(zeros, one_row))


def test_a_table_beyond_2_to_the_31_elements_is_read_where_it_is():
    rows, k = 70_000_000, 32
    if torch.cuda.mem_get_info()[0] < 10 * rows * k // 2:
        pytest.skip("needs 11 GB of free device memory")
    table = torch.zeros(rows, k, dtype=torch.int32, device=DEVICE)
    token_ids = torch.tensor([0, rows - 1, 67_108_864, rows], device=DEVICE)
    table[token_ids[:3]] = torch.randint(256, (3, k), dtype=torch.int32, device=DEVICE)
    weights, ids = hash_route(token_ids, table)
    assert torch.equal(ids[:3], table[token_ids[:3]])
    assert (ids[3] == -1).all()
    assert weights[3].tolist() == [0.0] * k


# --- weighed by the gate -------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 8, 64, 200])
@pytest.mark.parametrize("gate", GATES, ids=name)
def test_the_table_chooses_and_the_gate_weighs(gate, N):
    token_ids, table = tokens_and_table(N, gate.k, gate.E, gate.token_dtype, gate.table_dtype)
    x, W = gated_inputs(gate, N)
    for padded_table in (False, True):
        if padded_table:
            spoil(token_ids, table, gate.E)
        routing = hash_route(token_ids, table, x=x, W=W, routed_scaling_factor=1.5, **gate.options)
        assert_gated(routing, token_ids, table, x, W, gate, 1.5)


@pytest.mark.parametrize("gate", GATES, ids=name)
def test_hostile_data_is_weighed_as_the_reference_does(gate):
    for seed in range(FUZZ_SEEDS):
        random = Random(f"{gate} {seed}")
        torch.manual_seed(seed)
        N, factor = random.randint(1, 80), random.choice([0.0, 1, 2.5])
        kinds = random.choices(list(ROWS), k=N)
        x, W = gated_inputs(gate, N, seed, kinds, integer=random.random() < 0.3)
        if random.random() < 0.2:
            W[random.randrange(gate.E), random.randrange(gate.K)] = float("nan")
        token_ids, table = tokens_and_table(
            N, gate.k, gate.E, gate.token_dtype, gate.table_dtype, random.choice([0, 0, 1, 2, 5])
        )
        if random.random() < 0.7:
            spoil(token_ids, table, gate.E)
        routing = hash_route(
            token_ids, table, x=x, W=W, routed_scaling_factor=factor, **gate.options
        )
        try:
            assert_gated(routing, token_ids, table, x, W, gate, factor)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("gate", [g for g in GATES if g.scoring != "softmax"], ids=name)
@pytest.mark.parametrize("gathered", [False, True])
def test_both_ways_to_the_products_are_right(gate, gathered, monkeypatch):
    monkeypatch.setattr(hashing, "gathers", lambda *_: gathered)
    token_ids, table = tokens_and_table(100, gate.k, gate.E, gate.token_dtype, gate.table_dtype)
    spoil(token_ids, table, gate.E)
    x, W = gated_inputs(gate, 100)
    routing = hash_route(token_ids, table, x=x, W=W, **gate.options)
    assert_gated(routing, token_ids, table, x, W, gate, 1.0)


@pytest.mark.parametrize("gate", TUNED, ids=name)
def test_many_tokens_are_weighed_too(gate):
    token_ids, table = tokens_and_table(5000, gate.k, gate.E, torch.int64, torch.int64)
    x, W = gated_inputs(gate, 5000)
    assert not hashing.gathers(5000, gate.E, gate.K, gate.k, gate.scoring)
    routing = hash_route(token_ids, table, x=x, W=W)
    assert_gated(routing, token_ids, table, x, W, gate, 1.0)


@pytest.mark.parametrize("gate", GATES, ids=name)
def test_a_nan_token_keeps_its_nan_to_itself(gate):
    token_ids, table = tokens_and_table(5, gate.k, gate.E, gate.token_dtype, gate.table_dtype)
    x, W = gated_inputs(gate, 5)
    clean = hash_route(token_ids, table, x=x, W=W, **gate.options)
    x[3] = float("nan")
    weights, ids = hash_route(token_ids, table, x=x, W=W, **gate.options)
    assert weights[3].isnan().all()
    others = [0, 1, 2, 4]
    assert_same_bits(
        Routing(weights[others], ids[others]), Routing(clean.weights[others], clean.ids[others])
    )


def test_the_row_stride_of_a_single_row_is_ignored():
    gate = Gate(1, 64, 2)
    token_ids, table = tokens_and_table(1, 2, 1, torch.int64, torch.int64)
    x, W = gated_inputs(gate, 1)
    expected = hash_route(token_ids, table, x=x, W=W)
    odd = [torch.zeros(1, 67, dtype=t.dtype, device=DEVICE)[:, :64].copy_(t) for t in (x, W)]
    assert_same_bits(hash_route(token_ids, table, x=odd[0], W=odd[1]), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_no_tokens_give_empty_tensors(gated):
    token_ids, table = tokens_and_table(0, 6, 256, torch.int64, torch.int64)
    x, W = gated_inputs(TUNED[0], 1)
    weights, ids = hash_route(token_ids, table, **({"x": x[:0], "W": W} if gated else {}))
    assert weights.shape == ids.shape == (0, 6)
    assert weights.is_cuda
    assert ids.is_cuda


# --- what a call is ------------------------------------------------------------------------------


def calls() -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Arguments of each form of call, by seed."""

    def uniform(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return tokens_and_table(64, 6, 256, torch.int64, torch.int64)

    def gated(gate: Gate) -> Callable[[int], tuple[Tensor, ...]]:
        def make(seed: int) -> tuple[Tensor, ...]:
            torch.manual_seed(seed)
            found = tokens_and_table(8, gate.k, gate.E, torch.int64, torch.int64)
            return *found, *gated_inputs(gate, 8, seed)

        return make

    return {"uniform": uniform, "flash": gated(TUNED[0]), "pro": gated(TUNED[1])}


def run(inputs: tuple[Tensor, ...], **options: object) -> Routing:
    gate = dict(zip(("x", "W"), inputs[2:], strict=False))
    return hash_route(*inputs[:2], **gate, **options)


over_calls = pytest.mark.parametrize("make", calls().values(), ids=calls())


@over_calls
def test_the_same_inputs_give_the_same_bits(make):
    inputs = make(0)
    first = run(inputs)
    for _ in range(20):
        assert_same_bits(run(inputs), first)


@over_calls
def test_pdl_does_not_change_the_bits(make):
    inputs = make(0)
    assert_same_bits(run(inputs, pdl=False), run(inputs))


@over_calls
def test_a_captured_graph_gives_the_eager_bits_for_what_its_inputs_hold_at_replay(make):
    inputs = make(0)
    run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    for seed in range(1, 4):
        for tensor, new in zip(inputs, make(seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        assert_same_bits(captured, run(inputs))


@over_calls
def test_a_call_is_one_kernel_and_nothing_else(make):
    inputs = make(0)
    run(inputs)
    assert_one_kernel(lambda: run(inputs))


@over_calls
def test_a_call_with_outputs_given_allocates_nothing_and_waits_for_nothing(make):
    inputs = make(0)
    weights, ids = run(inputs)
    assert_neither_allocates_nor_waits(lambda: run(inputs, out_weights=weights, out_ids=ids))


@over_calls
def test_a_call_of_an_engine_takes_the_fast_path(make):
    token_ids, table, x, W = (*make(0), None, None)[:4]
    call = (token_ids, table, x, W, 1.5, "sqrtsoftplus", True, True, None, None)
    assert hashing.fast(*call) is not None
