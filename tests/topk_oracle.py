"""The order of `topk` in integers, which no sort's treatment of NaN, -0 or ties can disturb.

    rank = (key of the value, lowest index first)    all different: one order, whatever sorts

`check_topk` calls the function into the middle of larger tensors and compares every bit.
"""

import torch
from torch import Tensor

from cute_router import TopK, topk

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
POISON = -77  # in the outputs before the call, and around them after it
GUARD = 61  # elements on either side; so that outputs start at odd places


def keys(scores: Tensor) -> Tensor:
    """int64 keys that rise as the scores do: -0 equals +0, every NaN is one key above all."""
    bits = scores.float().contiguous().view(torch.int32).long()  # exact for 16-bit floats
    magnitude = bits & 0x7FFFFFFF
    return torch.where(bits < 0, -magnitude, magnitude).masked_fill(scores.isnan(), 1 << 31)


def expected_topk(scores: Tensor, k: int, lengths: Tensor | None = None) -> TopK:
    """What `topk` of [..., L] must return, with int64 indices."""
    L = scores.shape[-1]
    column = torch.arange(L, device=scores.device)
    rank = (keys(scores) << 20) | (L - 1 - column)
    if lengths is not None:
        rank = rank.masked_fill(column >= lengths.unsqueeze(-1), torch.iinfo(torch.int64).min)
    indices = rank.sort(dim=-1, descending=True).indices[..., :k]
    # As integers: torch's CPU kernels can change the payload of a 16-bit NaN.
    bits = scores.contiguous().view(BITS[scores.dtype])
    values = bits.gather(-1, indices).view(scores.dtype)
    if lengths is not None:
        lacking = column[:k] >= lengths.unsqueeze(-1)
        values[lacking] = -torch.inf
        indices = indices.masked_fill(lacking, -1)
    return TopK(values, indices)


def assert_same_topk(actual: TopK, expected: TopK) -> None:
    """The same indices, and values of the same bits."""
    values, indices = actual
    assert values.dtype == expected.values.dtype
    assert values.shape == indices.shape == expected.values.shape
    bits = BITS[values.dtype]
    wrong = indices != expected.indices
    wrong |= values.contiguous().view(bits) != expected.values.contiguous().view(bits)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        got, wanted = (
            f"{t.values[at].item()!r} at {t.indices[at].item()}" for t in (actual, expected)
        )
        raise AssertionError(
            f"place {at} of {tuple(values.shape)}: {got} where {wanted} belongs;"
            f" {int(wrong.sum())} are wrong"
        )


def guarded(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A contiguous tensor, and the larger one in whose middle it lies; all poison."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 2 * GUARD,), POISON, dtype=dtype, device=device)
    return whole[GUARD : GUARD + count].view(shape), whole


def check_topk(
    scores: Tensor,
    k: int,
    lengths: Tensor | None = None,
    index_dtype: torch.dtype = torch.int64,
    **options: bool,
) -> TopK:
    """Call `topk`; its result is the oracle's to the bit, and nothing around it is written."""
    shape, device = (*scores.shape[:-1], k), scores.device
    values, around_values = guarded(shape, scores.dtype, device)
    indices, around_indices = guarded(shape, index_dtype, device)
    result = topk(
        scores, k, lengths=lengths, index_dtype=index_dtype, out=(values, indices), **options
    )
    assert result.values is values
    assert result.indices is indices
    assert_same_topk(result, expected_topk(scores, k, lengths))
    for whole in (around_values, around_indices):
        outside = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert (outside == POISON).all(), "something is written beside the outputs"
    return result
