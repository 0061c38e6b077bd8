"""Host entry of topk on short rows: arguments that are already checked -> one launch."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from cute_router import compile as compiler
from cute_router.arch import target_for
from cute_router.topk.config import (
    MAX_ROW,
    MAX_ROW_TOP_K,
    RowsConfig,
    dtype_name,
    row_shape,
)

MAX_BUCKET = 1 << 16  # beyond so many rows nothing changes
RUN = 16  # bytes that a lane copies at once


def serves(length: int, top_k: int) -> bool:
    """Whether rows of this length are short, for so many results."""
    return length <= MAX_ROW and top_k <= MAX_ROW_TOP_K


def launch(scores: Tensor, lengths: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """Queue topk of each row of a matrix on the current stream of its device."""
    rows, length = scores.shape
    scores = unit_rows(scores)
    kernel = kernel_of(
        length,
        values.shape[1],
        scores.dtype,
        indices.dtype,
        None if lengths is None else lengths.dtype,
        rows_are_vectors(scores),
        row_bucket(rows),
        scores.get_device(),
    )
    kernel(scores, lengths, values, indices)


def row_bucket(rows: int) -> int:
    """The numbers of rows that share a configuration: the power of two that holds `rows`."""
    return min(1 << (rows - 1).bit_length(), MAX_BUCKET)


def unit_rows(t: Tensor) -> Tensor:
    """`t` with the strides of a matrix also in dimensions of size 1, whose stride is free."""
    rows, length = t.shape
    if rows > 1 and length > 1:  # a view would take the host a microsecond
        return t
    return t.as_strided(t.shape, (length if rows == 1 else t.stride(0), 1))


def rows_are_vectors(t: Tensor) -> bool:
    """Whether all rows of a matrix are whole runs of 16 bytes, and start at multiples of them."""
    return starts_are_aligned(t, t.stride(0)) and whole_runs(t.shape[1], t.dtype)


def starts_are_aligned(t: Tensor, row_stride: int) -> bool:
    """Whether all rows of a matrix start at multiples of 16 bytes."""
    return (row_stride * t.itemsize | t.data_ptr()) % RUN == 0


def whole_runs(length: int, dtype: torch.dtype) -> bool:
    """Whether a row of this length is whole runs of 16 bytes."""
    return length * dtype.itemsize % RUN == 0


@cache
def kernel_of(
    length: int,
    top_k: int,
    dtype: torch.dtype,
    index: torch.dtype,
    lengths: torch.dtype | None,
    vector: bool,
    bucket: int,
    device: int,
) -> Callable[..., None]:
    """The kernel for rows of this kind, of which there are up to `bucket`, on a device."""
    target = target_for(device)[1]
    config = RowsConfig(
        length,
        top_k,
        dtype_name(dtype),
        target,
        dtype_name(index),
        None if lengths is None else dtype_name(lengths),
        vector,
        *row_shape(bucket, length),
    )
    return compiler.kernel(config)
