"""topk on a GPU: every value to the bit and every index, for rows of any length and any scores.

And its contract as a launch: one kernel, the same bits again, captured or not, behind any kernel.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_work import assert_neither_allocates_nor_waits, assert_one_kernel
from topk_cases import (
    BF16,
    I32,
    I64,
    LONG,
    MANY,
    SCORES,
    SHORT,
    Size,
    draw,
    draw_lengths,
    draw_mixed,
    ids,
    variant,
)
from topk_oracle import assert_same_topk, check_topk, expected_topk
from torch import Tensor

from cute_router import TopK, topk
from cute_router import compile as compiler
from cute_router.topk import radix, rows, standalone

pytestmark = pytest.mark.gpu(capability=(8, 0))

DEVICE = "cuda"
FUZZ_SEEDS = 12  # for each size: 648 cases

# One of each kind of kernel, for the tests of launches.
FEW = Size(65, 256, 8, BF16)
MANY_ROWS = Size(MANY, 256, 6)
ONE_CTA = Size(70, 3000, 6)
CLUSTER = Size(1, 131072, 2048)
LAUNCHED = [FEW, MANY_ROWS, ONE_CTA, CLUSTER]

# Where clusters of 16 do not start.
CLUSTERS_OF_8 = [Size(1, 131072, 2048), Size(1, 16384, 1000)]

# The output of one is the input of the next.
FIRST, SECOND = Size(64, 4096, 512), Size(64, 512, 32)

over_sizes = pytest.mark.parametrize("size", SHORT + LONG, ids=ids)
over_launched = pytest.mark.parametrize("size", LAUNCHED, ids=ids)


def check(size: Size, scores: Tensor, seed: int = 0) -> TopK:
    lengths = draw_lengths(size, DEVICE, seed)
    return check_topk(scores, size.k, lengths, size.index)


def run(size: Size, scores: Tensor, **options: Any) -> TopK:
    return topk(scores, size.k, index_dtype=size.index, **options)


# --- right for every size and kind of scores ----------------------------------------------------


@pytest.mark.parametrize("kind", SCORES)
@over_sizes
def test_scores_of_any_kind_come_in_the_stable_descending_order(size, kind):
    check(size, draw(size, kind, DEVICE))


@over_sizes
def test_random_sizes_of_mixed_rows_come_in_the_stable_descending_order(size):
    for seed in range(FUZZ_SEEDS):
        other = variant(size, seed)
        try:
            check(other, draw_mixed(other, DEVICE, seed), seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {other}: {error}") from error


ROW_COUNTS = [(FEW, n) for n in (1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 127, 129, 1025, 2048)]
ROW_COUNTS += [(MANY_ROWS, n) for n in (2049, 2050, 2063, 2064, 2065, 4096, 65537, 200003)]
ROW_COUNTS += [(ONE_CTA, n) for n in (67, 71, 132)]


@pytest.mark.parametrize(("size", "rows"), ROW_COUNTS, ids=lambda v: v.id if v in LAUNCHED else v)
def test_rows_that_fill_no_warp_or_grid_are_served(size, rows):
    size = replace(size, rows=rows)
    check(size, draw(size, "normal", DEVICE))


@pytest.mark.parametrize("size", CLUSTERS_OF_8, ids=ids)
@pytest.mark.parametrize("kind", ["normal", "all equal", "crowded digits", "the best together"])
def test_clusters_of_8_find_the_same(size, kind, monkeypatch):
    def forget():
        for cached in (radix.kernel_of, standalone.plan_of):
            cached.cache_clear()

    monkeypatch.setattr(radix, "max_cluster", lambda device: 8)
    forget()
    try:
        check(size, draw(size, kind, DEVICE))
    finally:
        forget()


# --- tensors as they come -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [FEW, ONE_CTA], ids=ids)
@pytest.mark.parametrize("sorted_", [True, False])
def test_leading_dimensions_and_steps_between_entries_are_taken(size, sorted_):
    flat = draw(replace(size, rows=60), "few values", DEVICE)
    whole = flat.view(3, 4, 5, size.L)
    for scores in (whole, whole[:, 1:3], whole.transpose(0, 2), whole.flip(-1), flat.T.clone().T):
        check_topk(scores, size.k, sorted=sorted_)


def test_one_dimension_is_one_row():
    check_topk(draw(Size(1, 256, 6), "normal", DEVICE)[0], 6)
    check_topk(draw(CLUSTER, "normal", DEVICE)[0], CLUSTER.k)


@over_launched
def test_an_expanded_row_is_read_again_for_each(size):
    scores = draw(replace(size, rows=1), "normal", DEVICE).expand(size.rows, -1)
    check(size, scores)


@pytest.mark.parametrize("size", [Size(1, 256, 6), Size(1, 131072, 2048)], ids=ids)
@pytest.mark.parametrize("stride", [1, 3, 256, 131073])
def test_the_row_stride_of_a_single_row_is_ignored(size, stride):
    scores = draw(size, "normal", DEVICE).as_strided((1, size.L), (stride, 1))
    check(size, scores)


@pytest.mark.parametrize("size", [Size(1, 256, 6), Size(1, 131072, 2048)], ids=ids)
def test_the_row_stride_of_a_single_result_is_ignored(size):
    scores = draw(size, "normal", DEVICE)
    values = torch.empty(size.k, device=DEVICE).as_strided((1, size.k), (3, 1))
    indices = torch.empty(size.k, dtype=I64, device=DEVICE).as_strided((1, size.k), (3, 1))
    result = topk(scores, size.k, out=(values, indices))
    assert result.values is values
    assert_same_topk(result, expected_topk(scores, size.k))


@pytest.mark.parametrize(
    "size", [Size(3, 160, 32, lengths=I32), Size(6, 20000, 2000, lengths=I64)], ids=ids
)
def test_lengths_are_read_where_they_lie(size):
    lengths = draw_lengths(replace(size, rows=size.rows + 1), DEVICE)[1:]
    check_topk(draw(size, "normal", DEVICE), size.k, lengths)


@pytest.mark.parametrize("size", [Size(1, 50000, 1500, lengths=I64)], ids=ids)
def test_the_stride_of_a_single_length_is_ignored(size):
    scores = draw(size, "normal", DEVICE)
    lengths = torch.tensor([1234, 0, 0], device=DEVICE).as_strided((1,), (3,))
    check_topk(scores, size.k, lengths)


def test_no_rows_give_empty_tensors():
    values, indices = topk(torch.empty(0, 256, device=DEVICE), 6)
    assert values.shape == indices.shape == (0, 6)
    assert values.is_cuda
    assert indices.is_cuda


@pytest.mark.parametrize(
    "size", [Size(2100, 1 << 20, 8, BF16), Size(2_100_001, 1024, 8, BF16)], ids=ids
)
def test_rows_beyond_2_to_the_31_elements_are_read_where_they_are(size):
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free device memory")
    scores = torch.zeros(size.rows, size.L, dtype=size.dtype, device=DEVICE)
    last = slice(size.rows - 40, size.rows)
    scores[last].normal_()
    values, indices = run(size, scores)
    assert (indices[: size.rows - 40] == torch.arange(size.k, device=DEVICE)).all()
    assert_same_topk(TopK(values[last], indices[last]), expected_topk(scores[last], size.k))


# --- what a call is -----------------------------------------------------------------------------


@over_launched
def test_the_same_scores_give_the_same_bits(size):
    for kind in ("normal", "any bits"):
        scores = draw(size, kind, DEVICE)
        first = run(size, scores)
        for _ in range(20):
            assert_same_topk(run(size, scores), first)


@over_launched
def test_a_captured_graph_chooses_from_what_its_scores_hold_at_replay(size):
    scores = draw(size, "normal", DEVICE)
    run(size, scores)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(size, scores)
    for kind in ("rising", "few values", "any bits", "normal"):
        scores.copy_(draw(size, kind, DEVICE, seed=1))
        graph.replay()
        assert_same_topk(captured, expected_topk(scores, size.k))


def test_a_call_sees_what_the_one_ahead_wrote_and_does_not_outrun_its_readers():
    rounds = 20
    scores = [draw(FIRST, "normal", DEVICE, seed) for seed in range(rounds)]
    between = run(FIRST, scores[0])
    results = [run(SECOND, between.values) for _ in scores]

    def chain() -> None:  # `between` is written again as soon as it has been read
        for row, result in zip(scores, results, strict=True):
            run(FIRST, row, out=between)
            run(SECOND, between.values, out=result)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for play in (chain, graph.replay, graph.replay):
        for result in results:
            result.values.zero_()
        play()
        for row, result in zip(scores, results, strict=True):
            assert_same_topk(result, expected_topk(expected_topk(row, FIRST.k).values, SECOND.k))


def test_calls_on_two_streams_do_not_disturb_each_other():
    work = [(size, draw(size, "normal", DEVICE, seed)) for seed, size in enumerate(LAUNCHED)]
    wanted = [expected_topk(scores, size.k) for size, scores in work]
    for size, scores in work:
        run(size, scores)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for turn in range(10):
        for i, (size, scores) in enumerate(work):
            with torch.cuda.stream(streams[(turn + i) % 2]):
                found.append(run(size, scores))
    torch.cuda.synchronize()
    for i, result in enumerate(found):
        assert_same_topk(result, wanted[i % len(work)])


@over_launched
def test_a_call_is_one_kernel_and_nothing_else(size):
    scores = draw(size, "normal", DEVICE)
    run(size, scores)
    assert_one_kernel(lambda: run(size, scores))


@over_launched
def test_a_call_with_outputs_given_allocates_nothing_and_waits_for_nothing(size):
    scores = draw(size, "normal", DEVICE)
    out = run(size, scores)
    assert_neither_allocates_nor_waits(lambda: run(size, scores, out=out))


@over_launched
def test_a_call_of_an_engine_takes_the_short_way(size):
    scores = draw(size, "normal", DEVICE)
    lengths = draw_lengths(size, DEVICE)
    found = standalone.fast(scores, size.k, True, lengths, size.index, None, None)
    assert found is not None
    assert_same_topk(found, expected_topk(scores, size.k, lengths))


# --- what is compiled ---------------------------------------------------------------------------


def calls() -> list[Size]:
    """One call for each kernel of this page, and more."""
    sizes = [*SHORT, *LONG, *LAUNCHED, FIRST, SECOND]
    sizes += [replace(size, rows=rows) for size, rows in ROW_COUNTS]
    sizes += [variant(size, seed) for size in SHORT + LONG for seed in range(FUZZ_SEEDS)]
    sizes += [replace(size, rows=60, dtype=size.dtype) for size in (FEW, ONE_CTA)]
    sizes += [Size(2100, 1 << 20, 8, BF16), Size(2_100_001, 1024, 8, BF16)]
    return sizes


def configurations(arch: str = "sm_90a") -> list[Any]:
    """All configurations that dispatch chooses on a Hopper GPU, to fill a kernel cache with."""
    found: dict[Any, Callable[..., None]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "kernel", lambda c: found.setdefault(c, lambda *_: None))
        for module in (rows, radix):
            patch.setattr(module, "target_for", lambda device: ("sm_90", arch))
            patch.setattr(module, "kernel_of", module.kernel_of.__wrapped__)
        for largest, sizes in ((16, calls()), (8, CLUSTERS_OF_8)):
            patch.setattr(radix, "max_cluster", lambda device, largest=largest: largest)
            for size in sizes:
                queue_on_nothing(size)
    return list(found)


def queue_on_nothing(size: Size) -> None:
    """Launch a call on memory that is never touched."""
    stride = size.L + size.padding
    whole = torch.empty(size.offset + size.rows * stride, dtype=size.dtype)
    scores = whole[size.offset :].view(size.rows, stride)[:, : size.L]
    lengths = None if size.lengths is None else torch.empty(size.rows, dtype=size.lengths)
    values = torch.empty(size.rows, size.k, dtype=size.dtype)
    standalone.launch(scores, lengths, values, torch.empty_like(values, dtype=size.index))
