"""The extras that the kernel tests give to calls, by name; made for a call of N tokens, E experts.

Their tensors are drawn anew for every seed: a graph captured with one set serves the others.
"""

from collections.abc import Callable

import torch

from cute_router import Extras


def count(N: int, device: str) -> dict[str, object]:
    """About two thirds of the rows."""
    return {"num_valid": torch.tensor(-(-2 * N // 3), dtype=torch.int32, device=device)}


def mask(N: int, device: str) -> dict[str, object]:
    """Some of the rows."""
    return {"valid": torch.rand(N, device=device) < 0.7}


def second(N: int, E: int, device: str) -> dict[str, object]:
    """A bias that leads elsewhere, for some of the rows."""
    return {
        "second_bias": torch.randint(-3, 4, (E,), device=device) / 4,
        "second_bias_mask": torch.rand(N, device=device) < 0.5,
    }


def table(E: int, device: str) -> dict[str, object]:
    """Physical experts; some logical ones have none."""
    entries = torch.randperm(E, device=device) + E // 2
    return {"expert_map": entries.masked_fill(entries % 7 == 0, -1).int()}


def logits(N: int, E: int, device: str) -> dict[str, object]:
    """Where to write them."""
    return {"out_logits": torch.full((N, E), -123.0, device=device)}


SHARED = {"shared_experts": 2, "shared_weight": 0.3}
LONG, PACKED = {"ids_dtype": torch.int64}, {"packed": True}

# name: (N, E, device) -> fields
KINDS: dict[str, Callable[[int, int, str], dict[str, object]]] = {
    "num_valid": lambda N, E, device: count(N, device),
    "valid": lambda N, E, device: mask(N, device),
    "second_bias": second,
    "shared": lambda N, E, device: SHARED,
    "many shared": lambda N, E, device: {"shared_experts": 19, "shared_weight": 2.5},
    "map": lambda N, E, device: table(E, device),
    "int64": lambda N, E, device: LONG,
    "packed": lambda N, E, device: PACKED,
    "logits": logits,
    "padding and map": lambda N, E, device: count(N, device) | table(E, device) | SHARED,
    "all": lambda N, E, device: (
        count(N, device)
        | mask(N, device)
        | second(N, E, device)
        | table(E, device)
        | logits(N, E, device)
        | SHARED
        | LONG
    ),
    "all, packed": lambda N, E, device: (
        count(N, device) | mask(N, device) | second(N, E, device) | table(E, device)
        | logits(N, E, device) | SHARED | PACKED
    ),
}  # fmt: skip
LOGITS = ("out_logits",)
BIASES = ("second_bias", "second_bias_mask")


def draw_extras(
    kind: str, N: int, E: int, device: str = "cpu", seed: int = 0, without: tuple[str, ...] = ()
) -> Extras:
    """The extras of a kind, but for some fields that a function does not have."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Extras(**KINDS[kind](N, E, device)).without(*without)
