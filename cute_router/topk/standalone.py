"""Host entry of topk: the kernel of short rows, or that of long ones, then one launch."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from cute_router.short_way import REFUSED, seed
from cute_router.spec import MAX_LENGTH, MAX_LENGTH_TOP_K, TopK, check_bool, check_int
from cute_router.topk import radix, rows
from cute_router.topk.config import dtype_name
from cute_router.validate import FLOATS, INTEGERS


def fast(
    scores: Tensor,
    k: int,
    sorted: bool,
    lengths: Tensor | None,
    index_dtype: torch.dtype,
    values: Tensor | None,
    indices: Tensor | None,
) -> TopK | None:
    """The call of an engine, on a matrix, by the `short_way`. None for any other call."""
    try:
        R, L = scores.shape
        row_stride, unit_stride = scores.stride()
        if not (R > 0 and unit_stride == 1):  # others are copied first, for another kernel
            return None
        # The stride of a single row says nothing.
        aligned = rows.starts_are_aligned(scores, 0 if R == 1 else row_stride)
        dtype, device = scores.dtype, scores.get_device()
        dtypes = dtype, index_dtype, None if lengths is None else lengths.dtype
        kernel, sizes_built_in = plan_of(R, L, k, sorted, *dtypes, aligned, device)
        if not sizes_built_in:
            for given in (values, indices):
                if given is not None and not (given.shape == (R, k) and given.is_contiguous()):
                    return None
        if values is None:
            values = seed(dtype, device).new_empty(R, k)
        if indices is None:
            indices = seed(index_dtype, device).new_empty(R, k)
        kernel(scores, lengths, values, indices)
    except REFUSED:
        return None
    return TopK(values, indices)


def launch(scores: Tensor, lengths: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """Queue topk of each row of a matrix on the current stream of its device."""
    kind = rows if rows.serves(scores.shape[1], values.shape[1]) else radix
    kind.launch(scores, lengths, values, indices)


# typed: without it True would find the kernel of 1, and 6.0 that of 6.
@lru_cache(maxsize=4096, typed=True)
def plan_of(
    R: int,
    L: int,
    k: int,
    sorted: bool,
    dtype: torch.dtype,
    index: torch.dtype,
    lengths: torch.dtype | None,
    aligned: bool,
    device: int,
) -> tuple[Callable[..., None], bool]:
    """The kernel of a call, by what the call says; raises where it says something wrong.

    Beside it, whether it is for these L and k only, and so refuses outputs of another size.
    """
    check_int("k", k, 1, min(L, MAX_LENGTH_TOP_K))
    check_bool("sorted", sorted)
    if dtype not in FLOATS or index not in INTEGERS or lengths not in (None, *INTEGERS):
        raise TypeError(f"there is no kernel for {dtype}, {index} and {lengths}")
    if L > MAX_LENGTH:
        raise ValueError(f"there is no kernel for rows of {L}")
    if rows.serves(L, k):
        vector, bucket = aligned and rows.whole_runs(L, dtype), rows.row_bucket(R)
        return rows.kernel_of(L, k, dtype, index, lengths, vector, bucket, device), True
    names = dtype_name(dtype), dtype_name(index), lengths and dtype_name(lengths)
    return radix.kernel_of(R, L, k, *names, aligned, device), False
