"""The hash kernels, simulated from their PTX: every form of call, and no read outside its tensors.

Simulated as in `test_ptx_sim.py`: functionally, on a CPU. Whatever a kernel touches outside an
array, or before it has waited for the kernel ahead, is an error there.
"""

import math
import re

import pytest
import torch
from ptx_sim.errors import Hazard, OutOfBounds
from ptx_sim.launch import ptx_of
from ptx_sim.launch_hash import simulate

from cute_router import Routing, reference
from cute_router.spec import MAX_EXPERTS, RouterSpec
from cute_router.topk.hash_config import HashConfig, HashGateConfig, HashLogitsConfig

pytestmark = pytest.mark.filterwarnings("ignore:This static loop has")

DTYPES = {32: torch.int32, 64: torch.int64}
VOCAB = 11


def draw(N: int, k: int, E: int, token_bits: int, table_bits: int):
    """Token ids and a table with everything in them that is no token and no expert."""
    token_ids = torch.randint(VOCAB, (N,), dtype=DTYPES[token_bits])
    table = torch.randint(E, (VOCAB, k), dtype=DTYPES[table_bits])
    token_ids[1::5] = -1
    token_ids[2::7] = VOCAB
    token_ids[3::11] = torch.iinfo(token_ids.dtype).min
    table[3] = table[3, 0]
    table[5] = -1
    table[6, -1] = E
    table[7, 0] = torch.iinfo(table.dtype).max
    return token_ids, table


def spec_of(K: int, k: int, scoring: str, renormalize: bool = True) -> RouterSpec:
    return RouterSpec(MAX_EXPERTS, K, k, scoring, renormalize, has_bias=False)


def options_of(spec: RouterSpec) -> dict[str, object]:
    return {"scoring": spec.scoring, "renormalize": spec.renormalize}


def assert_near(routing: Routing, expected: Routing, factor: float = 1.0) -> None:
    assert torch.equal(routing.ids, expected.ids)
    assert not routing.weights[routing.ids < 0].any()
    torch.testing.assert_close(
        routing.weights, expected.weights, atol=1e-5 * factor, rtol=1e-5, equal_nan=True
    )


UNIFORM = [
    (HashConfig(6, "sm_100a", 64, 64, 2), 40),
    (HashConfig(6, "sm_90a", 32, 32, 2), 33),
    (HashConfig(8, "sm_100a", 32, 32, 4), 70),
    (HashConfig(8, "sm_80", 64, 64, 2, pdl=False), 1),
    (HashConfig(1, "sm_90a", 64, 32, 1), 130),
    (HashConfig(32, "sm_90a", 64, 32, 4), 31),
    (HashConfig(31, "sm_100a", 32, 64, 1), 33),
]


@pytest.mark.parametrize(("config", "N"), UNIFORM, ids=str)
@pytest.mark.parametrize("padding", [0, 4])
def test_the_uniform_kernel_copies_rows_and_divides_the_factor(config, N, padding):
    token_ids, table = draw(N, config.top_k, 256, config.token_bits, config.table_bits)
    routing = simulate(config, token_ids, table, factor=2.5, padding=padding)
    expected = reference.hash_route(token_ids, table, routed_scaling_factor=2.5)
    assert torch.equal(routing.ids, expected.ids)
    assert torch.equal(routing.weights, expected.weights)


GATE = [
    HashGateConfig(spec_of(512, 6, "sqrtsoftplus"), "sm_100a"),
    HashGateConfig(spec_of(264, 6, "sigmoid", False), "sm_90a", 32, 32),
    HashGateConfig(spec_of(8, 1, "sqrtsoftplus"), "sm_100a", 32, 64),
    HashGateConfig(spec_of(4096, 8, "sqrtsoftplus"), "sm_100a", pdl=False),
    HashGateConfig(spec_of(7168, 6, "sqrtsoftplus"), "sm_90a"),  # two steps in one flight
    HashGateConfig(spec_of(9000, 3, "sqrtsoftplus"), "sm_100a"),  # a ragged flight
    HashGateConfig(spec_of(12296, 17, "sigmoid"), "sm_80", 64, 32),  # several, two groups of slots
    HashGateConfig(spec_of(256, 32, "sqrtsoftplus", False), "sm_100a"),
]


@pytest.mark.parametrize("config", GATE, ids=lambda c: f"{c.arch}-K{c.spec.hidden_size}")
@pytest.mark.parametrize("policy", ["eager", "random1"])
def test_the_gate_kernel_weighs_by_the_chosen_products(config, policy):
    spec, N, E = config.spec, 9, 7
    token_ids, table = draw(N, spec.top_k, E, config.token_bits, config.table_bits)
    x, W = torch.randn(N, spec.hidden_size), torch.randn(E, spec.hidden_size)
    x, W = x.bfloat16(), (W * 2 * spec.hidden_size**-0.5).bfloat16()
    routing = simulate(config, token_ids, table, x, W, factor=1.5, policy=policy, padding=8)
    expected = reference.hash_route(
        token_ids, table, x=x, W=W, routed_scaling_factor=1.5, **options_of(spec)
    )
    assert_near(routing, expected, 1.5)


def test_gate_sums_of_whole_numbers_are_exact():
    config = HashGateConfig(spec_of(2056, 6, "sigmoid", False), "sm_100a")
    token_ids, table = torch.arange(8), torch.randint(16, (8, 6))
    x, W = torch.randint(-2, 3, (8, 2056)).bfloat16(), torch.randint(-1, 2, (16, 2056)).bfloat16()
    x[:, 300:] *= torch.rand(8, 1756) < 0.005  # so that the sigmoid tells one sum from the next
    x[:, :300] = 0
    weights, _ = simulate(config, token_ids, table, x, W)
    exact = torch.sigmoid(reference.logits(x, W)).gather(1, table)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=0)


def test_non_finite_values_stay_in_their_row_and_out_of_slots_without_expert():
    config = HashGateConfig(spec_of(64, 4, "sqrtsoftplus"), "sm_100a")
    x, W = torch.randn(6, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    x[1, 5], x[2, 7], x[3] = math.nan, math.inf, -1e4 * W[2]
    W[0, 3] = math.nan  # the row that a slot without expert reads
    token_ids = torch.tensor([0, 1, 2, 3, 9, 4])
    table = torch.tensor([[1, 2, 3, 4], [5, 6, -1, 7], [1, 2, 3, 4], [2, 2, 2, 2], [-1, 8, 0, 9]])
    routing = simulate(config, token_ids, table, x, W)
    assert_near(routing, reference.hash_route(token_ids, table, x=x, W=W))
    assert routing.weights[[0, 3, 4]].isfinite().all()
    assert routing.weights[3].tolist() == [0.0] * 4
    assert routing.weights[5, 2].isnan()


LOGITS = [
    HashLogitsConfig(spec_of(8, 6, "softmax"), "sm_100a"),
    HashLogitsConfig(spec_of(8, 8, "softmax", False), "sm_90a", 32, 32),
    HashLogitsConfig(spec_of(8, 32, "sqrtsoftplus"), "sm_80"),
    HashLogitsConfig(spec_of(8, 1, "sigmoid", False), "sm_100a", 64, 32),
]


@pytest.mark.parametrize("config", LOGITS, ids=lambda c: f"{c.arch}-{c.spec.scoring}")
@pytest.mark.parametrize("E", [1, 40, 300])
def test_the_logits_kernel_weighs_by_given_logits(config, E):
    N = 13
    token_ids, table = draw(N, config.spec.top_k, E, config.token_bits, config.table_bits)
    one = torch.ones(N, 1).bfloat16()
    logits = (3 * torch.randn(E, N)).bfloat16()
    logits[0, 5], logits[0, 6], logits[-1, 8] = math.nan, math.inf, -math.inf
    # Logits as products: of 1 and, for each token by itself, a column of them.
    rows = [
        reference.hash_route(
            token_ids[n : n + 1],
            table,
            x=one[n : n + 1],
            W=logits[:, n : n + 1],
            **options_of(config.spec),
        )
        for n in range(N)
    ]
    expected = Routing(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    routing = simulate(config, token_ids, table, logits.T.float().contiguous(), padding=3)
    assert_near(routing, expected)


# --- the checks can fail ------------------------------------------------------------------------

MUTATED = HashGateConfig(spec_of(512, 6, "sqrtsoftplus"), "sm_100a")


def mutant(pattern: str, replacement: str) -> str:
    """The kernel's PTX with one fault."""
    ptx, count = re.subn(pattern, replacement, ptx_of(MUTATED))
    assert count == 1
    return ptx


def run_mutant(ptx: str, policy: str = "eager") -> tuple[Routing, Routing]:
    """Its outputs, and the right ones."""
    token_ids, table = draw(9, 6, 7, 64, 64)
    x, W = torch.randn(9, 512).bfloat16(), (torch.randn(7, 512) / 16).bfloat16()
    routing = simulate(MUTATED, token_ids, table, x, W, policy=policy, ptx=ptx)
    return routing, reference.hash_route(token_ids, table, x=x, W=W)


def test_a_read_before_the_wait_is_noticed():
    with pytest.raises(Hazard, match="touched before griddepcontrol"):
        run_mutant(mutant(r"griddepcontrol\.wait;", ""))


def test_a_token_id_that_is_not_checked_is_noticed():
    with pytest.raises(OutOfBounds):
        run_mutant(mutant(r"setp\.ge\.s64(\s+%p\d+, )(%rd\d+), %rd\d+;", r"setp.ne.s64\1\2, \2;"))


def test_a_missing_barrier_is_noticed():
    ptx = mutant(r"bar\.sync \s*0;", "")
    with pytest.raises(Hazard, match="a race"):
        run_mutant(ptx)
    wrong = 0
    for seed in range(4):
        routing, expected = run_mutant(ptx, f"random{seed}")
        wrong += not torch.allclose(routing.weights, expected.weights, atol=1e-5)
    assert wrong > 0
