"""What is refused: rows of bad arguments that several functions share, and helpers.

A row about tensors is (spoil, error, message): `spoil` maps names of arguments to what makes a bad
one of a good one. A row about options is (options, error, message). A message begins with the name
of the argument; where tensors are on two devices, it names the `first` as well.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

Refused = tuple[dict[str, Any], type[Exception], str]

over_devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(capability=(8, 0)))]
)


def over_tensors(rows: dict[str, Refused]) -> pytest.MarkDecorator:
    """Cases named as the rows are."""
    return pytest.mark.parametrize(("spoil", "error", "message"), rows.values(), ids=list(rows))


def over_options(rows: list[Refused]) -> pytest.MarkDecorator:
    """Cases named by what is given."""
    names = [" ".join(f"{name}={brief(v)}" for name, v in options.items()) for options, *_ in rows]
    return pytest.mark.parametrize(("options", "error", "message"), rows, ids=names)


def over_changes(rows: list[tuple[Any, dict[str, Any], str]]) -> pytest.MarkDecorator:
    """Configurations that can run, each with a change after which it cannot, and why."""
    names = [str(change) for _, change, _ in rows]
    return pytest.mark.parametrize(("config", "change", "message"), rows, ids=names)


def check_change(
    can_implement: Callable[[Any], object], config: Any, change: dict[str, Any], message: str
) -> None:
    """The configuration is accepted, and refused with the reason once it is changed."""
    can_implement(config)
    with pytest.raises(ValueError, match=message):
        can_implement(replace(config, **change))


def brief(value: Any) -> str:
    """A value in an id."""
    if isinstance(value, tuple):
        return f"({', '.join(map(brief, value))})"
    if not isinstance(value, Tensor):
        return repr(value)
    shape = "x".join(map(str, value.shape)) or "scalar"
    return f"{'meta ' * value.is_meta}{str(value.dtype).removeprefix('torch.')} {shape}"


def spoiled(arguments: dict[str, Tensor], spoil: dict[str, Callable[[Tensor], Any]]) -> dict:
    """Good arguments, of which some are made bad."""
    return arguments | {name: change(arguments[name]) for name, change in spoil.items()}


def on_device(options: dict[str, Any], device: str) -> dict[str, Any]:
    """The same options with tensors on a device, those of "meta" apart."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    return {name: moved(value) for name, value in options.items()}


# --- tensors ------------------------------------------------------------------------------------


def misaligned(t: Tensor) -> Tensor:
    """The same values, 2 bytes past a 16-byte boundary."""
    storage = torch.empty(t.numel() + 8, dtype=t.dtype, device=t.device)
    start = 1 + (-storage.data_ptr() // t.element_size()) % 8
    moved = storage[start : start + t.numel()].view(t.shape)
    return moved.copy_(t)


def padded(t: Tensor, stride: int) -> Tensor:
    """The same values, in rows `stride` elements apart; what lies between them is NaN."""
    storage = torch.full((t.shape[0], stride), math.nan, dtype=t.dtype, device=t.device)
    storage[:, : t.shape[1]] = t
    return storage[:, : t.shape[1]]


def transposed(t: Tensor) -> Tensor:
    """The same matrix, of contiguous columns."""
    return t.T.contiguous().T


def gapped(t: Tensor) -> Tensor:
    """The same vector, in every second element of its memory."""
    return t.repeat_interleave(2)[::2]


def elsewhere(t: Tensor) -> Tensor:
    """On a device that no backend serves."""
    return t.to("meta")


PAST = "must start at a multiple of 16 bytes; got one plus 2 bytes"
# x of 5 tokens and W of 40 experts, for K = 64.
X_AND_W: dict[str, Refused] = {
    "x no tensor": ({"x": Tensor.tolist}, TypeError, "x must be a torch.Tensor; got list"),
    "W no tensor": ({"W": Tensor.tolist}, TypeError, "W must be a torch.Tensor; got list"),
    "x in fp16": ({"x": Tensor.half}, TypeError, "x must be torch.bfloat16; got torch.float16"),
    "W in fp32": ({"W": Tensor.float}, TypeError, "W must be torch.bfloat16; got torch.float32"),
    "x 1-D": ({"x": lambda x: x[0]}, ValueError, r"x must be 2-D \(N, K=64\); got 1-D \(64,\)"),
    "x 3-D": (
        {"x": lambda x: x[None]},
        ValueError,
        r"x must be 2-D \(N, K=64\); got 3-D \(1, 5, 64\)",
    ),
    "W 1-D": ({"W": lambda W: W[0]}, ValueError, r"W must be 2-D \(E, K\); got 1-D \(64,\)"),
    "K mismatch": (
        {"x": lambda x: x[:, :56]},
        ValueError,
        r"x must be \(N, K=64\) to match W; got \(5, 56\)",
    ),
    "K not a multiple of 8": (
        dict.fromkeys("xW", lambda t: padded(t[:, :60], 64)),
        ValueError,
        r"W must be .* K a positive multiple of 8; got \(40, 60\)",
    ),
    "K = 0": (
        dict.fromkeys("xW", lambda t: t[:, :0]),
        ValueError,
        r"W must be .* K a positive multiple of 8; got \(40, 0\)",
    ),
    "E = 0": ({"W": lambda W: W[:0]}, ValueError, r"W must be .* E from 1 to 1024; got \(0, 64\)"),
    "E = 1025": (
        {"W": lambda W: W[:1].repeat(1025, 1)},
        ValueError,
        r"W must be .* E from 1 to 1024; got \(1025, 64\)",
    ),
    "x transposed": (
        {"x": transposed},
        ValueError,
        r"x must be \(N, K=64\) with K contiguous .*; got .* strides \(1, 5\)",
    ),
    "W transposed": (
        {"W": transposed},
        ValueError,
        r"W must be \(E, K\) with K contiguous .*; got .* strides \(1, 40\)",
    ),
    "x with a row stride of 65": (
        {"x": lambda x: padded(x, 65)},
        ValueError,
        r"x must be .* row stride that is a multiple of 8; got .* strides \(65, 1\)",
    ),
    "W with a row stride of 65": (
        {"W": lambda W: padded(W, 65)},
        ValueError,
        r"W must be .* row stride that is a multiple of 8; got .* strides \(65, 1\)",
    ),
    "x misaligned": ({"x": misaligned}, ValueError, f"x {PAST}"),
    "W misaligned": ({"W": misaligned}, ValueError, f"W {PAST}"),
    "x and W misaligned alike": (dict.fromkeys("xW", misaligned), ValueError, f"W {PAST}"),
    "x sparse": (
        {"x": Tensor.to_sparse},
        ValueError,
        "x must be a dense .* tensor; got layout torch.sparse_coo",
    ),
    "W elsewhere": ({"W": elsewhere}, ValueError, "W must be on (cpu|cuda:0) as x is; got meta"),
}


def bias_beside(first: str) -> dict[str, Refused]:
    """The bias of 40 experts."""
    return {
        "bias no tensor": (
            {"bias": lambda bias: 0.5},
            TypeError,
            "bias must be a torch.Tensor; got float",
        ),
        "bias in bf16": (
            {"bias": Tensor.bfloat16},
            TypeError,
            "bias must be torch.float32; got torch.bfloat16",
        ),
        "bias too short": (
            {"bias": lambda bias: bias[:-1]},
            ValueError,
            r"bias must have shape \(40,\); got \(39,\)",
        ),
        "bias 2-D": (
            {"bias": lambda bias: bias[None]},
            ValueError,
            r"bias must have shape \(40,\); got \(1, 40\)",
        ),
        "bias with gaps": (
            {"bias": gapped},
            ValueError,
            r"bias must be contiguous; got strides \(2,\)",
        ),
        "bias elsewhere": (
            {"bias": elsewhere},
            ValueError,
            f"bias must be on (cpu|cuda:0) as {first} is; got meta",
        ),
    }


def floats(name: str) -> dict[str, Refused]:
    """A matrix in fp32 that might be in fp16 or bf16."""
    wanted = f"{name} must be torch.float32, torch.float16 or torch.bfloat16; got"
    return {
        "no tensor": ({name: Tensor.tolist}, TypeError, f"{name} must be a torch.Tensor; got list"),
        "None": ({name: lambda t: None}, TypeError, f"{name} must be a torch.Tensor; got NoneType"),
        "fp64": ({name: Tensor.double}, TypeError, f"{wanted} torch.float64"),
        "integers": ({name: Tensor.long}, TypeError, f"{wanted} torch.int64"),
        "sparse": (
            {name: Tensor.to_sparse},
            ValueError,
            rf"{name} must be a dense \(strided\) tensor; got layout torch.sparse_coo",
        ),
        "neither CUDA nor CPU": (
            {name: elsewhere},
            ValueError,
            f"{name} must be on a CUDA device or the CPU; got meta",
        ),
    }


# --- options ------------------------------------------------------------------------------------

# How chosen experts are weighed, and how a kernel is launched.
WEIGHING: list[Refused] = [
    ({"routed_scaling_factor": -1.0}, ValueError, "routed_scaling_factor must be .*; got -1.0"),
    ({"routed_scaling_factor": math.nan}, ValueError, "routed_scaling_factor must be .*; got nan"),
    ({"routed_scaling_factor": math.inf}, ValueError, "routed_scaling_factor must be .*; got inf"),
    ({"routed_scaling_factor": 1e39}, ValueError, "routed_scaling_factor must be .*; got 1e.39"),
    ({"routed_scaling_factor": "1"}, TypeError, "routed_scaling_factor must be a float; got str"),
    ({"routed_scaling_factor": True}, TypeError, "routed_scaling_factor must be .*; got bool"),
    (
        {"routed_scaling_factor": torch.tensor(1.0)},
        TypeError,
        "routed_scaling_factor must be a float; got Tensor",
    ),
    ({"scoring": "relu"}, ValueError, "scoring must be one of .*; got 'relu'"),
    ({"scoring": ["sigmoid"]}, TypeError, "scoring must be one of .*; got list"),
    ({"renormalize": 1}, TypeError, "renormalize must be a bool; got int"),
    ({"pdl": 1}, TypeError, "pdl must be a bool; got int"),
    ({"pdl": None}, TypeError, "pdl must be a bool; got NoneType"),
]

# How experts are chosen of 40.
CHOOSING: list[Refused] = [
    ({"top_k": 0}, ValueError, "top_k must be from 1 to 32; got 0"),
    ({"top_k": 33}, ValueError, "top_k must be from 1 to 32; got 33"),
    ({"top_k": 41}, ValueError, "top_k must be from 1 to 32; got 41"),
    ({"top_k": 6.0}, TypeError, "top_k must be an int; got float"),
    ({"top_k": True}, TypeError, "top_k must be an int; got bool"),
    ({"top_k": [6]}, TypeError, "top_k must be an int; got list"),
    ({"n_group": 3}, ValueError, "n_group must divide .* got n_group=3 for 40 experts"),
    ({"n_group": 40}, ValueError, "n_group must leave at least 2 experts in a group"),
    ({"n_group": 4, "topk_group": 5}, ValueError, "topk_group must be from 1 to 4; got 5"),
    ({"n_group": 10}, ValueError, "top_k must be at most 4, .*; got 6"),
    ({"batch_invariant": None}, TypeError, "batch_invariant must be a bool; got NoneType"),
]


def outputs(first: str) -> list[Refused]:
    """Those of a routing of 5 tokens, 6 experts each."""
    ids = torch.empty(5, 6, dtype=torch.int32)
    return [
        ({"out_weights": [0.0]}, TypeError, "out_weights must be a torch.Tensor; got list"),
        (
            {"out_weights": torch.empty(5, 6, dtype=torch.float64)},
            TypeError,
            "out_weights must be torch.float32; got torch.float64",
        ),
        (
            {"out_weights": torch.empty(5, 6, dtype=torch.float16)},
            TypeError,
            "out_weights must be torch.float32; got torch.float16",
        ),
        ({"out_ids": ids.long()}, TypeError, "out_ids must be torch.int32; got torch.int64"),
        (
            {"out_weights": torch.empty(5, 8)},
            ValueError,
            r"out_weights must have shape \(5, 6\); got \(5, 8\)",
        ),
        ({"out_ids": ids[:4]}, ValueError, r"out_ids must have shape \(5, 6\); got \(4, 6\)"),
        (
            {"out_weights": torch.empty(5, 8)[:, :6]},
            ValueError,
            r"out_weights must be contiguous; got strides \(8, 1\)",
        ),
        (
            {"out_ids": transposed(ids)},
            ValueError,
            r"out_ids must be contiguous; got strides \(1, 5\)",
        ),
        (
            {"out_ids": elsewhere(ids)},
            ValueError,
            f"out_ids must be on (cpu|cuda:0) as {first} is; got meta",
        ),
    ]
