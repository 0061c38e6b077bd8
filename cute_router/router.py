"""A layer's router as a torch module: tensors named as in checkpoints, and one call.

    router = cute_router.Router(RouterSpec(256, 4096), routed_scaling_factor=1.5, device="cuda")
    router.load_weights(tensors_of_the_layer)
    weights, ids = router(x)

    tensor                    dtype, shape       in mode
    weight                    bf16 [E, K]        both
    e_score_correction_bias   fp32 [E]           "dense", if the spec has a bias
    tid2eid                   int32 [vocab, k]   "hash"

Everything of a router that kernels are compiled for is in its `RouterSpec`; what may change from
call to call, such as the scaling factor and the size of the table, is in the module.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cute_router import checkpoint, handles
from cute_router.extras import Extras
from cute_router.functional import hash_route, route
from cute_router.spec import RouterSpec, Routing, check_bool, check_int, type_name
from cute_router.validate import INT32_MAX, INTEGERS, check_factor, check_tensor, sizes

Mode = Literal["dense", "hash"]

MODES: tuple[str, ...] = get_args(Mode)
# What the fields of a checkpoint's router are called here.
NAMES = {"weight": "weight", "bias": "e_score_correction_bias", "table": "tid2eid"}


class Router(nn.Module):
    """Chooses and weighs the experts of each token: `route` or `hash_route`, with its state.

    In "dense" mode the scores choose; in "hash" mode, that of the first layers of DeepSeek-V4, a
    table chooses by token id and the scores weigh. The spec's bias and groups take part in the
    choice by scores only, so that one spec can serve the layers of both modes.

    A new router has small random weights, no bias and no experts in its table. Its tensors move
    between devices with the module, but keep their dtype, whatever the module is converted to
    (`model.half()`): another one would change which experts are chosen. They do not require grad;
    `router.weight.requires_grad_()` makes the weight trainable.

    Args:
        spec: the router's sizes and mathematics.
        mode: "dense" or "hash", for good.
        device: where to make the tensors.
        routed_scaling_factor: multiplies every weight; an attribute that may be changed.
        vocab_size: the number of token ids of the table; for "hash" mode, and only there.
        batch_invariant, pdl: as for `dense_decode`. While the weight requires grad, `pdl` has no
            effect there: an optimiser's kernel may be the one ahead that writes it.

    Attributes:
        handle: names this router to `torch.ops.cute_router.route_by_handle` while it lives.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what was got.
    """

    weight: nn.Parameter
    e_score_correction_bias: nn.Parameter | None
    tid2eid: Tensor | None

    def __init__(
        self,
        spec: RouterSpec,
        mode: Mode = "dense",
        *,
        device: torch.device | str | None = None,
        routed_scaling_factor: float = 1.0,
        vocab_size: int | None = None,
        batch_invariant: bool = False,
        pdl: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(spec, RouterSpec):
            raise TypeError(f"spec must be a RouterSpec; got {type_name(spec)}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}; got {mode!r}")
        if mode == "hash":
            check_int("vocab_size", vocab_size, 1, INT32_MAX)
        elif vocab_size is not None:
            raise ValueError(f"vocab_size must be None in dense mode; got {vocab_size!r}")
        check_factor("routed_scaling_factor", routed_scaling_factor)
        check_bool("batch_invariant", batch_invariant)
        check_bool("pdl", pdl)
        self.spec = spec
        self.mode = mode
        self.routed_scaling_factor = routed_scaling_factor
        self.batch_invariant = batch_invariant
        self.pdl = pdl

        E, K = spec.num_experts, spec.hidden_size
        weight = torch.empty(E, K, dtype=torch.bfloat16, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("e_score_correction_bias", None)
        self.register_buffer("tid2eid", None)
        if vocab_size is not None:
            self.tid2eid = torch.empty(vocab_size, spec.top_k, dtype=torch.int32, device=device)
        elif spec.has_bias:
            bias = torch.empty(E, dtype=torch.float32, device=device)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.reset_parameters()
        self.handle = handles.register(self)

    def reset_parameters(self) -> None:
        """Draw the weight for logits of unit variance; no bias, and no experts in the table."""
        nn.init.normal_(self.weight, std=self.spec.hidden_size**-0.5)
        with torch.no_grad():
            if self.e_score_correction_bias is not None:
                self.e_score_correction_bias.zero_()
            if self.tid2eid is not None:
                self.tid2eid.fill_(-1)
        self._settle()

    def forward(
        self, x: Tensor, token_ids: Tensor | None = None, *, extras: Extras | None = None
    ) -> Routing:
        """Route hidden states to experts.

        Args:
            x: bf16 [..., K], as for `dense_decode` once its leading dimensions are one.
            token_ids: int32 or int64 [...], needed in "hash" mode and of no effect in "dense" mode,
                so that all layers can be called alike.
            extras: as for `dense_decode` and `hash_route`, of N rows: those of x once its leading
                dimensions are one.

        Returns:
            Routing(weights fp32 [..., k], ids int32 [..., k]); see `route`, `hash_route`, and
            `Extras` for other forms.

        Raises:
            TypeError, ValueError: as those two.
        """
        if not isinstance(x, Tensor) or x.ndim in (0, 2):  # the functions know what is wrong with 0
            return self._route(x, token_ids, extras)
        leading = x.shape[:-1]
        if self.mode == "hash" and isinstance(token_ids, Tensor):
            if token_ids.shape != leading:
                raise ValueError(
                    f"token_ids must have shape {tuple(leading)} as x without its last dimension;"
                    f" got {sizes(token_ids)}"
                )
            token_ids = token_ids.reshape(-1)
        weights, ids = self._route(torch.atleast_2d(x).flatten(0, -2), token_ids, extras)
        k = weights.shape[-1]
        return Routing(weights.view(*leading, k), ids.view(*leading, k))

    def _route(self, x: Tensor, token_ids: Tensor | None, extras: Extras | None) -> Routing:
        """Route the rows of a matrix."""
        spec, W = self.spec, self.weight  # read once: a module looks its tensors up slowly
        if self.mode == "hash":
            if token_ids is None or self.tid2eid is None:
                raise ValueError("token_ids must be given in hash mode; got None")
            return hash_route(
                token_ids,
                self.tid2eid,
                x=x,
                W=W,
                routed_scaling_factor=self.routed_scaling_factor,
                scoring=spec.scoring,
                renormalize=spec.renormalize,
                pdl=self.pdl,
                extras=extras,
            )
        return route(
            x,
            W,
            self.e_score_correction_bias,
            top_k=spec.top_k,
            routed_scaling_factor=self.routed_scaling_factor,
            scoring=spec.scoring,
            renormalize=spec.renormalize,
            n_group=spec.n_group,
            topk_group=spec.topk_group,
            batch_invariant=self.batch_invariant,
            pdl=self.pdl and not W.requires_grad,
            extras=extras,
        )

    # --- tensors from elsewhere -----------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the router's tensors from a checkpoint, all of them or, on any error, none.

        Args:
            weights: (name, tensor) of every tensor of this router and no other, under the names of
                DeepSeek, Hugging Face or vLLM (`cute_router.checkpoint`), with the layer's prefix
                or without. A weight that is not bf16 or a bias that is not fp32 is refused and not
                rounded; a table may be int32 or int64.

        Returns:
            The names that were given.

        Raises:
            TypeError: a tensor of a wrong dtype.
            ValueError: a missing, unexpected or repeated tensor, one of a wrong shape, or a table
                with an expert that the router has not. Both name the tensor.
        """
        wanted = self._tensor_names()
        names: dict[str, str] = {}  # in this module -> as given
        found: dict[str, Tensor] = {}
        prefixes: dict[str, str] = {}
        for given, tensor in weights:
            prefix, field = checkpoint.recognise(given) or ("", "")
            name = NAMES.get(field)
            if name not in wanted:
                raise ValueError(
                    f"{given} is unexpected: a router in {self.mode} mode wants {', '.join(wanted)}"
                )
            prefixes.setdefault(prefix, given)
            if name in names or len(prefixes) > 1:
                first = names.get(name) or next(iter(prefixes.values()))
                raise ValueError(f"{given} does not belong to the same router as {first}")
            names[name], found[name] = given, self._fitting(name, given, tensor)
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} must be among the weights of a router in {self.mode} mode;"
                f" got {', '.join(names.values()) or 'none'}"
            )
        if self.weight.is_meta:
            raise ValueError("the router must be on a real device: call to_empty(device=...) first")
        with torch.no_grad():
            for name, tensor in found.items():
                getattr(self, name).copy_(tensor)
        self._settle()
        return set(names.values())

    def _tensor_names(self) -> list[str]:
        return [name for name in NAMES.values() if getattr(self, name) is not None]

    def _fitting(self, name: str, given: str, tensor: Tensor) -> Tensor:
        """`tensor` as `name` of this module takes it; errors name it as it was `given`."""
        own = getattr(self, name)
        check_tensor(given, tensor)
        is_table = name == "tid2eid"
        checkpoint.check(given, tensor, INTEGERS if is_table else (own.dtype,), own.ndim)
        if tensor.shape != own.shape:
            raise ValueError(f"{given} must have shape {sizes(own)}; got {sizes(tensor)}")
        if is_table and not tensor.is_meta:
            largest, E = int(tensor.max()), self.spec.num_experts
            if largest >= E:
                raise ValueError(f"{given} must name experts below {E}; got {largest}")
            return tensor.clamp(min=-1).int()  # where there is no expert, all numbers mean the same
        return tensor

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **kwargs: Any
    ) -> None:
        """Refuse tensors that do not fit, as `load_weights` does, instead of rounding them."""
        *_, error_messages = rest
        fitting, errors = dict(state_dict), []
        for name in self._tensor_names():
            given = prefix + name
            if given in state_dict:
                try:
                    fitting[given] = self._fitting(name, given, state_dict[given])
                except (TypeError, ValueError) as error:
                    errors.append(str(error))
        if errors:
            error_messages += errors
            return
        super()._load_from_state_dict(fitting, prefix, *rest, **kwargs)
        self._settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move the tensors, but never convert them."""

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype is t.dtype else t.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._settle()
        return self

    def _settle(self) -> None:
        """Wait until the tensors are written: a kernel under `pdl` reads them before its wait."""
        if self.weight.is_cuda:
            torch.cuda.current_stream(self.weight.device).synchronize()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.handle = handles.register(self)  # a copy is a router of its own
        self._settle()

    def extra_repr(self) -> str:
        """What `print` shows of the router."""
        s = self.spec
        shown = f"{self.mode}, num_experts={s.num_experts}, hidden_size={s.hidden_size}"
        if self.tid2eid is not None:
            shown += f", vocab_size={self.tid2eid.shape[0]}"
        shown += f", top_k={s.top_k}, scoring={s.scoring!r}"
        return f"{shown}, routed_scaling_factor={self.routed_scaling_factor}"
