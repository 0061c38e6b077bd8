"""The kernel of long rows, simulated from its PTX: the stable descending order, bit for bit.

Simulated means functionally, on a CPU, by the PTX ISA as `ptx_sim` reads it; no GPU takes part.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("cutlass")

from ptx_sim.launch_topk import simulate_topk

from cute_router.topk.radix import radix_config
from cute_router.topk.radix_config import RadixConfig

pytestmark = pytest.mark.filterwarnings("ignore:This static loop has")

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

ONE = RadixConfig("float32", "sm_90a", threads=128, cluster=1, capacity=256, bits=8, unroll=2)
TWO = replace(ONE, cluster=2, lengths="int64", index="int32", unroll=4, resident=True)
FOUR = replace(ONE, arch="sm_100a", cluster=4, dtype="bfloat16", lengths="int32", items=2)
HALF = replace(ONE, arch="sm_80", dtype="float16", vector=False, pdl=False, items=8)
CONFIGS = {"one": ONE, "two": TWO, "four": FOUR, "sm_80": HALF}


def expected(scores, k, lengths=None):
    """The specification: the bits of the values, and the indices."""
    _, indices = torch.sort(scores.float(), dim=1, descending=True, stable=True)
    indices = indices[:, :k].clone()
    if lengths is not None:
        for row, length in enumerate(lengths.clamp(0, scores.shape[1]).tolist()):
            order = torch.sort(scores[row, :length].float(), descending=True, stable=True)[1][:k]
            indices[row] = -1
            indices[row, : len(order)] = order
    bits = scores.contiguous().view(BITS[scores.dtype])
    lowest = torch.tensor(-torch.inf, dtype=scores.dtype).view(bits.dtype)
    return torch.where(indices < 0, lowest, bits.gather(1, indices.clamp(min=0))), indices


def check(config, scores, k, lengths=None, policy="eager"):
    """Values with their own bits, and indices."""
    values, indices = simulate_topk(config, scores, k, lengths, policy=policy)
    wanted_bits, wanted = expected(scores, k, lengths)
    assert torch.equal(indices.long(), wanted)
    assert torch.equal(values.view(wanted_bits.dtype), wanted_bits)


def data(kind: str, rows: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of one kind; each with another seed or shift."""
    g = torch.Generator().manual_seed(length)
    normal = torch.randn(rows, length, generator=g)
    ramp = torch.linspace(-3, 3, length).expand(rows, length)
    few = torch.randint(0, 3, (rows, length), generator=g).float()
    scores = {
        "normal": normal,
        "equal": torch.full((rows, length), -1.5),
        "rising": ramp,
        "falling": ramp.flip(1),
        "few": few,
        "zeros": torch.where(normal > 0, 0.0, -0.0),
        "inf": torch.where(few == 1, normal, torch.where(few == 0, torch.inf, -torch.inf)),
        "nan": torch.full((rows, length), torch.nan),
        "close": 1 + normal * 1e-4,
    }
    if kind == "bits":  # any float there is: both signs of NaN with payloads, subnormals
        low = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
        info = torch.iinfo(low)
        return torch.randint(info.min, info.max, (rows, length), generator=g, dtype=low).view(dtype)
    if kind == "mixed":
        chosen = data("bits", rows, length, dtype).view(BITS[dtype])
        top = torch.tensor(torch.nan).to(dtype).view(BITS[dtype])
        return torch.where(few < 2, chosen, chosen | top).view(dtype)
    return scores[kind].to(dtype).contiguous()


KINDS = ["normal", "equal", "rising", "falling", "few", "zeros", "inf", "nan", "close", "bits"]
KINDS += ["mixed"]


def lengths_of(config, rows, length):
    if config.lengths is None:
        return None
    some = [length, 0, 1, length // 2, -5, length + 9, 130][:rows]
    return torch.tensor(some, dtype=getattr(torch, config.lengths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_data_is_in_the_stable_descending_order(name, kind):
    config = CONFIGS[name]
    scores = data(kind, 2, 1003, getattr(torch, config.dtype))
    if config.vector:  # rows start at multiples of 16 bytes
        scores = torch.nn.functional.pad(scores, (0, 5))[:, :1003]
    check(config, scores, 130, lengths_of(config, 2, 1003))


@pytest.mark.parametrize("policy", ["lazy", "random0", "random1", "random2"])
@pytest.mark.parametrize("name", ["one", "two", "four"])
def test_the_result_does_not_depend_on_the_order_of_events(name, policy):
    config = CONFIGS[name]
    scores = data("normal", 3, 1000, getattr(torch, config.dtype))
    check(config, scores, 97, policy=policy, lengths=lengths_of(config, 3, 1000))


@pytest.mark.parametrize("kind", ["normal", "falling", "few"])
@pytest.mark.parametrize("cluster", [8, 16])
def test_large_clusters_rank_across_all_their_lists(cluster, kind):
    config = replace(ONE, threads=64, cluster=cluster, items=2)
    check(config, data(kind, 2, 2000, torch.float32), 150, policy="random3")


@pytest.mark.parametrize(("length", "k"), [(1, 1), (3, 3), (200, 200), (257, 256), (640, 1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_size_of_row_and_k(name, length, k):
    config = replace(CONFIGS[name], vector=False)
    if config.resident and not config.holds(length):
        config = replace(config, unroll=8)
    scores = data("normal", 4, length, getattr(torch, config.dtype))
    check(config, scores, k, lengths_of(config, 4, length))


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    ("length", "k"), [(65, 65), (129, 100), (511, 511), (700, 350), (1000, 513), (1024, 1024)]
)
def test_lists_of_any_size_are_sorted(cluster, length, k):
    config = replace(ONE, vector=False, cluster=cluster, capacity=1024, items=2)
    check(config, data("normal", 1, length, torch.float32), k)


@pytest.mark.parametrize("kind", ["few", "inf", "close"])
@pytest.mark.parametrize("k", [1, 40, 140, 300])
def test_a_few_are_taken_of_a_list_of_many(k, kind):
    config = radix_config(2, 1000, k, "sm_90a", vector=False)
    check(config, data(kind, 2, 1000, torch.float32), k, policy="random0")


def test_a_large_list_of_equal_keys_is_sorted_by_index():
    config = replace(ONE, threads=256, capacity=4096, unroll=4)
    check(config, data("few", 1, 4096, torch.float32), 3000)


def test_padding_between_rows_is_not_looked_at():
    scores = torch.full((3, 1200), torch.nan)
    scores[:, :1003] = data("normal", 3, 1003, torch.float32)
    check(ONE, scores[:, :1003], 50)


def test_an_odd_start_and_stride_are_served_without_vectors():
    scores = data("normal", 3, 1100, torch.float16)[:, 7:908]
    check(HALF, scores, 99)
