"""Router: the functions with their state, loaded from checkpoints and moved without rounding."""

import copy
import gc
import math
import pickle

import pytest
import torch
from test_ops import check_compiled, compiled, same
from torch import nn

import cute_router
from cute_router import Router, RouterSpec, hash_route, route

E, K, VOCAB = 40, 64, 20
SPEC = RouterSpec(E, K, 4)
SPELLINGS = {
    "DeepSeek": ("layers.3.ffn.gate.", "bias"),
    "DeepSeek's draft layer": ("mtp.0.ffn.gate.", "bias"),
    "transformers": ("model.layers.3.mlp.gate.", "e_score_correction_bias"),
    "vLLM": ("model.layers.3.ffn.gate.", "e_score_correction_bias"),
    "within a layer": ("mlp.gate.", "e_score_correction_bias"),
    "within DeepSeek's layer": ("ffn.gate.", "bias"),
    "within a block": ("gate.", "e_score_correction_bias"),
    "bare": ("", "e_score_correction_bias"),
    "bare DeepSeek": ("", "bias"),
}


def hidden(*leading):
    return torch.randn(*leading, K).bfloat16()


def tensors(mode="dense", prefix="", bias="e_score_correction_bias"):
    """Good tensors of a router, named as in a checkpoint."""
    weight = (torch.randn(E, K) * K**-0.5).bfloat16()
    if mode == "hash":
        return {prefix + "weight": weight, prefix + "tid2eid": torch.randint(E, (VOCAB, 4))}
    return {prefix + "weight": weight, prefix + bias: torch.randn(E) * 0.1}


def loaded(mode="dense", **options):
    """A router with good tensors."""
    router = Router(SPEC, mode, vocab_size=VOCAB if mode == "hash" else None, **options)
    router.load_weights(tensors(mode).items())
    return router


def state(router):
    return {name: t.clone() for name, t in router.state_dict().items()}


def same_state(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# --- what it returns ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_router_is_route_with_its_spec(bias):
    spec = RouterSpec(E, K, 3, "sigmoid", False, bias, 8, 2)
    router, x = Router(spec, routed_scaling_factor=2.5, batch_invariant=True), hidden(5)
    if bias:
        router.e_score_correction_bias.normal_()
    expected = route(
        x,
        router.weight,
        router.e_score_correction_bias,
        top_k=3,
        scoring="sigmoid",
        renormalize=False,
        n_group=8,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    assert isinstance(router(x), cute_router.Routing)
    assert same(router(x), expected)
    assert same(router(x, torch.arange(5)), expected), "token ids have no effect"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_hash_router_is_hash_route_with_its_table(dtype):
    spec = RouterSpec(E, K, 4, "sigmoid", False)
    router = Router(spec, "hash", vocab_size=VOCAB, routed_scaling_factor=2.5)
    router.load_weights(tensors("hash").items())
    x, token_ids = hidden(5), torch.randint(-1, VOCAB, (5,)).to(dtype)
    expected = hash_route(
        token_ids,
        router.tid2eid,
        x=x,
        W=router.weight,
        scoring="sigmoid",
        renormalize=False,
        routed_scaling_factor=2.5,
    )
    assert same(router(x, token_ids), expected)


@pytest.mark.parametrize("mode", ["dense", "hash"])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 4), (0,), (0, 3), (3, 0)])
def test_leading_dimensions_come_back(mode, leading):
    router, x, token_ids = loaded(mode), hidden(*leading), torch.randint(VOCAB, leading)
    result = router(x, token_ids)
    assert result.weights.shape == result.ids.shape == (*leading, 4)
    rows = router(x.reshape(-1, K), token_ids.reshape(-1))
    assert torch.equal(result.weights.reshape(-1, 4), rows.weights)
    assert torch.equal(result.ids.reshape(-1, 4), rows.ids)


def test_leading_dimensions_that_are_no_single_one_are_copied():
    router, x = loaded(), hidden(3, 2)
    assert same(router(x.transpose(0, 1)), router(x.transpose(0, 1).contiguous()))


def test_a_new_factor_takes_effect():
    router, x = loaded(), hidden(5)
    weights = router(x).weights
    router.routed_scaling_factor = 2.0
    assert torch.equal(router(x).weights, weights * 2)


def test_a_new_router_is_ready_and_serves_without_recording():
    router = Router(SPEC)
    weights, _ = router(hidden(5))
    assert weights.isfinite().all()
    assert not weights.requires_grad
    assert router.weight.float().std() == pytest.approx(K**-0.5, rel=0.1)
    assert not router.e_score_correction_bias.any()


def test_a_new_hash_router_names_no_experts():
    router = Router(SPEC, "hash", vocab_size=VOCAB)
    weights, ids = router(hidden(5), torch.arange(5))
    assert (ids == -1).all()
    assert not weights.any()


def test_the_weight_is_trained_if_it_is_to_be():
    router, x = loaded(), hidden(2, 3)
    router.weight.requires_grad_()
    (router(x).weights ** 2).sum().backward()
    assert router.weight.grad.dtype == torch.bfloat16
    assert router.weight.grad.any()


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (({},), {}, TypeError, "spec must be a RouterSpec; got dict"),
        ((SPEC, "sparse"), {}, ValueError, "mode must be one of .*; got 'sparse'"),
        ((SPEC, ["hash"]), {}, ValueError, "mode must be one of"),
        ((SPEC, "hash"), {}, TypeError, "vocab_size must be an int; got NoneType"),
        ((SPEC, "hash"), {"vocab_size": 0}, ValueError, "vocab_size must be from 1 to"),
        ((SPEC,), {"vocab_size": 9}, ValueError, "vocab_size must be None in dense mode; got 9"),
        ((SPEC,), {"routed_scaling_factor": math.nan}, ValueError, "routed_scaling_factor must"),
        ((SPEC,), {"routed_scaling_factor": "1"}, TypeError, "routed_scaling_factor must"),
        ((SPEC,), {"batch_invariant": 1}, TypeError, "batch_invariant must be a bool; got int"),
        ((SPEC,), {"pdl": None}, TypeError, "pdl must be a bool; got NoneType"),
    ],
)
def test_a_bad_router_is_refused_by_name(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Router(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "token_ids", "error", "message"),
    [
        (hidden(5).half(), torch.arange(5), TypeError, r"x must be torch\.bfloat16; got .*float16"),
        (hidden(5).tolist(), torch.arange(5), TypeError, r"x must be a torch\.Tensor; got list"),
        (hidden(5).view(2, -1)[0, 0], torch.arange(5), ValueError, "x must be 2-D"),
        (hidden(5)[:, :56], torch.arange(5), ValueError, r"x must be \(N, K=64\) to match W"),
        (hidden(2, 3)[..., :56], torch.ones(2, 3).int(), ValueError, r"x must be .* got \(6, 56\)"),
        (hidden(5), None, ValueError, "token_ids must be given in hash mode; got None"),
        (hidden(2, 3), None, ValueError, "token_ids must be given in hash mode; got None"),
        (hidden(5), torch.arange(4), ValueError, r"x must be \(N=4, K=64\) to match token_ids"),
        (hidden(5), torch.arange(5.0), TypeError, "token_ids must be torch.int32 or torch.int64"),
        (
            hidden(2, 3),
            torch.arange(6),
            ValueError,
            r"token_ids must have shape \(2, 3\) as x without its last dimension; got \(6,\)",
        ),
    ],
)
def test_a_bad_call_is_refused_by_name(x, token_ids, error, message):
    with pytest.raises(error, match=message):
        loaded("hash")(x, token_ids)


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_weights_load_under_every_spelling(spelling):
    prefix, bias = SPELLINGS[spelling]
    given, router = tensors("dense", prefix, bias), Router(SPEC)
    assert router.load_weights(iter(given.items())) == set(given)
    assert torch.equal(router.weight, given[prefix + "weight"])
    assert torch.equal(router.e_score_correction_bias, given[prefix + bias])


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_table_loads_from_either_integer(spelling, dtype):
    prefix, _ = SPELLINGS[spelling]
    given, router = tensors("hash", prefix), Router(SPEC, "hash", vocab_size=VOCAB)
    given[prefix + "tid2eid"] = given[prefix + "tid2eid"].to(dtype)
    given[prefix + "tid2eid"][3, 1] = -7
    router.load_weights(given.items())
    assert router.tid2eid.dtype == torch.int32
    assert torch.equal(router.tid2eid.long(), given[prefix + "tid2eid"].long().clamp(min=-1))


def test_loading_writes_in_place():
    router = Router(SPEC)
    where = {n: t.data_ptr() for n, t in router.state_dict().items()}
    router.load_weights(tensors().items())
    assert {n: t.data_ptr() for n, t in router.state_dict().items()} == where


LAYER = "model.layers.3.mlp.gate."
BAD_WEIGHTS = [
    (
        "weight",
        lambda t: t.float(),
        TypeError,
        r"model\.layers\.3\.mlp\.gate\.weight must be torch\.bfloat16; got torch\.float32",
    ),
    ("weight", lambda t: t[:39], ValueError, r"gate\.weight must have shape \(40, 64\); got \(39"),
    ("weight", lambda t: t[0], ValueError, r"gate\.weight must be 2-D; got 1-D \(64,\)"),
    ("weight", lambda t: t.tolist(), TypeError, r"gate\.weight must be a torch\.Tensor; got list"),
    ("weight", None, ValueError, r"^weight must be among .*; got model.*correction_bias$"),
    (
        "e_score_correction_bias",
        lambda t: t.bfloat16(),
        TypeError,
        r"gate\.e_score_correction_bias must be torch\.float32; got torch\.bfloat16",
    ),
    ("e_score_correction_bias", lambda t: t[1:], ValueError, r"must have shape \(40,\); got"),
    ("e_score_correction_bias", None, ValueError, "^e_score_correction_bias must be among the"),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), BAD_WEIGHTS)
def test_bad_weights_are_refused_by_name_and_change_nothing(name, spoil, error, message):
    given, router = tensors("dense", LAYER), loaded()
    before = state(router)
    tensor = given.pop(LAYER + name)
    if spoil is not None:
        given[LAYER + name] = spoil(tensor)  # the last, behind a good one
    with pytest.raises(error, match=message):
        router.load_weights(given.items())
    assert same_state(state(router), before)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("dense", LAYER + "weight_scale"),
        ("dense", LAYER + "tid2eid"),
        ("dense", LAYER + "bias"),  # in this spelling a bias of the logits
        ("dense", "model.layers.3.mlp.router.weight"),
        ("dense", "model.layers.3.mlp.experts.0.weight"),
        ("dense", "aggregate.weight"),
        ("hash", LAYER + "e_score_correction_bias"),
    ],
)
def test_an_unexpected_tensor_is_refused_by_name(mode, name):
    router, given = loaded(mode), tensors(mode, LAYER)
    with pytest.raises(ValueError, match=f"^{name} is unexpected: a router in {mode} mode wants "):
        router.load_weights([*given.items(), (name, torch.zeros(E))])


def test_a_bias_is_unexpected_where_the_spec_has_none():
    router = Router(RouterSpec(E, K, has_bias=False))
    with pytest.raises(ValueError, match=r"^gate\.bias is unexpected: .* wants weight$"):
        router.load_weights(tensors("dense", "gate.", "bias").items())


def test_tensors_of_two_layers_are_refused():
    two = [*tensors("dense", "layers.3.ffn.gate.", "bias").items()][:1]
    two += [*tensors("dense", "layers.4.ffn.gate.", "bias").items()][1:]
    with pytest.raises(
        ValueError,
        match=r"^layers\.4\.ffn\.gate\.bias does not belong to the same router as layers\.3\.",
    ):
        Router(SPEC).load_weights(two)


def test_a_repeated_tensor_is_refused():
    given = [*tensors().items()]
    with pytest.raises(ValueError, match="weight does not belong to the same router as weight"):
        Router(SPEC).load_weights([*given, given[0]])


def test_a_table_of_unknown_experts_is_refused():
    given = tensors("hash")
    given["tid2eid"][7, 2] = 2**32
    with pytest.raises(ValueError, match="tid2eid must name experts below 40; got 4294967296"):
        loaded("hash").load_weights(given.items())


def test_a_router_without_memory_is_not_loaded_into():
    router = Router(SPEC, device="meta")
    with pytest.raises(ValueError, match="must be on a real device: call to_empty"):
        router.load_weights(tensors().items())
    router.to_empty(device="cpu").load_weights(tensors().items())
    assert router(hidden(2)).ids.shape == (2, 4)


# --- state, copies, conversions -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_state_goes_from_router_to_router(mode):
    first, second = loaded(mode), loaded(mode)
    assert not same_state(first.state_dict(), second.state_dict())
    second.load_state_dict(first.state_dict())
    assert same_state(first.state_dict(), second.state_dict())


def test_state_of_another_dtype_is_refused_by_name_and_not_rounded():
    model, before = nn.Sequential(loaded()), None
    before = state(model)
    given = {name: t.double() for name, t in before.items()}
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(given, strict=False)
    assert "0.weight must be torch.bfloat16; got torch.float64" in str(caught.value)
    assert "0.e_score_correction_bias must be torch.float32" in str(caught.value)
    assert same_state(state(model), before)


def test_state_of_a_table_may_be_int64():
    router = loaded("hash")
    given = router.state_dict() | {"tid2eid": torch.randint(E, (VOCAB, 4))}
    router.load_state_dict(given)
    assert router.tid2eid.dtype == torch.int32
    assert torch.equal(router.tid2eid.long(), given["tid2eid"])


def test_missing_state_is_reported_as_torch_does():
    with pytest.raises(RuntimeError, match=r'Missing key.* "e_score_correction_bias"'):
        loaded().load_state_dict({"weight": tensors()["weight"]})


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float64),
        lambda m: m.cpu(),
    ],
)
@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_a_router_keeps_its_dtypes_and_bits_in_a_model_that_is_converted(convert, mode):
    model = nn.ModuleList([loaded(mode), nn.Linear(2, 2)])
    before = state(model[0])
    convert(model)
    after = state(model[0])
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    assert same_state(after, before)
    assert model[0](hidden(5), torch.arange(5)).ids.shape == (5, 4)


def test_moves_take_place_without_the_conversion_that_comes_with_them():
    router = loaded().to("meta", torch.float16)
    assert router.weight.is_meta
    assert (router.weight.dtype, router.e_score_correction_bias.dtype) == (
        torch.bfloat16,
        torch.float32,
    )


@pytest.mark.parametrize("mode", ["dense", "hash"])
@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, copy.copy, lambda router: pickle.loads(pickle.dumps(router))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_routes_alike_under_a_handle_of_its_own(clone, mode):
    router = loaded(mode, routed_scaling_factor=2.5)
    twin, call = clone(router), (hidden(5), torch.arange(5))
    assert same(twin(*call), router(*call))
    assert twin.handle != router.handle
    for each in (router, twin):
        assert same(torch.ops.cute_router.route_by_handle(each.handle, *call), router(*call))


def test_a_deep_copy_shares_no_memory():
    router = loaded()
    twin = copy.deepcopy(router)
    twin.weight.zero_()
    assert router.weight.any()


def test_a_router_is_freed_with_its_last_reference():
    handles = torch.ops.cute_router.route_by_handle
    router = loaded()
    handle = router.handle
    router(hidden(2))
    del router
    gc.collect()
    with pytest.raises(ValueError, match=f"handle must be .*; got {handle}"):
        handles(handle, hidden(2))


def test_a_router_says_what_it_is():
    shown = repr(Router(SPEC, "hash", vocab_size=VOCAB, routed_scaling_factor=2.5))
    assert shown == (
        "Router(hash, num_experts=40, hidden_size=64, vocab_size=20, top_k=4,"
        " scoring='sqrtsoftplus', routed_scaling_factor=2.5)"
    )


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", ["dense", "hash"])
def test_a_router_compiles_once_for_all_numbers_of_tokens(mode, backend):
    router = loaded(mode, routed_scaling_factor=1.5)
    check_compiled(router, lambda N: (hidden(N), torch.randint(VOCAB, (N,))), backend)


def test_a_router_compiles_once_for_all_leading_dimensions():
    router = loaded()
    fast, count = compiled(router)
    fast(hidden(2, 3))
    first = count()
    for leading in ((4, 3), (5, 7), (64, 2)):
        x = hidden(*leading)
        assert same(fast(x), router(x))
    assert count() == first


def test_the_layers_of_a_model_share_one_compiled_router():
    layers = [loaded() for _ in range(12)]

    def route(layer, x):
        return layer(x)

    fast, count = compiled(route)
    fast(layers[0], hidden(4))
    first = count()
    for layer in layers:
        x = hidden(4)
        assert same(fast(layer, x), layer(x))
    assert count() == first, "a handle or another number of a layer is compiled in"


def test_a_compiled_router_sees_new_weights():
    router, x = loaded(), hidden(5)
    fast, _ = compiled(router)
    before = fast(x)
    router.load_weights(tensors().items())
    assert same(fast(x), router(x))
    assert not same(fast(x), before)


def test_a_compiled_router_trains_as_an_eager_one():
    router, x = loaded(), hidden(5)
    router.weight.requires_grad_()
    fast, _ = compiled(router)
    grads = []
    for module in (router, fast):
        router.zero_grad()
        (module(x).weights ** 2).sum().backward()
        grads.append(router.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("strict", [False, True])
def test_a_router_can_be_exported(strict):
    router, x = loaded(), hidden(5)
    N = {0: torch.export.Dim("N", min=2, max=4096)}
    program = torch.export.export(router, (x,), dynamic_shapes=(N,), strict=strict)
    more = hidden(9)
    assert same(program.module()(more), router(more))
