"""What a router is: its sizes and its choice of mathematics, validated once.

`RouterSpec` holds everything about a router but its tensors; together with a kernel configuration
it names a compiled kernel. `Routing` is what every router function returns, `TopK` what `topk`
does.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

Scoring = Literal["sqrtsoftplus", "sigmoid", "softmax"]

SCORINGS: tuple[str, ...] = get_args(Scoring)
MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_LENGTH = 1 << 20  # entries of a row of `topk`
MAX_LENGTH_TOP_K = 4096  # results of one
HIDDEN_MULTIPLE = 8  # 16 bytes of bf16: the unit of a TMA row stride


class Routing(NamedTuple):
    """The experts of N tokens, best first; of `hash_route` as its table has them.

    weights: fp32 [N, k], the factor of each chosen expert's output.
    ids:     int32 [N, k], the chosen experts: distinct, in [0, E), by descending selection score.
    """

    weights: torch.Tensor
    ids: torch.Tensor


class TopK(NamedTuple):
    """The best entries of rows of scores, best first.

    values:  [..., k] of the scores' dtype, with their own bits.
    indices: [..., k] int64 or int32, distinct in each row; -1 where a row has no more entries.
    """

    values: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """A router's sizes and options; raises `ValueError` or `TypeError` outside the limits.

    num_experts:  E, 1 to 1024; any number, not only multiples of a tile.
    hidden_size:  K, a positive multiple of 8.
    top_k:        k, experts chosen per token, 1 to 32.
    scoring:      "sqrtsoftplus", "sigmoid" or "softmax".
    renormalize:  whether the k weights of a token are divided by their sum.
    has_bias:     whether a selection bias is added to the activations.
    n_group:      the experts fall into this many equal groups of neighbours (1: no groups).
    topk_group:   only the experts of this many best groups can be chosen.
    """

    num_experts: int
    hidden_size: int
    top_k: int = 6
    scoring: Scoring = "sqrtsoftplus"
    renormalize: bool = True
    has_bias: bool = True
    n_group: int = 1
    topk_group: int = 1

    def __post_init__(self) -> None:
        check_int("hidden_size", self.hidden_size, 1)
        if self.hidden_size % HIDDEN_MULTIPLE:
            raise ValueError(
                f"hidden_size must be a multiple of {HIDDEN_MULTIPLE}; got {self.hidden_size}"
            )
        check_bool("renormalize", self.renormalize)
        check_bool("has_bias", self.has_bias)
        check_selection(self.num_experts, self.top_k, self.scoring, self.n_group, self.topk_group)

    @property
    def scores_are_independent(self) -> bool:
        """Whether an expert's score follows from its own logit, and alone says if it is chosen."""
        return self.scoring != "softmax" and self.n_group == 1


def check_selection(
    num_experts: int, top_k: int, scoring: str, n_group: int, topk_group: int
) -> None:
    """Raise unless `top_k` experts can be chosen among `num_experts` under these groups."""
    check_int("num_experts", num_experts, 1, MAX_EXPERTS)
    check_int("n_group", n_group, 1, num_experts)
    check_int("topk_group", topk_group, 1, n_group)
    group_size, ungrouped = divmod(num_experts, n_group)
    if ungrouped:
        raise ValueError(
            f"n_group must divide the number of experts; got n_group={n_group} for"
            f" {num_experts} experts"
        )
    if n_group > 1 and group_size < 2:
        raise ValueError(
            "n_group must leave at least 2 experts in a group, whose score is the sum of its two"
            f" best; got n_group={n_group} for {num_experts} experts"
        )
    check_int("top_k", top_k, 1, MAX_TOP_K)
    eligible = topk_group * group_size
    if top_k > eligible:
        raise ValueError(
            f"top_k must be at most {eligible}, the experts in the topk_group={topk_group} best of"
            f" n_group={n_group} groups of {group_size}; got {top_k}"
            if n_group > 1
            else f"top_k must be at most {eligible}, the number of experts; got {top_k}"
        )
    if not isinstance(scoring, str):
        raise TypeError(f"scoring must be one of {SCORINGS}; got {type_name(scoring)}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {SCORINGS}; got {scoring!r}")


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an int (a bool is none) in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {type_name(value)}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {wanted}; got {value}")


def check_bool(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {type_name(value)}")


def type_name(value: Any) -> str:
    """The type of `value`, as error messages name it."""
    return type(value).__name__
