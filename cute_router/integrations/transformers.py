"""Hugging Face models that route with this package: `patch(model)`, and `unpatch(model)` back.

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cuda")
    patch(model)  # every router is now a call of route or of hash_route
    model.generate(...)
    unpatch(model)

    router of transformers   chooses experts by       weighs them by
    DeepseekV4TopKRouter     score + bias             score (config.scoring_func) / sum
    DeepseekV4HashRouter     tid2eid[token id]        the same
    DeepseekV3TopkRouter     score + bias, among      sigmoid, / sum if config.norm_topk_prob
    DeepseekV32TopkRouter    the best groups          the same

A patched router is the object it was, with the same tensors under the same names and with its
hooks. What changes is its class: to a subclass of the one it had, with another forward. So a
patched model is moved, saved, loaded, copied and trained as one that is not.

Routers are known by the names of their classes: nothing of transformers is imported.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cute_router import checkpoint
from cute_router.functional import hash_route, route
from cute_router.spec import RouterSpec, Routing, check_bool, type_name
from cute_router.validate import ALIGNMENT, INTEGERS, check_factor, check_tensor, sizes

# The oldest release seen to have all of these routers in the form that is read here.
OLDEST = "5.14"
# The modules that config.scoring_func leads to in V4's routers; of softmax there is none.
SCORINGS = {"SqrtSoftplusActivation": "sqrtsoftplus", "Sigmoid": "sigmoid"}

# (logits fp32 [N, E] or None, weights fp32 [N, k], ids int64 [N, k]), which the MoE blocks of
# transformers unpack in this order. They make no use of the logits.
Routed = tuple[Tensor | None, Tensor, Tensor]


def patch(model: nn.Module, *, batch_invariant: bool = False) -> list[str]:
    """Let the routers of a Hugging Face model route with this package, in place.

    A router's weight has to be bf16 and its bias fp32, as `from_pretrained(dtype=torch.bfloat16)`
    leaves them. Experts are then chosen by logits that are not rounded, where V4's own router
    rounds them to bf16, and their weights are fp32.

    A router's sizes and mathematics are read here; its tensors and scaling factor are read at each
    call. Logits are computed, in fp32, only where a forward hook is there to see them: that is how
    transformers records `router_logits`. Otherwise None is in their place.

    Args:
        model: a model of transformers, or any module with such routers in it.
        batch_invariant: as for `route`; of no effect on routers by token id.

    Returns:
        The names of the routers within the model.

    Raises:
        TypeError: a weight, bias or table of another dtype, which is refused and not rounded; or
            `model` is no module.
        ValueError: a model without such a router, one that is patched already, or a router that
            this package cannot stand in for. Both name the module or tensor; nothing is changed.
    """
    check_bool("batch_invariant", batch_invariant)
    already = next(patched_routers(model), None)
    if already is not None:
        raise ValueError(
            f"model must not be patched already; {already[0]} is: unpatch(model) first"
        )
    routers = [(name, m) for name, m in modules(model) if type_name(m) in KINDS]
    if not routers:
        raise ValueError(f"model must have one of {', '.join(KINDS)} in it; got {type_name(model)}")
    options = [checked_options(name, router, batch_invariant) for name, router in routers]
    for (_, router), own_options in zip(routers, options, strict=True):
        align(router.weight)
        router._options = own_options
        router.__class__ = patched_class(type(router))
    return [name for name, _ in routers]


def unpatch(model: nn.Module) -> list[str]:
    """Undo `patch`: the same modules, with the class that they had.

    Returns:
        The names of the routers within the model.

    Raises:
        TypeError: `model` is no module.
        ValueError: none of its routers is patched, or something else has replaced the class or
            forward of one since, which is named; nothing is changed then.
    """
    routers = list(patched_routers(model))
    if not routers:
        raise ValueError(f"model must be patched; got {type_name(model)} with no patched router")
    for name, router in routers:
        check_forward(name, router)
        if type(router) is not patched_class(router._own):
            raise ValueError(f"{name} must be as patch left it; its class is {type_name(router)}")
    for _, router in routers:
        del router._options
        router.__class__ = router._own
    return [name for name, _ in routers]


# --- what a router is while patched ---------------------------------------------------------------


class PatchedRouter(nn.Module):
    """What stands before a router's own class in the class that it has while patched."""

    tensors: tuple[str, ...]
    weight: Tensor
    hidden_dim: int
    routed_scaling_factor: float
    _own: type[nn.Module]
    _options: dict[str, Any]

    def _routed(self, x: Tensor, routing: Routing) -> Routed:
        """What a router returns; nobody but a forward hook makes use of the logits."""
        logits = linear(x.float(), self.weight.float()) if self._forward_hooks else None
        return logits, routing.weights, routing.ids.long()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are patched too."""
        return _blank, (self._own,), vars(self).copy()


class ScoredRouter(PatchedRouter):
    """Chooses experts by score."""

    tensors = ("weight", "e_score_correction_bias")
    e_score_correction_bias: Tensor

    def forward(self, hidden_states: Tensor) -> Routed:
        """Route hidden states [..., K], as N rows."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        routing = route(
            x,
            self.weight,
            self.e_score_correction_bias,
            routed_scaling_factor=self.routed_scaling_factor,
            **self._options,
        )
        return self._routed(x, routing)


class HashRouter(PatchedRouter):
    """Chooses experts by token id."""

    tensors = ("weight", "tid2eid")
    tid2eid: Tensor

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None) -> Routed:
        """Route hidden states [..., K] of the tokens [...], as N rows."""
        if input_ids is None:
            raise ValueError(
                "input_ids must be given, because experts are chosen by token id; got None, as of a"
                " model that is called with inputs_embeds"
            )
        x = hidden_states.reshape(-1, self.hidden_dim)
        routing = hash_route(
            input_ids.reshape(-1),
            self.tid2eid,
            x=x,
            W=self.weight,
            routed_scaling_factor=self.routed_scaling_factor,
            **self._options,
        )
        return self._routed(x, routing)


def patched_class(own: type[nn.Module]) -> type[PatchedRouter]:
    """The class, while patched, of a router whose own class is `own`."""
    if own not in _classes:
        base = KINDS[own.__name__].base
        _classes[own] = type(f"Patched{own.__name__}", (base, own), {"_own": own})
    return _classes[own]


_classes: dict[type[nn.Module], type[PatchedRouter]] = {}


def _blank(own: type[nn.Module]) -> PatchedRouter:
    """A patched router that is yet to get its state."""
    new = patched_class(own)
    return new.__new__(new)


# --- what a router of transformers says of itself -------------------------------------------------


class Kind(NamedTuple):
    """A class of routers: what it becomes, and how to read the mathematics of one."""

    base: type[PatchedRouter]
    mathematics: Callable[[Any], dict[str, Any]]


def v4(router: Any) -> dict[str, Any]:
    """Of a router of V4, which has no groups and always renormalises."""
    score = type_name(router.score_fn)
    return {"scoring": SCORINGS.get(score, score), "renormalize": True}


def v3(router: Any) -> dict[str, Any]:
    """Of a router of V3 or V3.2."""
    return {
        "scoring": "sigmoid",
        "renormalize": router.norm_topk_prob,
        "n_group": router.num_group,
        "topk_group": router.topk_group,
    }


KINDS = {
    "DeepseekV4TopKRouter": Kind(ScoredRouter, v4),
    "DeepseekV4HashRouter": Kind(HashRouter, v4),
    "DeepseekV3TopkRouter": Kind(ScoredRouter, v3),
    "DeepseekV32TopkRouter": Kind(ScoredRouter, v3),
}


def modules(model: Any) -> Iterator[tuple[str, Any]]:
    """All modules of a model with their names; its own is that of its class."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type_name(model)}")
    for name, module in model.named_modules():
        yield name or type_name(module), module


def patched_routers(model: Any) -> Iterator[tuple[str, Any]]:
    """Those that are patched."""
    return ((name, m) for name, m in modules(model) if isinstance(m, PatchedRouter))


def checked_options(name: str, router: Any, batch_invariant: bool) -> dict[str, Any]:
    """The options that a router, while patched, calls with; raises unless it can be patched."""
    check_forward(name, router)
    base, mathematics = KINDS[type_name(router)]
    try:
        options = mathematics(router)
        spec = RouterSpec(router.num_experts, router.hidden_dim, router.top_k, **options)
        check_factor("routed_scaling_factor", router.routed_scaling_factor)
        tensors = {field: getattr(router, field) for field in base.tensors}
    except AttributeError as error:
        raise ValueError(f"{name} must be as in transformers {OLDEST} or later: {error}") from error
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    for field, tensor in tensors.items():
        check_own_tensor(f"{name}.{field}", field, tensor, spec)
    # A kernel under pdl reads these tensors early, and others write them as they like.
    options["pdl"] = False
    if base is ScoredRouter:
        options |= {"top_k": spec.top_k, "batch_invariant": batch_invariant}
    return options


def check_own_tensor(name: str, field: str, t: Any, spec: RouterSpec) -> None:
    """Raise unless this is a tensor that the functions can take as it is."""
    check_tensor(name, t)
    E, K, k = spec.num_experts, spec.hidden_size, spec.top_k
    dtypes, shape = {
        "weight": ((torch.bfloat16,), (E, K)),
        "e_score_correction_bias": ((torch.float32,), (E,)),
        "tid2eid": (INTEGERS, (*sizes(t)[:1], k)),
    }[field]
    checkpoint.check(name, t, dtypes, len(shape))
    if sizes(t) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {sizes(t)}")
    if field == "tid2eid" and t.numel() and not t.is_meta:
        low, high = int(t.min()), int(t.max())
        if low < 0 or high >= E:
            raise ValueError(f"{name} must name experts from 0 to {E - 1}; got {low} to {high}")


def align(weight: Tensor) -> None:
    """Move a weight to where kernels can load it: mapped from a file, it starts at any byte."""
    if weight.data_ptr() % ALIGNMENT:
        weight.data = weight.data.clone()


def check_forward(name: str, router: nn.Module) -> None:
    """Raise where a forward of the module itself hides that of its class."""
    if "forward" in vars(router):
        raise ValueError(
            f"{name} must have the forward of its class; got one of its own, which something else"
            " has put there, as accelerate does to offload a model"
        )
