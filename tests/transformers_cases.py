"""Tiny models of transformers and lone routers of DeepSeek's sizes, and what to hold them to.

Importing this skips the importing test module where transformers is not to be had.
"""

import copy

import pytest
import torch
from oracle import assert_routing

from cute_router import Routing, reference

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
TINY_OF = {
    "V4": (transformers.DeepseekV4Config, TINY_V4),
    "V3": (transformers.DeepseekV3Config, TINY_V3),
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


def tiny_config(family, **changes):
    """The config of `model_of`, with changes."""
    config, sizes = TINY_OF[family]
    return config(**sizes | changes)


def model_of(family, device="cpu", dtype=torch.bfloat16):
    """A tiny random model, its routers spread out and its biases kept in fp32."""
    config = tiny_config(family)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
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
        configs = {"V3": transformers.DeepseekV3Config, "V3.2": transformers.DeepseekV32Config}
        config = configs[kind](hidden_size=4096)
        options = {"top_k": 8} | MATHEMATICS["V3"] | {"n_group": 8, "topk_group": 4}
    return made(kind, config).to(device), options


def tiny(kind, **changes):
    """A router of the sizes of `model_of`, in a config with changes."""
    return made(kind, tiny_config(kind.split()[0], **changes))


def made(kind, config):
    """A random router in bf16, its bias in fp32."""
    router = ROUTERS[kind](config).bfloat16()
    fill(router)
    return router


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
