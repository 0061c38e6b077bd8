"""Patched models of transformers: routed as the oracle says, and nothing but routed differently."""

import contextlib
import copy
import pickle

import pytest
import torch
from oracle import assert_routing
from torch import nn

import cute_router
from cute_router import Routing, reference
from cute_router.integrations.transformers import patch, unpatch

transformers = pytest.importorskip(
    "transformers", "5.14", reason="needs transformers 5.14 or later"
)

from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter  # noqa: E402
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (  # noqa: E402
    DeepseekV4HashRouter,
    DeepseekV4TopKRouter,
)
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (  # noqa: E402
    DeepseekV32TopkRouter,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROUTERS = {
    "V4": DeepseekV4TopKRouter,
    "V4 by token id": DeepseekV4HashRouter,
    "V3": DeepseekV3TopkRouter,
    "V3.2": DeepseekV32TopkRouter,
}

VOCAB, PROMPT = 128, (2, 10)
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "num_experts_per_tok": 4,
    "n_routed_experts": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # so that experts are heard in what the model says
    "eos_token_id": None,
}
TINY_V4 = TINY | {
    "num_hidden_layers": 3,
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "sliding_window": 16,
    "hc_mult": 2,
}
TINY_V3 = TINY | {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 64,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
}
# What the oracle is to be told of each router of these models, and of those of `lone`.
MATHEMATICS = {
    "V4": {"scoring": "sqrtsoftplus", "routed_scaling_factor": 1.5},
    "V3": {"scoring": "sigmoid", "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2},
}
GATES = {
    "V4": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate"],
    "V3": ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"],
}


def model_of(family, device="cpu", **changes):
    """A tiny random model in bf16, its routers spread out and its biases kept in fp32."""
    if family == "V4":
        config = transformers.DeepseekV4Config(**TINY_V4 | changes)
    else:
        config = transformers.DeepseekV3Config(**TINY_V3 | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for router in routers(model).values():
        fill(router)
    return model.to(device)


def fill(router):
    """Random tensors of a router, of the dtypes that `from_pretrained` gives them."""
    E, K = router.weight.shape
    with torch.no_grad():
        router.weight.normal_(std=K**-0.5)
    if hasattr(router, "tid2eid"):
        router.tid2eid.random_(E)
    else:
        router.e_score_correction_bias = torch.randn(E) * 0.1


def lone(kind, device="cpu"):
    """A router of DeepSeek's sizes without its model, and what to tell the oracle of it."""
    if kind.startswith("V4"):
        config = transformers.DeepseekV4Config(vocab_size=1000)
        options = {"top_k": 6} | MATHEMATICS["V4"]
    else:
        made = transformers.DeepseekV3Config if kind == "V3" else transformers.DeepseekV32Config
        config = made(hidden_size=4096)
        options = {"top_k": 8} | MATHEMATICS["V3"] | {"n_group": 8, "topk_group": 4}
    router = ROUTERS[kind](config).bfloat16()
    fill(router)
    return router.to(device), options


def routers(model):
    """The routers of a model by name, patched or not."""
    return {n: m for n, m in model.named_modules() if isinstance(m, tuple(ROUTERS.values()))}


def tokens_of(device="cpu"):
    return torch.randint(VOCAB, PROMPT).to(device)


def call_of(router, N, device="cpu"):
    """Arguments of a router for N tokens."""
    x = torch.randn(1, N, router.hidden_dim).bfloat16().to(device)
    if not hasattr(router, "tid2eid"):
        return (x,)
    return x, torch.randint(router.tid2eid.shape[0], (1, N)).to(device)


def in_fp32(own, x, *token_ids):
    """(logits, weights, ids) of a router of transformers that is evaluated in fp32."""
    return copy.deepcopy(own).float()(x.float(), *token_ids)


@contextlib.contextmanager
def own_routers_in_fp32(model):
    """A model that is not patched, with its routers evaluated in fp32."""
    exact = {id(router): copy.deepcopy(router).float() for router in routers(model).values()}

    def evaluate(router, args, _):
        return exact[id(router)](args[0].float(), *args[1:])

    hooks = [router.register_forward_hook(evaluate) for router in routers(model).values()]
    yield
    for hook in hooks:
        hook.remove()


def recorded(model, *args, **kwargs):
    """Arguments and results of each router in a forward of the model."""
    calls = {}

    def record(router, args, result):
        calls[id(router)] = args, result

    hooks = [router.register_forward_hook(record) for router in routers(model).values()]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return {name: calls[id(router)] for name, router in routers(model).items()}


def assert_close(actual, expected):
    """Equal but for sums of experts in another order, which a bf16 model rounds differently."""
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)


def same(first, second):
    """Whether two results have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_call(own, args, result, options):
    """Hold what a patched router returned to the oracle, and to its `own` evaluated in fp32."""
    logits, weights, ids = result
    x = args[0].reshape(-1, own.hidden_dim)
    k = options["top_k"]
    assert weights.shape == ids.shape == (len(x), k)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int64
    own_logits, own_weights, own_ids = in_fp32(own, *args)
    bound = reference.logit_error_bound(x, own.weight)
    if logits is not None:
        assert logits.dtype == torch.float32
        assert ((logits - own_logits).abs() <= 2 * bound).all()

    tolerance = 2e-5 * options["routed_scaling_factor"]
    if len(args) > 1:
        assert torch.equal(ids, own_ids), "columns come in table order"
        assert (weights - own_weights).abs().max() <= tolerance
        scores = {n: v for n, v in options.items() if n != "top_k"}
        exact = reference.hash_route(args[1].reshape(-1), own.tid2eid, x=x, W=own.weight, **scores)
        assert torch.equal(ids, exact.ids.long())
        assert (weights - exact.weights).abs().max() <= tolerance / 2
        return
    bias = own.e_score_correction_bias
    assert_routing(Routing(weights, ids.int()), x, own.weight, bias, **options)
    clear = margin(x, own.weight, bias, options) > 4 * bound.amax(-1) + 4e-6
    assert clear.float().mean() > 0.9, "the data is to tell experts apart"
    (ids, order), (own_ids, own_order) = ids.sort(-1), own_ids.sort(-1)
    assert torch.equal(ids[clear], own_ids[clear])
    apart = weights.gather(-1, order) - own_weights.gather(-1, own_order)
    assert apart[clear].abs().max() <= tolerance


def margin(x, W, bias, options):
    """How far [N] the scores are, in fp64, from another choice of groups or of experts."""
    k, groups, stay = options["top_k"], options.get("n_group", 1), options.get("topk_group", 1)
    a = reference.activations(reference.logits(x, W), options["scoring"])
    s = reference.selection_scores(a, bias)
    margins = []
    if groups > 1:
        margins.append(gap(s.unflatten(-1, (groups, -1)).topk(2).values.sum(-1), stay))
        s = s.masked_fill(reference.removed_by_groups(s, groups, stay), -torch.inf)
    margins.append(gap(s, k))
    return torch.stack(margins).amin(0)


def gap(scores, k):
    """Between the k-th best and the next."""
    best = scores.topk(k + 1).values
    return best[:, k - 1] - best[:, k]


# --- what is chosen -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("N", [1, 7, 64, 300])
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_agrees_with_the_oracle_and_with_its_own_in_fp32(kind, N, device):
    router, options = lone(kind, device)
    own, args = copy.deepcopy(router), call_of(router, N, device)
    assert patch(router) == [type(own).__name__]
    check_call(own, args, router(*args), options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", GATES)
def test_the_routers_of_a_model_agree_with_the_oracle_and_with_its_own_in_fp32(family, device):
    model, options = model_of(family, device), {"top_k": 4} | MATHEMATICS[family]
    own = copy.deepcopy(routers(model))
    assert patch(model) == GATES[family]
    calls = recorded(model, tokens_of(device))
    assert list(calls) == GATES[family]
    for name, (args, result) in calls.items():
        check_call(own[name], args, result, options)


@pytest.mark.parametrize("kind", ["V4", "V4 by token id"])
def test_a_router_of_v4_may_score_by_sigmoid(kind):
    config = transformers.DeepseekV4Config(**TINY_V4, scoring_func="sigmoid")
    router = ROUTERS[kind](config).bfloat16()
    fill(router)
    own, args = copy.deepcopy(router), call_of(router, 20)
    patch(router)
    options = {"top_k": 4, "routed_scaling_factor": 1.5, "scoring": "sigmoid"}
    check_call(own, args, router(*args), options)


def test_a_router_of_v3_may_leave_its_weights_as_they_are():
    config = transformers.DeepseekV3Config(**TINY_V3, norm_topk_prob=False)
    router = DeepseekV3TopkRouter(config).bfloat16()
    fill(router)
    own, args = copy.deepcopy(router), call_of(router, 20)
    patch(router)
    options = {"top_k": 4, "renormalize": False} | MATHEMATICS["V3"]
    check_call(own, args, router(*args), options)


def test_kernels_wait_for_whoever_writes_the_tensors_of_the_model(monkeypatch):
    calls = []
    for name in ("route", "hash_route"):
        function = getattr(cute_router, name)

        def spy(*args, function=function, **options):
            calls.append(options)
            return function(*args, **options)

        monkeypatch.setattr(f"cute_router.integrations.transformers.{name}", spy)
    model = model_of("V4")
    patch(model, batch_invariant=True)
    model(tokens_of())
    assert [call["pdl"] for call in calls] == [False] * 3
    assert [call.get("batch_invariant") for call in calls] == [None, True, True]


def test_a_new_factor_takes_effect():
    router, options = lone("V4")
    args = call_of(router, 5)
    patch(router)
    weights = router(*args)[1]
    router.routed_scaling_factor = 2 * options["routed_scaling_factor"]
    assert torch.equal(router(*args)[1], 2 * weights)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["V4", "V3"])
def test_batch_invariant_rows_do_not_depend_on_the_batch(kind):
    router, _ = lone(kind, "cuda")
    (x,) = call_of(router, 64, "cuda")
    patch(router, batch_invariant=True)
    _, weights, ids = router(x)
    for n in (0, 9, 63):
        assert same(router(x[:, n : n + 1])[1:], (weights[n : n + 1], ids[n : n + 1]))


# --- the model around it ------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", GATES)
def test_a_patched_model_says_what_it_does_with_its_own_routers_in_fp32(family, experts, device):
    model, tokens = model_of(family, device), tokens_of(device)
    model.set_experts_implementation(experts)
    with torch.no_grad():
        with own_routers_in_fp32(model):
            expected = model(tokens).logits
        patch(model)
        actual = model(tokens).logits
        assert_close(actual, expected)
        for router in routers(model).values():
            router.routed_scaling_factor *= 1.25
        with pytest.raises(AssertionError):  # what experts say is no rounding error
            assert_close(model(tokens).logits, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", GATES)
def test_generation_goes_on_with_patched_routers(family, device):
    model, tokens = model_of(family, device), tokens_of(device)

    def generate():
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            pad_token_id=0,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    with own_routers_in_fp32(model):
        expected = generate()
    patch(model)
    actual = generate()
    assert actual.sequences.shape == expected.sequences.shape == (2, 15)
    agree = torch.ones(2, dtype=torch.bool, device=device)  # so far, of each sequence
    for step in range(5):
        assert_close(actual.logits[step][agree], expected.logits[step][agree])
        agree &= actual.sequences[:, 10 + step] == expected.sequences[:, 10 + step]


def test_logits_are_computed_where_transformers_records_them_and_nowhere_else():
    model, tokens = model_of("V4"), tokens_of()
    with own_routers_in_fp32(model), torch.no_grad():
        expected = model(tokens, output_router_logits=True)
    patch(model)  # with the hooks of transformers in place
    fresh = model_of("V4")
    patch(fresh)  # before they are
    fresh.load_state_dict(model.state_dict())
    for router in routers(fresh).values():
        assert router(*call_of(router, 3))[0] is None
    with torch.no_grad():
        for each in (model, fresh):
            actual = each(tokens, output_router_logits=True)
            assert len(actual.router_logits) == len(expected.router_logits) == 2
            for mine, theirs in zip(actual.router_logits, expected.router_logits, strict=True):
                assert_close(mine, theirs)
            assert_close(actual.aux_loss, expected.aux_loss)


def test_a_patched_model_trains_as_with_its_own_routers_in_fp32():
    model, tokens = model_of("V4"), tokens_of()
    embeddings = model.get_input_embeddings().weight

    def train():
        model.zero_grad()
        model(tokens, labels=tokens, output_router_logits=True).loss.backward()
        return embeddings.grad.float()

    with own_routers_in_fp32(model):
        expected = train()
    patch(model)
    off = (train() - expected).norm() / expected.norm()
    assert off < 0.03, "more than bf16 gradients of sums in another order"
    assert all(router.weight.grad.any() for router in routers(model).values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ROUTERS)
def test_gradients_are_those_of_its_own_router_in_fp32(kind, device):
    router, _ = lone(kind, device)
    own = copy.deepcopy(router).float()
    x, *token_ids = call_of(router, 5, device)
    patch(router)
    router.register_forward_hook(lambda *_: None)  # for the logits
    grads = []
    for each, states in ((router, x.clone()), (own, x.float())):
        states.requires_grad_()
        logits, weights, _ = each(states, *token_ids)
        ((weights**2).sum() + (logits**2).mean()).backward()
        grads.append((states.grad.float(), each.weight.grad.float()))
    for actual, expected in zip(*grads, strict=True):
        largest = float(expected.abs().max())
        assert largest > 0
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-8 * largest)


# --- what stays as it was -----------------------------------------------------------------------


@pytest.mark.parametrize("family", GATES)
def test_patching_changes_no_module_or_tensor_and_unpatching_changes_all_back(family):
    model, tokens = model_of(family), tokens_of()
    modules, classes = list(model.modules()), [type(m) for m in model.modules()]
    attributes = [dict(vars(m)) for m in model.modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        before = model(tokens).logits
    names = patch(model)

    now = [*model.named_parameters(), *model.named_buffers()]
    assert [n for n, _ in now] == [n for n, _ in tensors]
    assert all(t is was for (_, t), (_, was) in zip(now, tensors, strict=True))
    assert all(m is was for m, was in zip(model.modules(), modules, strict=True))
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))

    assert unpatch(model) == names == GATES[family]
    assert all(m is was for m, was in zip(model.modules(), modules, strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert [vars(m).keys() for m in model.modules()] == [a.keys() for a in attributes]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


def test_a_model_can_be_patched_again():
    model, tokens = model_of("V4"), tokens_of()
    patch(model)
    first = recorded(model, tokens)
    unpatch(model)
    patch(model, batch_invariant=True)
    assert all(same(recorded(model, tokens)[n][1][1:], first[n][1][1:]) for n in first)


def test_a_part_of_a_model_can_be_patched():
    model = model_of("V4")
    assert patch(model.model.layers[1]) == ["mlp.gate"]
    assert len({type(router) for router in routers(model).values()}) == 3
    with pytest.raises(ValueError, match=r"not be patched already; model\.layers\.1\.mlp"):
        patch(model)
    assert unpatch(model) == ["model.layers.1.mlp.gate"]
    assert patch(model) == GATES["V4"]


@pytest.mark.parametrize("family", GATES)
def test_a_patched_model_is_saved_and_loaded_under_the_names_it_had(family, tmp_path):
    model = model_of(family)
    names = list(model.state_dict())
    patch(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert list(loaded.state_dict()) == names
    assert patch(loaded) == GATES[family]
    for name, router in routers(model).items():
        args = call_of(router, 20)
        assert same(routers(loaded)[name](*args)[1:], router(*args)[1:])


def test_a_weight_mapped_from_a_file_at_an_odd_place_keeps_its_bits_and_its_identity():
    router, options = lone("V4")
    own, args = copy.deepcopy(router), call_of(router, 5)
    memory = torch.empty(own.weight.numel() + 1, dtype=torch.bfloat16)
    router.weight = weight = nn.Parameter(memory[1:].view_as(own.weight).copy_(own.weight))
    assert weight.data_ptr() % 16
    patch(router)
    assert router.weight is weight
    assert torch.equal(weight, own.weight)
    check_call(own, args, router(*args), options)


def test_a_patched_router_uses_the_tensors_that_are_loaded_into_it():
    router, _ = lone("V4")
    other, _ = lone("V4")
    args = call_of(router, 5)
    patch(router)
    router(*args)
    router.load_state_dict(other.state_dict())
    patch(other)
    assert same(router(*args)[1:], other(*args)[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("family", GATES)
def test_a_patched_model_moves_between_devices_and_unpatches_there(family):
    model, tokens = model_of(family), tokens_of()
    options = {"top_k": 4} | MATHEMATICS[family]
    own = copy.deepcopy(routers(model))
    patch(model)
    for device in ("cuda", "cpu", "cuda"):
        model.to(device)
        for name, (args, result) in recorded(model, tokens.to(device)).items():
            check_call(own[name].to(device), args, result, options)
    unpatch(model)
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    with torch.no_grad():
        assert model(tokens.cuda()).logits.isfinite().all()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_copy_is_patched_by_itself(kind, clone):
    router, _ = lone(kind)
    args = call_of(router, 5)
    patch(router)
    twin = clone(router)
    expected = router(*args)[1:]
    unpatch(router)
    assert type(router) is ROUTERS[kind]
    assert same(twin(*args)[1:], expected)
    unpatch(twin)
    assert type(twin) is ROUTERS[kind]
    assert same(twin.state_dict().values(), router.state_dict().values())


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_patched_router_compiles_as_one_graph_and_again_when_it_is_unpatched(kind):
    router, _ = lone(kind)
    args = call_of(router, 5)
    with torch.no_grad():
        own = router(*args)
        patch(router)
        fast = torch.compile(router, fullgraph=True, backend="aot_eager")
        assert same(fast(*args)[1:], router(*args)[1:])
        unpatch(router)
        assert same(fast(*args), own)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_patched_router_is_captured_in_a_cuda_graph(kind):
    router, _ = lone(kind, "cuda")
    patch(router)
    with torch.no_grad():
        args = call_of(router, 8, "cuda")
        router(*args)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, *captured = router(*args)
        for static, new in zip(args, call_of(router, 8, "cuda"), strict=True):
            static.copy_(new)
        graph.replay()
        assert same(captured, router(*args)[1:])


# --- what is refused ----------------------------------------------------------------------------

GATE = r"model\.layers\.2\.mlp\.gate"  # the last: those before it are good


def replace(**tensors):
    def spoil(router):
        for name, tensor in tensors.items():
            setattr(router, name, nn.Parameter(tensor, False) if name == "weight" else tensor)

    return spoil


def lose_groups(router):
    del router.num_group


def take_forward(router):
    router.forward = router.forward


@pytest.mark.parametrize(
    ("family", "spoil", "error", "message"),
    [
        ("V4", lambda r: r.float(), TypeError, r"\.weight must be torch\.bfloat16; got .*float32"),
        ("V3", lambda r: r.float(), TypeError, r"\.weight must be torch\.bfloat16; got .*float32"),
        ("V4", lambda r: r.half(), TypeError, r"\.weight must be torch\.bfloat16; got .*float16"),
        (
            "V4",
            lambda r: r.bfloat16(),
            TypeError,
            r"\.e_score_correction_bias must be torch\.float32; got torch\.bfloat16",
        ),
        (
            "V4",
            replace(weight=torch.zeros(31, 64).bfloat16()),
            ValueError,
            r"\.weight must have shape \(32, 64\); got \(31, 64\)",
        ),
        (
            "V4",
            replace(e_score_correction_bias=torch.zeros(31)),
            ValueError,
            r"\.e_score_correction_bias must have shape \(32,\); got \(31,\)",
        ),
        ("V4", lambda r: setattr(r, "top_k", 33), ValueError, ": top_k must be"),
        ("V4", lambda r: setattr(r, "hidden_dim", 60), ValueError, ": hidden_size must be a mult"),
        ("V4", lambda r: setattr(r, "score_fn", nn.SiLU()), ValueError, ": scoring .* got 'SiLU'"),
        ("V3", lambda r: setattr(r, "num_group", None), TypeError, ": n_group must be an int"),
        (
            "V3",
            lambda r: setattr(r, "routed_scaling_factor", -1.0),
            ValueError,
            ": routed_scaling_factor must be finite",
        ),
        ("V3", lose_groups, ValueError, r" must be as in transformers .* 'num_group'"),
        ("V4", take_forward, ValueError, " must have the forward of its class"),
    ],
)
def test_a_router_that_cannot_be_patched_is_named_and_none_is_patched(
    family, spoil, error, message
):
    model = model_of(family)
    spoil(routers(model)["model.layers.2.mlp.gate"])
    before = [type(m) for m in model.modules()]
    with pytest.raises(error, match=f"^{GATE}{message}"):
        patch(model)
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(ValueError, match="must be patched"):
        unpatch(model)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (torch.full((VOCAB, 4), 32), ValueError, "name experts from 0 to 31; got 32 to 32"),
        (torch.full((VOCAB, 4), -1), ValueError, "name experts from 0 to 31; got -1 to -1"),
        (torch.zeros(VOCAB, 3).long(), ValueError, r"have shape \(128, 4\); got \(128, 3\)"),
        (torch.zeros(VOCAB).long(), ValueError, r"be 2-D; got 1-D"),
        (torch.zeros(VOCAB, 4), TypeError, r"be torch\.int32 or torch\.int64; got torch\.float32"),
    ],
)
def test_a_bad_table_is_named(table, error, message):
    model = model_of("V4")
    model.model.layers[0].mlp.gate.tid2eid = table
    with pytest.raises(error, match=rf"^model\.layers\.0\.mlp\.gate\.tid2eid must {message}"):
        patch(model)


def test_a_model_that_was_made_in_fp32_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV4Config(**TINY_V4))
    with pytest.raises(TypeError, match=r"layers\.0\.mlp\.gate\.weight must be torch\.bfloat16"):
        patch(model)


@pytest.mark.parametrize("function", [patch, unpatch])
def test_what_is_no_model_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        function("deepseek-ai/DeepSeek-V4")


def test_a_model_without_such_routers_is_refused():
    with pytest.raises(ValueError, match=r"model must have one of DeepseekV4TopKRouter, .* Linear"):
        patch(nn.Linear(8, 8))


def test_options_are_checked():
    with pytest.raises(TypeError, match="batch_invariant must be a bool; got int"):
        patch(model_of("V4"), batch_invariant=1)


def test_a_model_is_patched_once_and_unpatched_once():
    model = model_of("V4")
    with pytest.raises(ValueError, match="model must be patched; got DeepseekV4ForCausalLM"):
        unpatch(model)
    patch(model)
    with pytest.raises(ValueError, match=r"not be patched already; model\.layers\.0\.mlp\.gate is"):
        patch(model)
    unpatch(model)
    with pytest.raises(ValueError, match="model must be patched; got DeepseekV4ForCausalLM"):
        unpatch(model)


def test_what_else_has_changed_a_router_is_undone_first():
    model = model_of("V4")
    patch(model)
    last = routers(model)["model.layers.2.mlp.gate"]
    last.forward = last.forward
    with pytest.raises(ValueError, match=rf"^{GATE} must have the forward of its class"):
        unpatch(model)
    del last.forward
    patched = type(last)
    last.__class__ = type("Sharded", (patched,), {})
    with pytest.raises(ValueError, match=rf"^{GATE} must be as patch left it; .* Sharded"):
        unpatch(model)
    last.__class__ = patched
    unpatch(model)


def test_a_model_that_chooses_by_token_id_needs_token_ids():
    model = model_of("V4")
    patch(model)
    with pytest.raises(ValueError, match=r"input_ids must be given, .* inputs_embeds"):
        model(inputs_embeds=torch.randn(*PROMPT, 64).bfloat16())


def test_a_model_converted_while_patched_is_refused_when_it_is_called():
    model = model_of("V4")
    patch(model)
    with pytest.raises(TypeError, match=r"W must be torch\.bfloat16; got torch\.float32"):
        model.float()(tokens_of())
