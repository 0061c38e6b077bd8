"""Models with patched routers: they say, generate and learn what they do with their own in fp32."""

import contextlib
import copy

import pytest
import torch
from transformers_cases import DEVICES, GATES, call_of, model_of, routers, tokens_of

from cute_router.integrations.transformers import patch


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


def assert_close(actual, expected):
    """Equal but for sums of experts in another order, which a bf16 model rounds differently."""
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)


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
