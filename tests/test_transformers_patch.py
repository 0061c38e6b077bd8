"""Patching and unpatching: nothing but how a model's routers are evaluated is another."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers_cases import (
    GATES,
    MATHEMATICS,
    ROUTERS,
    call_of,
    check_call,
    lone,
    model_of,
    recorded,
    routers,
    same,
    tokens_of,
)

from cute_router.integrations.transformers import patch, unpatch


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
