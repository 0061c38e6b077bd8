"""What the public functions accept: the arguments one by one, an error for the first wrong one.

Every error names the argument, what was wanted and what was got, and is the same on every device.
"""

from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cute_router.spec import (
    HIDDEN_MULTIPLE,
    MAX_EXPERTS,
    MAX_LENGTH,
    MAX_LENGTH_TOP_K,
    MAX_TOP_K,
    RouterSpec,
    Scoring,
    check_bool,
    check_int,
    type_name,
)

ALIGNMENT = 16  # bytes: what TMA asks of a base address; HIDDEN_MULTIPLE is as much of a stride
FP32_MAX = torch.finfo(torch.float32).max
INT32_MAX = torch.iinfo(torch.int32).max
INTEGERS = (torch.int32, torch.int64)  # of token ids, tables, indices and lengths
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # of logits and scores
MAX_TOKENS = 1 << 30  # of hash_route, whose kernels count them in 32 bits

# The keyword options of a dense function, in the order of its signature:
# top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl.
Options = tuple[int, Scoring, bool, int, int, bool, bool]


def spec_of(*call: Any) -> RouterSpec:
    """The spec of a call, whose arguments are those of `_spec_of`; raises if one is wrong."""
    try:
        return _spec_of(*call)
    except TypeError:  # also of what cannot be looked up in a table, which then says too little
        return _spec_of.__wrapped__(*call)


# typed: without it True would find the spec of 1, and 6.0 that of 6.
@lru_cache(maxsize=4096, typed=True)
def _spec_of(
    E: int,
    K: int,
    has_bias: bool,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    batch_invariant: bool,
    pdl: bool,
) -> RouterSpec:
    """The spec of a call; the options that are no part of it are checked on the way."""
    check_bool("batch_invariant", batch_invariant)
    check_bool("pdl", pdl)
    return RouterSpec(E, K, top_k, scoring, renormalize, has_bias, n_group, topk_group)


def check(x: Any, W: Any, bias: Any, factor: Any, options: Options) -> tuple[int, RouterSpec]:
    """(N, spec) of any call that is right; `ValueError` or `TypeError` for one that is not."""
    N, E, K = check_product(x, W)
    if bias is not None:
        check_plain("bias", bias, (E,), torch.float32, x.device)
    check_factor("routed_scaling_factor", factor)
    return N, spec_of(E, K, bias is not None, *options)


def check_hash(
    token_ids: Any,
    table: Any,
    x: Any,
    W: Any,
    factor: Any,
    scoring: Any,
    renormalize: Any,
    pdl: Any,
) -> tuple[int, int]:
    """(N, k) of a call of `hash_route` that is right; raises as `check` does."""
    check_integers("token_ids", token_ids, 1, "(N,)")
    N = token_ids.shape[0]
    if N > MAX_TOKENS:
        raise ValueError(f"token_ids must have at most {MAX_TOKENS} elements; got {N}")
    if not token_ids.is_contiguous():
        raise ValueError(f"token_ids must be contiguous; got strides {token_ids.stride()}")
    if not (token_ids.is_cuda or token_ids.is_cpu):
        raise ValueError(f"token_ids must be on a CUDA device or the CPU; got {token_ids.device}")
    check_integers("table", table, 2, "(vocab, k)")
    vocab, k = table.shape
    if not (1 <= vocab <= INT32_MAX and 1 <= k <= MAX_TOP_K):
        raise ValueError(
            f"table must be (vocab, k) with vocab from 1 to {INT32_MAX} and k from 1 to"
            f" {MAX_TOP_K}; got {sizes(table)}"
        )
    row_stride, unit_stride = table.stride()
    if unit_stride != 1 or (row_stride < k and vocab > 1):
        raise ValueError(
            f"table must be (vocab, k) with contiguous rows, k={k} elements or more apart; got"
            f" shape {sizes(table)}, strides {table.stride()}"
        )
    check_device("table", table, token_ids.device, "token_ids")
    if (x is None) != (W is None):
        given, missing = ("x", "W") if W is None else ("W", "x")
        raise ValueError(f"{missing} must be given with {given}; got None")
    if x is not None:
        rows, _, K = check_product(x, W)
        if rows != N:
            raise ValueError(f"x must be (N={N}, K={K}) to match token_ids; got {sizes(x)}")
        check_device("x", x, token_ids.device, "token_ids")
    check_factor("routed_scaling_factor", factor)
    check_bool("pdl", pdl)
    hash_spec(HIDDEN_MULTIPLE, k, scoring, renormalize)
    return N, k


def check_logits(logits: Any, bias: Any, factor: Any, options: Options) -> RouterSpec:
    """The spec of a call of `activation_topk` that is right; raises as `check` does."""
    check_scores("logits", logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be 2-D (N, E); got {logits.ndim}-D {sizes(logits)}")
    N, E = logits.shape
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(f"logits must be (N, E) with E from 1 to {MAX_EXPERTS}; got {(N, E)}")
    row_stride, unit_stride = logits.stride()
    if (E > 1 and unit_stride != 1) or (N > 1 and row_stride < E):
        raise ValueError(
            f"logits must be (N, E) with rows of unit stride, E={E} elements or more apart; got"
            f" shape {sizes(logits)}, strides {logits.stride()}"
        )
    if bias is not None:
        check_plain("bias", bias, (E,), torch.float32, logits.device, "logits")
    check_factor("routed_scaling_factor", factor)
    return spec_of(E, HIDDEN_MULTIPLE, bias is not None, *options)


def check_topk(scores: Any, k: Any, sorted_: Any, lengths: Any, index_dtype: Any) -> None:
    """Raise as `check` does unless a call of `topk` is right, outputs apart."""
    check_scores("scores", scores)
    if scores.ndim < 1 or not 1 <= scores.shape[-1] <= MAX_LENGTH:
        raise ValueError(
            f"scores must be (..., L) with L from 1 to {MAX_LENGTH}; got {sizes(scores)}"
        )
    check_int("k", k, 1, min(scores.shape[-1], MAX_LENGTH_TOP_K))
    check_bool("sorted", sorted_)
    if lengths is not None:
        check_integers("lengths", lengths, scores.ndim - 1, "as scores without its last dimension")
        check_plain("lengths", lengths, sizes(scores)[:-1], lengths.dtype, scores.device, "scores")
    if index_dtype not in INTEGERS:
        raise TypeError(f"index_dtype must be torch.int64 or torch.int32; got {index_dtype!r}")


def check_scores(name: str, t: Any) -> None:
    """Raise unless `t` holds floats that are chosen from, where there is a backend for them."""
    check_tensor(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be torch.float32, torch.float16 or torch.bfloat16; got {t.dtype}"
        )
    if not (t.is_cuda or t.is_cpu):
        raise ValueError(f"{name} must be on a CUDA device or the CPU; got {t.device}")


def hash_spec(hidden_size: int, k: int, scoring: Scoring, renormalize: bool) -> RouterSpec:
    """What a hash router's kernels know of it: its number of experts is a run-time value."""
    return RouterSpec(MAX_EXPERTS, hidden_size, k, scoring, renormalize, has_bias=False)


def check_product(x: Any, W: Any) -> tuple[int, int, int]:
    """(N, E, K) of two matrices that can be multiplied."""
    check_matrix("W", W, "(E, K)")
    E, K = W.shape
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(f"W must be (E, K) with E from 1 to {MAX_EXPERTS}; got {sizes(W)}")
    if K < 1 or K % HIDDEN_MULTIPLE:
        raise ValueError(
            f"W must be (E, K) with K a positive multiple of {HIDDEN_MULTIPLE}; got {sizes(W)}"
        )
    check_matrix("x", x, f"(N, K={K})")
    if x.shape[1] != K:
        raise ValueError(f"x must be (N, K={K}) to match W; got {sizes(x)}")
    if not (x.is_cuda or x.is_cpu):
        raise ValueError(f"x must be on a CUDA device or the CPU; got {x.device}")
    check_device("W", W, x.device)
    return x.shape[0], E, K


def rows_fit(t: Tensor) -> bool:
    """Whether TMA can load the rows of a matrix: unit stride within, whole strides between."""
    row_stride, unit_stride = t.stride()
    return unit_stride == 1 and (row_stride % HIDDEN_MULTIPLE == 0 or t.shape[0] <= 1)


def check_matrix(name: str, t: Any, wanted: str) -> None:
    """Raise unless `t` is a bf16 matrix as TMA loads it."""
    check_tensor(name, t)
    if t.dtype is not torch.bfloat16:
        raise TypeError(f"{name} must be torch.bfloat16; got {t.dtype}")
    if t.ndim != 2:
        raise ValueError(f"{name} must be 2-D {wanted}; got {t.ndim}-D {sizes(t)}")
    if not rows_fit(t):
        raise ValueError(
            f"{name} must be {wanted} with K contiguous and a row stride that is a multiple of"
            f" {HIDDEN_MULTIPLE}; got shape {sizes(t)}, strides {t.stride()}"
        )
    offset = t.data_ptr() % ALIGNMENT
    if offset:
        raise ValueError(
            f"{name} must start at a multiple of {ALIGNMENT} bytes; got one plus {offset} bytes"
        )


def check_plain(
    name: str,
    t: Any,
    wanted: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    where: str = "x",
) -> None:
    """Raise unless `t` is a contiguous tensor of this shape and dtype on the device of `where`."""
    check_tensor(name, t)
    if t.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}; got {t.dtype}")
    if t.shape != wanted:
        raise ValueError(f"{name} must have shape {wanted}; got {sizes(t)}")
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got strides {t.stride()}")
    check_device(name, t, device, where)


def check_integers(name: str, t: Any, ndim: int, wanted: str) -> None:
    """Raise unless `t` is an int32 or int64 tensor of `ndim` dimensions."""
    check_tensor(name, t)
    if t.dtype not in INTEGERS:
        raise TypeError(f"{name} must be torch.int32 or torch.int64; got {t.dtype}")
    if t.ndim != ndim:
        raise ValueError(f"{name} must be {ndim}-D {wanted}; got {t.ndim}-D {sizes(t)}")


def check_tensor(name: str, t: Any) -> None:
    """Raise unless `t` is a dense torch tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type_name(t)}")
    if t.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor; got layout {t.layout}")


def check_device(name: str, t: Tensor, device: torch.device, where: str = "x") -> None:
    """Raise unless `t` is on `device`, where the argument `where` is."""
    if t.device != device:
        raise ValueError(f"{name} must be on {device} as {where} is; got {t.device}")


def check_factor(name: str, factor: Any) -> None:
    """Raise unless `factor` is a number, zero or more, that fp32 holds."""
    is_number = isinstance(factor, Real) and not isinstance(factor, bool)
    if not is_number:
        raise TypeError(f"{name} must be a float; got {type_name(factor)}")
    if not 0 <= factor <= FP32_MAX:
        raise ValueError(f"{name} must be finite (in fp32) and not negative; got {factor}")


def sizes(t: Tensor) -> tuple[int, ...]:
    """The shape of `t`, as error messages print it."""
    return tuple(t.shape)
