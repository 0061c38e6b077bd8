"""topk of short rows, simulated from its PTX: a stable descending sort's choice, to the last bit.

The kernel cuts a row at a threshold, and sorts what is left by words that a score and an index
share; where that is too much, or words cannot tell, it chooses again. So rows here tie, have many
entries at the threshold, or are of neighbouring numbers, by themselves or beside a large one.
"""

import pytest
import torch
from ptx_sim.launch import ptx_of
from ptx_sim.launch_rows import simulate_rows
from torch import Tensor

from cute_router.topk.config import RowsConfig

ORDERS = ["eager", "lazy", "random0", "random1"]
BITS = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}
ONE = {"float32": 0x3F800000, "float16": 0x3C00, "bfloat16": 0x3F80}
INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}


def rows_config(L: int, k: int, lanes: int, dtype: str = "float32", **options) -> RowsConfig:
    options.setdefault("arch", "sm_100a")
    options.setdefault("vector", L * torch.empty(0, dtype=getattr(torch, dtype)).itemsize % 16 == 0)
    options.setdefault("pdl", options["arch"] != "sm_80")
    return RowsConfig(L, k, dtype, lanes=lanes, **options)


CONFIGS = [
    rows_config(256, 6, 32),
    rows_config(256, 6, 8),
    rows_config(256, 8, 4),  # k is the network's width; a lane holds more entries than that
    rows_config(64, 8, 8),  # and as many
    rows_config(8, 8, 4),
    rows_config(7, 6, 4),
    rows_config(1, 1, 32),
    rows_config(100, 9, 16, arch="sm_90a"),
    rows_config(256, 16, 8, vector=False, index="int32"),
    rows_config(300, 16, 16, arch="sm_80"),
    rows_config(300, 1, 8, arch="sm_90a", warps=1),
    rows_config(64, 32, 4),
    rows_config(1024, 32, 32),
    rows_config(1024, 6, 8, pdl=False),
    rows_config(1000, 9, 32, vector=False),
    rows_config(256, 6, 8, "bfloat16"),
    rows_config(300, 8, 4, "bfloat16", vector=False, arch="sm_90a"),
    rows_config(64, 16, 32, "bfloat16", arch="sm_80"),
    rows_config(256, 8, 32, "float16"),
    rows_config(100, 9, 4, "float16", arch="sm_90a"),
    rows_config(1024, 32, 16, "float16"),
    rows_config(256, 6, 8, lengths="int64"),
    rows_config(100, 8, 32, lengths="int32", index="int32"),
    rows_config(300, 16, 4, "bfloat16", lengths="int64", arch="sm_90a"),
    rows_config(64, 32, 16, "float16", lengths="int32"),
]


def name_of(c: RowsConfig) -> str:
    name = f"{c.arch}-L{c.length}-k{c.top_k}-{c.lanes}-{c.dtype}"
    return name + f"-lengths{c.lengths}" * (c.lengths is not None) + "-apart" * (not c.vector)


def rows_of(config: RowsConfig) -> Tensor:
    """Scores (R, L), a row of each kind; between rows is NaN, which no row may see."""
    c, L, k = config, config.length, config.top_k
    bits, one, infinity = BITS[c.dtype], ONE[c.dtype], INFINITY[c.dtype]
    generator = torch.Generator().manual_seed(1000 * L + k)
    apart = 4 * L if c.dtype == "float32" else 16
    huge = one + (infinity - one) // 2

    def whole(high: int, n: int = L) -> Tensor:
        """Whole numbers from 0 up to `high`."""
        return torch.randint(0, high + 1, (n,), generator=generator)

    def best(n: int, others: Tensor, chosen: Tensor) -> Tensor:
        """`others`, but for n places at random, which `chosen` fills in the order of the row."""
        found = others.clone()
        found[torch.randperm(L, generator=generator)[:n].sort().values] = chosen[:n]
        return found

    sign = infinity * 2  # as a negative number: it only has that bit and those of an infinity
    minus = -(sign - infinity)  # bits of -0
    position = torch.arange(L)
    one_lane = (position // c.run) % c.lanes == (L - 1) // c.run % c.lanes
    zeros = torch.zeros(L, dtype=torch.long)
    below = one - 8 * apart + whole(apart)
    edge = torch.tensor([0, 1]) + one  # the entry that comes later is the better one
    kinds = [
        *(one + whole(high) for high in (0, 1, 2, apart - 1, apart, 4 * apart)),
        *(minus + one + whole(high) for high in (0, 1, 2, apart - 1, apart, 4 * apart)),
        one + position,  # every entry better than those before
        one - position,
        minus + one + position,
        one + position // 2,
        best(k, below, one + whole(apart - 1)),  # the chosen are near each other
        best(k, below, one + position.flip(0) % apart),
        best(k + 1, below, one + position),  # so is one that is left out
        best(min(k + 1, L), below, torch.cat([one + apart + whole(2, k - 1), edge])),
        best(min(k + 1, L), below, torch.cat([edge, one + apart + whole(2, k - 1)])),
        best(min(k + 1, L), below, torch.cat([edge.flip(0), one + apart + whole(2, k - 1)])),
        best(2 * k, below, one + whole(2)),
        best(min(L, 2 * k + 9), below, one + whole(1)),  # about as many as a list holds
        best(min(L, 2 * k + 9), below, one + whole(4 * apart)),
        best(1, one + whole(3), zeros + huge),  # beside a huge entry the others are alike
        best(1, minus + one + whole(3), zeros + huge),
        best(k // 2 + 1, one + whole(apart), huge - position),
        best(k + 1, minus + huge - whole(3), one + 3 * position),
        torch.where(one_lane, one + whole(3), below),  # the best are all one lane's
        torch.where(one_lane, one + position % apart, one + apart),
        torch.where(one_lane, one, below),
        torch.where(one_lane, minus + one + whole(3), minus + one + apart),
        torch.where(position < L // 2, one + whole(2), one + 2),
        infinity + 1 + whole(60),  # NaN
        minus + infinity + 1 + whole(60),
        best(k, one + whole(apart), infinity + 1 + whole(60)),
        best(k + 1, one + whole(apart), minus + infinity + 1 + whole(60)),
        best(k // 2 + 1, infinity + zeros, infinity + 1 + whole(60)),
        torch.where(whole(1) > 0, zeros, zeros + minus),  # 0 and -0
        best(k // 2, torch.where(whole(1) > 0, zeros, zeros + minus), 1 + whole(apart)),
        best(k // 2, minus + infinity + zeros, minus + infinity - 1 - whole(1)),  # mostly -inf
        best(k // 2, minus + infinity + zeros, infinity + zeros),
        whole(3) + torch.where(whole(1) > 0, zeros, zeros + minus),  # subnormal
    ]
    kinds += [one + whole(2) + apart // 2 * whole(3) + apart * whole(1) for _ in range(8)]
    kinds += [torch.randn(L, generator=generator).to(getattr(torch, c.dtype)).view(bits).long()]
    between = c.run if c.vector else 3
    row = torch.full((len(kinds), L + between), infinity + 1, dtype=bits)
    row[:, :L] = torch.stack(kinds).to(bits)
    return row.view(getattr(torch, c.dtype))[:, :L]


def lengths_of(config: RowsConfig, R: int) -> Tensor | None:
    """Valid lengths of every kind: none, fewer than k, all, beyond the row's ends."""
    if config.lengths is None:
        return None
    L, k = config.length, config.top_k
    some = torch.tensor([L, L - 1, k, k + 1, k - 1, 0, 1, -1, L + 5, L // 2 + 1, 1 << 30])
    return some.repeat(R)[:R].to(getattr(torch, config.lengths))


def expected(config: RowsConfig, scores: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the specification says: (bits of values, indices)."""
    k = config.top_k
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    missing = torch.zeros_like(order, dtype=torch.bool)
    if lengths is not None:
        absent = order >= lengths.long()[:, None]
        first = absent.long().sort(dim=-1, stable=True)
        missing, order = first.values == 1, order.gather(-1, first.indices)
    bits = scores.view(BITS[config.dtype]).gather(-1, order)
    minus_inf = torch.tensor(-torch.inf, dtype=scores.dtype).view(BITS[config.dtype])
    values = torch.where(missing, minus_inf, bits)[:, :k]
    return values, order.masked_fill(missing, -1)[:, :k]


def assert_rows(
    config: RowsConfig, scores: Tensor, lengths: Tensor | None = None, **how: str
) -> None:
    """Simulate a launch; raise `AssertionError` unless it is what the specification says."""
    values, indices = simulate_rows(config, scores, lengths, **how)
    bits, wanted = expected(config, scores, lengths)
    wrong = (indices != wanted).any(-1) | (values.view(bits.dtype) != bits).any(-1)
    if wrong.any():
        r = int(wrong.nonzero()[0])
        raise AssertionError(
            f"row {r}: {indices[r].tolist()} for {wanted[r].tolist()}, values"
            f" {values[r].tolist()}; {int(wrong.sum())} of {len(wrong)} rows are wrong"
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_rows_of_every_kind_are_sorted_in_every_order_of_copies(config, order):
    scores = rows_of(config)
    assert_rows(config, scores, lengths_of(config, len(scores)), policy=order)


@pytest.mark.parametrize("R", [1, 3, 4, 5, 31, 33])
@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[18], CONFIGS[22]], ids=name_of)
def test_any_number_of_rows(config, R):
    scores = rows_of(config)[:R]  # the last one, which the lanes of no row see too, is in doubt
    assert_rows(config, scores, lengths_of(config, R))


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[2], CONFIGS[11]], ids=name_of)
def test_two_neighbours_are_ordered_wherever_they_are_among_the_chosen(config):
    L, k = config.length, config.top_k
    for place in range(min(k, L - 1)):
        falling = 2.0 - torch.arange(L) / L
        falling[place + 1] = falling[place].nextafter(torch.tensor(3.0))
        assert_rows(config, falling[None])


@pytest.mark.parametrize("length", range(10))
def test_any_length_up_to_beyond_k(length):
    config = CONFIGS[22]
    scores = rows_of(config)
    assert_rows(config, scores, torch.full((len(scores),), length, dtype=torch.int32))


def common_rows(config: RowsConfig) -> Tensor:
    """Scores (R, L) as routers have them, four rows of a kind."""
    L, dtype = config.length, getattr(torch, config.dtype)
    generator = torch.Generator().manual_seed(L)
    normal = torch.randn(4, L, generator=generator)
    gone = torch.rand(4, L, generator=generator) < 0.5
    rising = torch.arange(float(L)).expand(4, L)
    kinds = [
        normal,
        normal.abs().neg() - 1,
        normal.sigmoid(),
        (4 * normal).softmax(-1),
        normal.log_softmax(-1),
        normal.bfloat16().float(),  # ties
        normal.masked_fill(gone, -torch.inf),
        rising,
        -rising,
    ]
    return torch.cat(kinds).to(dtype)


def without_second_choice(config: RowsConfig) -> str:
    """The kernel's PTX, made such that a row that is chosen again comes out wrong."""
    ptx = ptx_of(config)
    assert "redux.sync.max" in ptx, "only used there"
    return ptx.replace("redux.sync.max", "redux.sync.min")


COMMON = [c for c in CONFIGS if c.lengths is None and 8 * c.top_k <= c.length]


@pytest.mark.parametrize("config", COMMON, ids=name_of)
def test_common_rows_are_not_chosen_again(config):
    assert_rows(config, common_rows(config), ptx=without_second_choice(config))


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[2], CONFIGS[18]], ids=name_of)
def test_rows_in_doubt_are_chosen_again(config):
    tied = torch.arange(config.length) % 2.0
    with_nan = torch.arange(float(config.length))
    with_nan[3] = torch.nan
    for row in (tied, with_nan):
        scores = row.to(getattr(torch, config.dtype))[None]
        assert_rows(config, scores)
        with pytest.raises(AssertionError, match="1 of 1 rows are wrong"):
            assert_rows(config, scores, ptx=without_second_choice(config))
