"""torch.ops.cute_router: the public functions as torch ops, for torch.compile and autograd.

    dense_decode, dense_prefill, route,
    hash_route, activation_topk, topk       new outputs; differentiable
    the same with overload `.out`           outputs given, and nothing returned
    the first five with overload `.extras`  that too, and the fields of `Extras`
    route_by_handle                         a Router's forward, by `Router.handle`

Each runs the functions of `eager` on CPU and CUDA tensors, and has shapes for tracing. Arguments
have the names and defaults of the public functions, and can all be given by position, but for the
outputs given, `out_weights` and `out_ids` or `out_values` and `out_indices`, and for extras.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cute_router import eager, extended, gradient, handles
from cute_router.extras import Extras
from cute_router.spec import Routing, TopK

_DENSE_OPTIONS = (
    'int top_k=6, float routed_scaling_factor=1.0, str scoring="sqrtsoftplus",'
    " bool renormalize=True, int n_group=1, int topk_group=1, bool batch_invariant=False,"
    " bool pdl=True"
)
_HASH_OPTIONS = (
    'float routed_scaling_factor=1.0, str scoring="sqrtsoftplus", bool renormalize=True,'
    " bool pdl=True"
)

# Without weights, ids are packed words.
_EXTRAS = (
    "Tensor? num_valid=None, Tensor? valid=None, Tensor? second_bias=None,"
    " Tensor? second_bias_mask=None, int shared_experts=0, float shared_weight=1.0,"
    " Tensor? expert_map=None, ScalarType ids_dtype=int, bool packed=False,"
    " Tensor(c!)? out_logits=None, Tensor? fixed_ids=None,"
    " Tensor(a!)? out_weights=None, Tensor(b!) out_ids"
)

# The dispatch keys that a call arrives with at an op's autograd kernel where its tensors are plain
# ones of one device, and no mode, transform or tracer takes part.
_PLAIN = frozenset(
    (torch._C.DispatchKeySet(device) | torch._C.DispatchKeySet(autograd)).raw_repr()
    for device, autograd in (
        (torch._C.DispatchKey.CPU, torch._C.DispatchKey.AutogradCPU),
        (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.AutogradCUDA),
    )
)


class _Library(torch.library.Library):
    """A library whose ops pass autograd by where it has nothing to record.

    The autograd kernel of `torch.library.register_autograd` dispatches such a call a second time,
    which costs the host 5 us; the one put in its place runs the op there and then.
    """

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **how: Any) -> Any:
        """As `torch.library.Library.impl`."""
        if dispatch_key == "Autograd":
            fn = _unless_idle(fn, _functions[op_name])
        return super().impl(op_name, fn, dispatch_key, **how)  # type: ignore[no-untyped-call]


def _unless_idle(record: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel `record`, where there may be something to record; else `function`."""

    def kernel(keys: torch._C.DispatchKeySet, *call: Any) -> Any:
        if keys.raw_repr() in _PLAIN and not gradient.recorded(*call):
            return function(*call)
        return record(keys, *call)

    return kernel


_functions: dict[str, Callable[..., Any]] = {}  # what an op runs, by its name
# It lives as long as this module.
_library: torch.library.Library = _Library("cute_router", "DEF")  # type: ignore[no-untyped-call]


# --- what tracers see of the results; torch leaves out arguments at their default ----------------


def _routing(of: Tensor, *shape: Any) -> Routing:
    return Routing(of.new_empty(shape, dtype=torch.float32), of.new_empty(shape, dtype=torch.int32))


def _dense_shapes(x: Tensor, W: Tensor, bias: Any = None, top_k: int = 6, *_: Any) -> Routing:
    return _routing(x, x.shape[0], top_k)


def _hash_shapes(token_ids: Tensor, table: Tensor, *_: Any) -> Routing:
    return _routing(token_ids, token_ids.shape[0], table.shape[1])


def _gate_shapes(logits: Tensor, bias: Any = None, top_k: int = 6, *_: Any) -> Routing:
    return _routing(logits, logits.shape[0], top_k)


def _topk_shapes(
    scores: Tensor,
    k: int,
    sorted: bool = True,
    lengths: Any = None,
    index_dtype: torch.dtype = torch.int64,
) -> TopK:
    shape = (*scores.shape[:-1], k)
    return TopK(scores.new_empty(shape), scores.new_empty(shape, dtype=index_dtype))


def _handle_shapes(handle: int, x: Tensor, *_: Any) -> Routing:
    return _routing(x, *x.shape[:-1], handles.find(handle).spec.top_k)


# --- how an op is made --------------------------------------------------------------------------


def _define(
    name: str,
    arguments: str,
    returns: str,
    function: Callable[..., Any],
    shapes: Callable[..., Any],
    save: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> None:
    """An op that returns new tensors: what it runs, its shapes and its gradient."""
    _implement(name, f"({arguments}) -> {returns}", function, shapes)
    torch.library.register_autograd(
        f"cute_router::{name}", backward, setup_context=save, lib=_library
    )


def _define_out(name: str, arguments: str, outputs: str, function: Callable[..., Any]) -> None:
    """The op `name`.out: what `function` returns is what it was given."""

    def run(*call: Any, **given: Tensor) -> None:
        function(*call, **given)

    _implement(f"{name}.out", f"({arguments}, *, {outputs}) -> ()", run, lambda *_, **__: None)


def _define_extras(name: str, arguments: str, function: Callable[..., Any]) -> None:
    """The op `name`.extras: what `function` of `extended` returns is what it was given."""

    def run(*call: Any, out_ids: Tensor, out_weights: Tensor | None = None, **fields: Any) -> None:
        function(*call, out_weights=out_weights, out_ids=out_ids, extras=Extras(**fields))

    _implement(f"{name}.extras", f"({arguments}, *, {_EXTRAS}) -> ()", run, lambda *_, **__: None)


def _implement(
    name: str, signature: str, function: Callable[..., Any], shapes: Callable[..., Any]
) -> None:
    _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    _functions[name] = function
    for device in ("CPU", "CUDA"):
        _library.impl(name, function, device)
    torch.library.register_fake(f"cute_router::{name}", shapes, lib=_library)


def _route_by_handle(handle: int, x: Tensor, token_ids: Tensor | None = None) -> Routing:
    routing: Routing = handles.find(handle)(x, token_ids)
    return routing


def _no_gradient(*_: Any) -> None:
    raise RuntimeError(
        "route_by_handle has no gradient, because the weight that it hides could not get any: call"
        " the Router itself where one is wanted"
    )


# --- the ops ------------------------------------------------------------------------------------

_ROUTING = "(Tensor weights, Tensor ids)"
_OUT_ROUTING = "Tensor(a!) out_weights, Tensor(b!) out_ids"

_DENSE = f"Tensor x, Tensor W, Tensor? bias=None, {_DENSE_OPTIONS}"
for _function, _with_extras in (
    (eager.dense_decode, extended.dense_decode),
    (eager.dense_prefill, extended.dense_prefill),
    (eager.route, extended.route),
):
    _define(
        _function.__name__,
        _DENSE,
        _ROUTING,
        _function,
        _dense_shapes,
        gradient.save_dense,
        gradient.of_dense,
    )
    _define_out(_function.__name__, _DENSE, _OUT_ROUTING, _function)
    _define_extras(_function.__name__, _DENSE, _with_extras)

_HASH = f"Tensor token_ids, Tensor table, Tensor? x=None, Tensor? W=None, {_HASH_OPTIONS}"
_define(
    "hash_route",
    _HASH,
    _ROUTING,
    eager.hash_route,
    _hash_shapes,
    gradient.save_hash,
    gradient.of_hash,
)
_define_out("hash_route", _HASH, _OUT_ROUTING, eager.hash_route)
_define_extras("hash_route", _HASH, extended.hash_route)

_GATE = f"Tensor logits, Tensor? bias=None, {_DENSE_OPTIONS}"
_define(
    "activation_topk",
    _GATE,
    _ROUTING,
    eager.activation_topk,
    _gate_shapes,
    gradient.save_gate,
    gradient.of_gate,
)
_define_out("activation_topk", _GATE, _OUT_ROUTING, eager.activation_topk)
_define_extras("activation_topk", _GATE, extended.activation_topk)

_TOPK = "Tensor scores, int k, bool sorted=True, Tensor? lengths=None, ScalarType index_dtype=long"
_define(
    "topk",
    _TOPK,
    "(Tensor values, Tensor indices)",
    eager.topk,
    _topk_shapes,
    gradient.save_topk,
    gradient.of_topk,
)
_define_out("topk", _TOPK, "Tensor(a!) out_values, Tensor(b!) out_indices", eager.topk)

_define(
    "route_by_handle",
    "int handle, Tensor x, Tensor? token_ids=None",
    _ROUTING,
    _route_by_handle,
    _handle_shapes,
    None,
    _no_gradient,
)
