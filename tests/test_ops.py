"""torch.ops.cute_router under torch's own checks, torch.compile and export."""

import inspect
import os
import shutil
from functools import partial

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import cute_router
from cute_router import Router, RouterSpec, eager, functional

ops = torch.ops.cute_router
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(capability=(8, 0)))]
HAS_CXX = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
DENSE = ["dense_decode", "dense_prefill", "route"]
FUNCTIONS = [*DENSE, "hash_route", "activation_topk", "topk"]


def dense(N=5, E=40, K=64, device="cpu"):
    x, W = torch.randn(N, K).bfloat16(), (torch.randn(E, K) * K**-0.5).bfloat16()
    return x.to(device), W.to(device), (torch.randn(E) * 0.1).to(device)


def samples(name, N=5, device="cpu"):
    """(arguments, options) of good calls of an op."""
    x, W, bias = dense(N, device=device)
    token_ids = torch.randint(-1, 20, (N,), device=device)
    table = torch.randint(40, (20, 4), device=device)
    if name in DENSE:
        groups = {"n_group": 8, "topk_group": 2, "renormalize": False}
        return [((x, W), {}), ((x, W, bias), {"top_k": 3, "scoring": "softmax"} | groups)]
    if name == "hash_route":
        return [
            ((token_ids, table), {}),
            ((token_ids.int(), table), {"x": x, "W": W, "routed_scaling_factor": 2.5}),
        ]
    if name == "activation_topk":
        logits = torch.randn(N, 40, device=device)
        return [((logits, bias), {}), ((logits.half(),), {"top_k": 2, "scoring": "sigmoid"})]
    lengths = torch.randint(51, (N, 3), device=device)
    scores = torch.randn(N, 3, 50, device=device)
    return [
        ((scores, 4), {}),
        ((scores.bfloat16(), 7), {"lengths": lengths, "index_dtype": torch.int32}),
    ]


def with_outputs(name, arguments, options):
    """The options of the out overload: outputs with nothing in them yet."""
    results = getattr(cute_router, name)(*arguments, **options)
    names = ("out_values", "out_indices") if name == "topk" else ("out_weights", "out_ids")
    return options | {n: torch.full_like(r, -7) for n, r in zip(names, results, strict=True)}


def same(results, expected):
    return all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


def compiled(function, backend="aot_eager"):
    """`function` compiled for any N, and a function that tells how often that has happened."""
    torch._dynamo.reset()
    frames = []

    def counting(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    result = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    return result, lambda: len(frames)


# --- the ops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_op_passes_torchs_checks(name, sample, device):
    arguments, options = samples(name, device=device)[sample]
    opcheck(getattr(ops, name).default, arguments, options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_op_passes_torchs_checks_with_a_gradient(name, device):
    arguments, options = samples(name, device=device)[1]
    for t in (*arguments, *options.values()):
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    opcheck(getattr(ops, name).default, arguments, options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_out_variant_passes_torchs_checks(name, sample, device):
    arguments, options = samples(name, device=device)[sample]
    opcheck(getattr(ops, name).out, arguments, with_outputs(name, arguments, options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_op_does_what_its_function_does(name, sample, device):
    arguments, options = samples(name, device=device)[sample]
    expected = getattr(cute_router, name)(*arguments, **options)
    assert same(getattr(ops, name)(*arguments, **options), expected)
    given = with_outputs(name, arguments, options)
    assert getattr(ops, name)(*arguments, **given) is None
    assert same(list(given.values())[-2:], expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_op_has_the_arguments_and_defaults_of_its_function(name):
    public = inspect.signature(getattr(functional, name)).parameters
    straight = inspect.signature(getattr(eager, name)).parameters
    schema = getattr(ops, name).default._schema.arguments
    assert [a.name for a in schema] == list(straight)[:-2]
    for argument in schema:
        default = straight[argument.name].default
        if argument.name == "index_dtype":  # torch keeps dtypes as numbers
            assert public[argument.name].default is default is torch.int64
            assert argument.default_value == 4
        else:
            assert public[argument.name].default == default, argument.name
            wanted = inspect.Parameter.empty if not argument.has_default_value() else None
            assert default == (argument.default_value if wanted is None else wanted)


def test_a_bad_call_of_an_op_is_refused_as_the_function_refuses_it():
    x, W, _ = dense()
    with pytest.raises(TypeError, match=r"x must be torch\.bfloat16; got torch\.float16"):
        ops.dense_decode(x.half(), W)
    with pytest.raises(ValueError, match="top_k must be from 1 to 32; got 41"):
        ops.dense_decode(x, W, top_k=41)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_op_is_dispatched_again_only_where_a_gradient_is_recorded(name, monkeypatch):
    arguments, options = samples(name)[1]
    call = partial(getattr(ops, name).default, *arguments, **options)
    expected = call()

    def again(*_, **__):
        raise AssertionError("dispatched again")

    monkeypatch.setattr(torch._ops.OpOverload, "redispatch", again)
    assert same(call(), expected)
    differentiable = options["x"] if name == "hash_route" else arguments[0]
    differentiable.requires_grad_()
    with torch.no_grad():
        assert same(call(), expected)
    with pytest.raises(AssertionError, match="dispatched again"):
        call()


def test_a_mode_sees_an_op_that_records_nothing():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            found.append(function)
            return function(*arguments, **(options or {}))

    found = []
    x, W, _ = dense()
    with Seen():
        ops.dense_decode(x, W)
    assert found[0] is ops.dense_decode.default
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, W)]
        assert ops.dense_decode(*fakes)[1].fake_mode is mode


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_tensors_never_reach_a_kernel(name, monkeypatch):
    for arguments, options in samples(name):
        wanted = getattr(cute_router, name)(*arguments, **options)
        with FakeTensorMode() as mode, monkeypatch.context() as patched:
            patched.setattr(functional, "eager", None)

            def fake(value, mode=mode):
                return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

            fakes = {key: fake(value) for key, value in options.items()}
            found = getattr(cute_router, name)(*map(fake, arguments), **fakes)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert ours.fake_mode is mode


def test_a_view_that_negates_is_read_negated():
    x, W, _ = dense()
    assert same(ops.dense_decode(torch._neg_view(x), W), ops.dense_decode(-x, W))


def test_an_op_inside_an_op_without_autograd_ends():
    x, W, _ = dense()
    W.requires_grad_()
    with torch._C._AutoDispatchBelowAutograd():
        assert same(cute_router.dense_decode(x, W), cute_router.dense_decode(x, W.detach()))


# --- torch.compile and export -------------------------------------------------------------------


def check_compiled(function, arguments_of, backend="aot_eager"):
    """Bit-equal to eager and compiled once, whatever N."""
    fast, count = compiled(function, backend)
    after_first = None
    for N in (2, 3, 17, 64, 65, 200):
        arguments = arguments_of(N)
        assert same(fast(*arguments), function(*arguments)), N
        after_first = after_first or count()
    assert count() == after_first, "compiled again for another N"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_compiles_once_for_all_numbers_of_tokens(name, sample, device):
    torch._dynamo.reset()
    options = {}

    def arguments_of(N):
        (first, *rest), keywords = samples(name, N, device)[sample]
        options.update({n: v for n, v in keywords.items() if not isinstance(v, torch.Tensor)})
        tensors = {n: v for n, v in keywords.items() if isinstance(v, torch.Tensor)}
        return first, rest, tensors

    def call(first, rest, tensors):
        return getattr(cute_router, name)(first, *rest, **tensors, **options)

    arguments_of(2)  # the options
    check_compiled(call, arguments_of)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_can_be_given_in_compiled_code(name):
    arguments, options = samples(name)[1]
    function = getattr(cute_router, name)
    expected = function(*arguments, **options)
    out = tuple(torch.full_like(r, -7) for r in expected)
    if name == "topk":
        options["out"] = out
    else:
        options["out_weights"], options["out_ids"] = out
    fast, _ = compiled(lambda: function(*arguments, **options))
    assert same(fast(), expected)
    assert same(out, expected)


def test_one_output_can_be_given_in_compiled_code():
    x, W, _ = dense()
    expected = cute_router.dense_decode(x, W)
    ids, weights = torch.empty_like(expected.ids), torch.empty_like(expected.weights)
    fast, _ = compiled(lambda **out: cute_router.dense_decode(x, W, **out))
    assert same(fast(out_ids=ids), expected)
    assert same(fast(out_weights=weights), expected)
    assert same((weights, ids), expected)


@pytest.mark.skipif(not HAS_CXX, reason="inductor needs a C++ compiler for CPU code")
def test_what_surrounds_a_call_compiles_with_it():
    _, W, bias = dense()

    def layer(x, W):  # of operations that round nothing, so that fusing them changes no bits
        weights, ids = cute_router.dense_decode((x * 2).relu(), W, bias)
        return weights * 4, ids + 1

    check_compiled(layer, lambda N: (torch.randn(N, 64).bfloat16(), W), backend="inductor")


def test_a_compiled_step_has_the_gradients_of_an_eager_one():
    _, W, bias = dense()

    def loss(x, W):
        return (cute_router.dense_decode(x * 2, W, bias, top_k=4).weights ** 2).sum()

    fast, _ = compiled(loss)
    for N in (2, 7):
        x = torch.randn(N, 64).bfloat16()
        grads = []
        for step in (loss, fast):
            leaves = [t.detach().clone().requires_grad_() for t in (x, W)]
            step(*leaves).backward()
            grads.append([t.grad for t in leaves])
        assert same(*grads)


def test_a_bad_call_in_compiled_code_is_refused_by_name():
    _, W, _ = dense()
    fast, _ = compiled(lambda x: cute_router.dense_decode(x, W))
    with pytest.raises(ValueError, match=r"x must be \(N, K=64\) to match W; got \(5, 56\)"):
        fast(torch.randn(5, 56).bfloat16())
    assert fast(torch.randn(5, 64).bfloat16()).ids.shape == (5, 6), "and the next one is not"


def test_a_call_can_be_exported():
    class Gate(torch.nn.Module):
        def forward(self, x, W):
            return cute_router.dense_decode(x, W, top_k=3)

    x, W, _ = dense()
    N = {0: torch.export.Dim("N", min=2, max=4096)}
    for strict in (False, True):
        program = torch.export.export(Gate(), (x, W), dynamic_shapes=(N, None), strict=strict)
        more = torch.randn(9, 64).bfloat16()
        assert same(program.module()(more, W), cute_router.dense_decode(more, W, top_k=3))


# --- handles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_a_handle_routes_as_its_router(mode, device):
    vocab = {"vocab_size": 20} if mode == "hash" else {}
    router = Router(RouterSpec(40, 64, 4), mode, device=device, **vocab)
    if mode == "hash":
        router.tid2eid.random_(40)
    x = torch.randn(2, 3, 64, device=device).bfloat16()
    token_ids = torch.randint(20, (2, 3), device=device)
    expected = router(x, token_ids)
    assert expected.ids.shape == (2, 3, 4)
    assert same(ops.route_by_handle(router.handle, x, token_ids), expected)
    opcheck(ops.route_by_handle.default, (router.handle, x, token_ids))


def test_a_handle_compiles_once_for_all_numbers_of_tokens():
    router = Router(RouterSpec(40, 64))
    handle = router.handle

    def call(x):
        return ops.route_by_handle(handle, x)

    check_compiled(call, lambda N: (torch.randn(N, 64).bfloat16(),))


def test_a_handle_dies_with_its_router_and_is_not_used_again():
    router = Router(RouterSpec(40, 64))
    handle, x = router.handle, torch.randn(2, 64).bfloat16()
    fast, _ = compiled(lambda x: ops.route_by_handle(handle, x))
    fast(x)
    del router
    for route in (lambda x: ops.route_by_handle(handle, x), fast):
        with pytest.raises(ValueError, match=f"handle must be that of a living .*; got {handle}"):
            route(x)
    assert Router(RouterSpec(40, 64)).handle > handle


def test_a_handle_that_never_was_is_refused():
    with pytest.raises(ValueError, match=r"handle must be that of a living .*; got -1"):
        ops.route_by_handle(-1, torch.randn(2, 64).bfloat16())


def test_a_handle_gives_no_gradient_and_says_so():
    router = Router(RouterSpec(40, 64))
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    weights, _ = ops.route_by_handle(router.handle, x)
    with pytest.raises(RuntimeError, match="route_by_handle has no gradient"):
        weights.sum().backward()
