"""What `Extras` may hold, in a call of each function; errors are as those of `validate`."""

from typing import Any

import torch
from torch import Tensor

from cute_router.extras import Extras
from cute_router.spec import MAX_TOP_K, check_bool, check_int, type_name
from cute_router.validate import (
    INTEGERS,
    check_device,
    check_factor,
    check_plain,
    check_tensor,
    sizes,
)

# Why a function has no such extra.
HAS_LOGITS = "activation_topk is given its logits"
NO_CHOICE = "hash_route chooses by its table, not by a bias"
NO_LOGITS = "hash_route computes only the logits it needs"
HAS_RECORD = "hash_route has its table for that"
NO_COUNT = "without x and W hash_route does not know the number of experts"


def check_extras(extras: Any, N: int, E: int, k: int, device: torch.device, where: str) -> None:
    """Raise unless the extras fit a call on N tokens, k of E experts each.

    device, where: of which argument the device has to be theirs.
    """
    _check_type(extras)
    _check_rows(extras, N, device, where)
    pair = {
        "extras.second_bias": extras.second_bias,
        "extras.second_bias_mask": extras.second_bias_mask,
    }
    missing = [name for name, t in pair.items() if t is None]
    if len(missing) == 1:
        raise ValueError(
            f"{missing[0]} must be given with the other of {', '.join(pair)}; got None"
        )
    if not missing:
        bias, mask = extras.second_bias, extras.second_bias_mask
        check_plain("extras.second_bias", bias, (E,), torch.float32, device, where)
        check_plain("extras.second_bias_mask", mask, (N,), torch.bool, device, where)
    check_int("extras.shared_experts", extras.shared_experts, 0, MAX_TOP_K)
    check_factor("extras.shared_weight", extras.shared_weight)
    if extras.expert_map is not None:
        check_plain("extras.expert_map", extras.expert_map, (E,), torch.int32, device, where)
    if extras.out_logits is not None:
        check_plain("extras.out_logits", extras.out_logits, (N, E), torch.float32, device, where)
        if extras.fixed_ids is not None:
            raise ValueError(
                "extras.out_logits must be None with extras.fixed_ids, whose weights need only a"
                " few logits; got a tensor"
            )
    if extras.fixed_ids is not None:
        check_plain("extras.fixed_ids", extras.fixed_ids, (N, k), torch.int32, device, where)


def check_gate_extras(extras: Any, N: int, E: int, k: int, device: torch.device) -> None:
    """The same for `activation_topk`."""
    _check_type(extras)
    _refuse(extras.out_logits, "out_logits", HAS_LOGITS)
    check_extras(extras, N, E, k, device, "logits")


def check_hash_extras(extras: Any, N: int, E: int | None, k: int, device: torch.device) -> None:
    """The same for `hash_route`; E is None without x and W."""
    _check_type(extras)
    _refuse(extras.second_bias, "second_bias", NO_CHOICE)
    _refuse(extras.second_bias_mask, "second_bias_mask", NO_CHOICE)
    _refuse(extras.out_logits, "out_logits", NO_LOGITS)
    _refuse(extras.fixed_ids, "fixed_ids", HAS_RECORD)
    if E is None:
        if extras.shared_experts:
            got = extras.shared_experts
            raise ValueError(f"extras.shared_experts must be 0, because {NO_COUNT}; got {got!r}")
        if extras.expert_map is not None:
            check_tensor("extras.expert_map", extras.expert_map)
            E = extras.expert_map.numel()
    check_extras(extras, N, E or 0, k, device, "token_ids")


def _check_type(extras: Any) -> None:
    if not isinstance(extras, Extras):
        raise TypeError(f"extras must be a cute_router.Extras or None; got {type_name(extras)}")


def _refuse(given: Any, name: str, why: str) -> None:
    if given is not None:
        raise ValueError(f"extras.{name} must be None, because {why}; got a {type_name(given)}")


def _check_rows(extras: Extras, N: int, device: torch.device, where: str) -> None:
    """Which rows are tokens, and the form of the result."""
    count: Any = extras.num_valid
    if count is not None:
        check_tensor("extras.num_valid", count)
        if count.dtype is not torch.int32:
            raise TypeError(f"extras.num_valid must be torch.int32; got {count.dtype}")
        if sizes(count) not in ((), (1,)):
            raise ValueError(f"extras.num_valid must have shape () or (1,); got {sizes(count)}")
        check_device("extras.num_valid", count, device, where)
    if extras.valid is not None:
        check_plain("extras.valid", extras.valid, (N,), torch.bool, device, where)
    check_bool("extras.packed", extras.packed)
    if extras.ids_dtype not in INTEGERS:
        raise TypeError(
            f"extras.ids_dtype must be torch.int32 or torch.int64; got {extras.ids_dtype!r}"
        )
    if extras.packed and extras.ids_dtype is not torch.int32:
        raise ValueError(
            f"extras.ids_dtype must be torch.int32 with extras.packed; got {extras.ids_dtype}"
        )


def outputs(
    extras: Extras,
    out_weights: Tensor | None,
    out_ids: Tensor | None,
    N: int,
    k: int,
    device: torch.device,
    where: str,
) -> tuple[Tensor | None, Tensor]:
    """(weights, ids) to write to, the caller's or new ones; no weights where they are packed."""
    shape = (N, k + extras.shared_experts)
    if out_ids is None:
        out_ids = torch.empty(shape, dtype=extras.ids_dtype, device=device)
    check_plain("out_ids", out_ids, shape, extras.ids_dtype, device, where)
    if extras.packed:
        if out_weights is not None:
            raise ValueError(
                "out_weights must be None with extras.packed, because out_ids holds the weights"
                f" too; got a {type_name(out_weights)}"
            )
        return None, out_ids
    if out_weights is None:
        out_weights = torch.empty(shape, dtype=torch.float32, device=device)
    check_plain("out_weights", out_weights, shape, torch.float32, device, where)
    return out_weights, out_ids
