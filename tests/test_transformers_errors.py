"""What patch and unpatch refuse, and what a patched model does: the module or argument is named."""

import pytest
import torch
from torch import nn
from transformers_cases import PROMPT, VOCAB, model_of, routers, tokens_of

from cute_router.integrations.transformers import patch, unpatch

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
    with pytest.raises(TypeError, match=r"layers\.0\.mlp\.gate\.weight must be torch\.bfloat16"):
        patch(model_of("V4", dtype=torch.float32))


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
