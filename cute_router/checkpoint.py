"""Router tensors of one layer: their published names, and reading them from safetensors files.

                 prefix of a layer        weight   bias                      table
    DeepSeek     layers.L.ffn.gate.       weight   bias                      tid2eid
    transformers model.layers.L.mlp.gate. weight   e_score_correction_bias   tid2eid
    vLLM         model.layers.L.ffn.gate. weight   e_score_correction_bias   tid2eid

The table is that of a hash layer: for each token id the experts it goes to. Such a layer has no
bias; its weight still weighs the experts. Whatever else stands beside these names (a quantization
scale, a bias of another meaning) changes the router's mathematics, so it is refused, not ignored.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"


class RouterTensors(NamedTuple):
    """What a checkpoint holds of one layer's router.

    weight: bf16 [E, K].
    bias:   fp32 [E], the selection bias, or None.
    table:  int32 or int64 [vocab, k], the experts of each token id, or None.
    """

    weight: Tensor
    bias: Tensor | None
    table: Tensor | None


class Spelling(NamedTuple):
    """How one family of checkpoints names a layer's router tensors, without the prefix."""

    prefix: str
    weight: str
    bias: str
    table: str

    def of_layer(self, layer: int) -> "Spelling":
        """The full names in one layer."""
        prefix = self.prefix.format(layer)
        return Spelling(prefix, *(prefix + name for name in self[1:]))


SPELLINGS = (
    Spelling("layers.{}.ffn.gate.", "weight", "bias", "tid2eid"),
    Spelling("model.layers.{}.mlp.gate.", "weight", "e_score_correction_bias", "tid2eid"),
    Spelling("model.layers.{}.ffn.gate.", "weight", "e_score_correction_bias", "tid2eid"),
)


def recognise(name: str) -> tuple[str, str] | None:
    """(prefix, field of `RouterTensors`) of a router tensor's name, or None for any other name.

    Of the prefix only the module within a layer counts, and any part of it may be missing from the
    left: `model.layers.3.mlp.gate.weight`, `mtp.0.ffn.gate.weight`, `gate.weight` and `weight` are
    all the weight.
    """
    prefix, dot, leaf = name.rpartition(".")
    prefix += dot
    for spelling in SPELLINGS:
        module = spelling.prefix.rpartition("{}.")[2]
        if f".{module}".endswith(f".{prefix}") or prefix.endswith(f".{module}"):
            for field in RouterTensors._fields:
                if leaf == getattr(spelling, field):
                    return prefix, field
    return None


def load_router(path: str | Path, layer: int) -> RouterTensors:
    """The router of `layer`, from a .safetensors file or a folder of them with their index.

    Needs the `checkpoint` extra. Raises `ValueError` where the layer has no router weight under a
    known name, or a tensor beside it is unknown or of a wrong shape, and `TypeError` where one has
    a wrong dtype; each says what was found. A router weight in another dtype than bf16 is refused,
    because rounding it would change which experts are chosen.
    """
    files = tensor_files(Path(path))
    candidates = [spelling.of_layer(layer) for spelling in SPELLINGS]
    names = next((c for c in candidates if c.weight in files), None)
    if names is None:
        wanted = " or ".join(c.weight for c in candidates)
        raise ValueError(f"no router for layer {layer} in {path}: wanted {wanted}; {found(files)}")
    beside = {name for name in files if name.startswith(names.prefix)} - set(names)
    if beside:
        raise ValueError(
            f"layer {layer} in {path} has router tensors of unknown meaning: {sorted(beside)};"
            f" wanted only {names.weight}, {names.bias} and {names.table}"
        )
    tensors = {name: read(files[name], name) for name in names[1:] if name in files}

    weight = tensors[names.weight]
    check(names.weight, weight, (torch.bfloat16,), dims=2)
    bias = tensors.get(names.bias)
    if bias is not None:
        check(names.bias, bias, (torch.float32,), dims=1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{names.bias} must have one entry for each of the {weight.shape[0]} experts of"
                f" {names.weight}; got {bias.shape[0]}"
            )
    table = tensors.get(names.table)
    if table is not None:
        check(names.table, table, (torch.int32, torch.int64), dims=2)
    return RouterTensors(weight, bias, table)


def tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor name in a checkpoint: one file, or a folder with an index."""
    if path.is_dir():
        index = json.loads((path / INDEX).read_text())
        return {name: path / file for name, file in index["weight_map"].items()}
    with opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def read(path: Path, name: str) -> Tensor:
    """One tensor of a file; the rest of the file is not read."""
    with opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def opened(path: Path) -> Any:
    """A safetensors file, open for reading."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def check(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], dims: int) -> None:
    """Raise unless a checkpoint's tensor has one of these dtypes and this many dimensions."""
    if t.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}; got {t.dtype}")
    if t.ndim != dims:
        raise ValueError(f"{name} must be {dims}-D; got {t.ndim}-D {tuple(t.shape)}")


def found(names: Iterable[str], limit: int = 8) -> str:
    """The router-like names among `names` (else any), as error messages list them."""
    names = sorted(names)
    listed = [n for n in names if ".gate." in n] or names
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return f"found {', '.join(listed[:limit]) or 'no tensors'}{more}"
