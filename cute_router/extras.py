"""What a serving engine may add to a call of a router function: `Extras`.

    l, bias, mask ->  s = a + (second_bias where second_bias_mask, bias elsewhere)
    ids           ->  expert_map[ids], then the shared experts E, E + 1, ...
    invalid rows  ->  ids -1, weights 0
    (id, weight)  ->  one word, id << 16 | bf16(weight)

`reference.finish` is the specification. Every field is written by the same launch that routes.
`ExtrasSpec` is what kernels are compiled for; the tensors and the shared weight are of run time.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExtrasSpec:
    """Which extras a kernel has: part of its configuration, and so of its compile key.

    num_valid, valid, second_bias, expert_map, logits: whether that tensor is given.
    shared: slots behind the routed ones.
    ids:    of the ids, "int32" or "int64".
    packed: whether ids and weights are one word.
    """

    num_valid: bool = False
    valid: bool = False
    second_bias: bool = False
    expert_map: bool = False
    logits: bool = False
    shared: int = 0
    ids: str = "int32"
    packed: bool = False

    @property
    def has_arguments(self) -> bool:
        """Whether a kernel takes something for them, and not only gives results of another form."""
        tensors = self.num_valid, self.valid, self.second_bias, self.expert_map, self.logits
        return any(tensors) or self.shared > 0


PLAIN = ExtrasSpec()


@dataclass(frozen=True, eq=False)
class Extras:
    """Additions to one call; each is off by default. Tensors are contiguous, on the call's device.

    num_valid: int32, of no dimension or of one element: how many rows are tokens, from the first
        on; the rows behind are padding. It is read by the kernel, so that a captured graph serves
        any number. Below 0 it counts as 0; above N, as N.
    valid: bool [N], which rows are tokens. With `num_valid` too, a row has to be one by both.
        A row that is none gets ids -1 and weights 0 in all its slots, shared ones included,
        whatever it holds; rows do not affect each other.
    second_bias, second_bias_mask: fp32 [E] and bool [N], given together: where the mask is True,
        `second_bias` takes the place of the bias (of image tokens, for instance).
        `second_bias` is read when the bias is: before the wait for the kernel ahead (`pdl`).
    shared_experts, shared_weight: so many slots behind the k routed ones, from 0 to 32, with ids
        E, E + 1, ... and exactly this weight each, which is not renormalised or scaled.
    expert_map: int32 [E], the physical expert of each logical one: a routed id is replaced by its
        entry, as it is. That is the last step, so that ties still go by logical id. Shared ids are
        not replaced.
    ids_dtype: torch.int32 or torch.int64.
    packed: return one int32 tensor P [N, k + shared_experts] of words id << 16 | bf16(weight), as
        `Routing(weights, ids)` with P as ids and, as weights, a bf16 view of P's lower halves. The
        weight is rounded to nearest, ties to even. P >> 16 is the id: -1 stays -1, its word being
        -65536. Of an entry of `expert_map` outside [-32768, 32767] only the lower 16 bits are left.
    out_logits: fp32 [N, E], where to write the logits; those of invalid rows too, as computed.
    fixed_ids: int32 [N, k], experts from a record in place of a choice: their weights are computed
        from this call's activations, in the record's order. As in `hash_route`, an id outside
        [0, E) gives -1 and weight 0 in its slot and is left out of the sum, and repeated ids are
        kept. Biases and groups then choose nothing.
    """

    num_valid: Tensor | None = None
    valid: Tensor | None = None
    second_bias: Tensor | None = None
    second_bias_mask: Tensor | None = None
    shared_experts: int = 0
    shared_weight: float = 1.0
    expert_map: Tensor | None = None
    ids_dtype: torch.dtype = torch.int32
    packed: bool = False
    out_logits: Tensor | None = None
    fixed_ids: Tensor | None = None

    @property
    def spec(self) -> ExtrasSpec:
        """What a kernel of this call is compiled for; a record needs another kernel instead."""
        return ExtrasSpec(
            num_valid=self.num_valid is not None,
            valid=self.valid is not None,
            second_bias=self.second_bias is not None,
            expert_map=self.expert_map is not None,
            logits=self.out_logits is not None,
            shared=self.shared_experts,
            ids=str(self.ids_dtype).removeprefix("torch."),
            packed=self.packed,
        )

    def fields(self) -> dict[str, Any]:
        """The fields by name, as ops take them."""
        return {
            "num_valid": self.num_valid,
            "valid": self.valid,
            "second_bias": self.second_bias,
            "second_bias_mask": self.second_bias_mask,
            "shared_experts": self.shared_experts,
            "shared_weight": self.shared_weight,
            "expert_map": self.expert_map,
            "ids_dtype": self.ids_dtype,
            "packed": self.packed,
            "out_logits": self.out_logits,
            "fixed_ids": self.fixed_ids,
        }

    def without(self, *fields: str) -> "Extras":
        """The same without these tensors."""
        absent: dict[str, Any] = dict.fromkeys(fields)
        return replace(self, **absent)

    def rows(self, first: int, last: int) -> "Extras":
        """The extras of the rows from `first` up to `last`, in a call of their own."""
        own: dict[str, Any] = {}
        for name in ("valid", "second_bias_mask", "out_logits", "fixed_ids"):
            tensor = getattr(self, name)
            own[name] = None if tensor is None else tensor[first:last]
        if self.num_valid is not None:
            ahead = torch.arange(first, last, device=self.num_valid.device) < self.num_valid
            own["num_valid"] = None
            own["valid"] = ahead if self.valid is None else ahead & own["valid"]
        return replace(self, **own)

    def arguments(self) -> tuple[tuple[Any, ...], ...]:
        """What a kernel compiled for `spec` takes behind its other arguments (`epilogue.outputs`):
        one tuple, or nothing."""
        if not self.spec.has_arguments:
            return ()
        tensors = (
            None if self.num_valid is None else self.num_valid.view(1),
            _bytes(self.valid),
            self.second_bias,
            _bytes(self.second_bias_mask),
            self.expert_map,
            self.out_logits,
        )
        # The stride of a dimension of size 1 can be anything, which the kernels do not take.
        dense = (None if t is None else t.as_strided(t.shape, (*t.shape[1:], 1)) for t in tensors)
        return ((*dense, float(self.shared_weight) if self.shared_experts else None),)


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as kernels take it."""
    return None if mask is None else mask.view(torch.uint8)
