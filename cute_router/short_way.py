"""What the short ways to the kernels share: the `fast` of each backend, which `eager` tries first.

A short way looks a kernel up by plain attributes of a call, allocates, and launches. It asks only
what the kernel's compiled host code does not. That refuses, before it launches, a tensor of another
dtype, rank, size, stride or alignment than the kernel was compiled for, and tensors on different
devices (tests/test_short_way.py). For a call that is refused, or is of another kind, `fast` returns
None; such a call then goes through every check, and is launched or learns what is wrong with it.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from cute_router.validate import FP32_MAX

# What says that a call is not one for the short way. What was not the arguments' fault happens
# again, and is raised, in `launch`.
REFUSED = (AttributeError, KeyError, TypeError, ValueError, RuntimeError)


def is_factor(factor: Any) -> bool:
    """Whether `factor` is a plain number that scales weights; other kinds take every check."""
    kind = factor.__class__
    return (kind is float or kind is int) and 0 <= factor <= FP32_MAX


def routing_outputs(
    N: int, k: int, device: int, weights: Tensor | None, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The outputs of a router, new where none are given; the kernel refuses given ones that do not
    fit."""
    if weights is None:
        weights = seed(torch.float32, device).new_empty(N, k)
    if ids is None:
        ids = seed(torch.int32, device).new_empty(N, k)
    return weights, ids


@cache
def seed(dtype: torch.dtype, device: int) -> Tensor:
    """What outputs are made of: its `new_empty` costs the host half of what `torch.empty` does."""
    return torch.empty((), dtype=dtype, device=f"cuda:{device}")
