"""Calls with extras as torch ops: opcheck, and under torch.compile without a break of the graph."""

from dataclasses import fields

import pytest
import torch
from extras_cases import BIASES, LOGITS, draw_extras
from test_ops import compiled, same
from torch.library import opcheck

import cute_router
from cute_router import Extras, Router, RouterSpec, extended

ops = torch.ops.cute_router
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
E, K, TOP_K = 40, 64, 4
KINDS = ["num_valid", "shared", "packed", "logits", "all", "all, packed"]
DENSE = ("dense_decode", "dense_prefill", "route")
MISSING = dict.fromkeys(DENSE, ()) | {"activation_topk": LOGITS, "hash_route": LOGITS + BIASES}


def call(name: str, N: int, device: str) -> tuple[torch.Tensor, ...]:
    """The tensors of a call."""
    x = torch.randn(N, K, device=device).bfloat16()
    W, bias = torch.randn(E, K, device=device).bfloat16() / 8, torch.randn(E, device=device)
    if name in DENSE:
        return x, W, bias
    if name == "activation_topk":
        return (x @ W.T).float(), bias
    table = torch.randint(E, (20, TOP_K), device=device)
    return torch.arange(N, device=device), table, x, W


def options_of(name: str) -> dict[str, int]:
    return {} if name == "hash_route" else {"top_k": TOP_K}


def form(name: str, tensors: tuple[torch.Tensor, ...]):
    """Tensors as the public function takes them."""
    if name == "hash_route":
        return tensors[:2], {"x": tensors[2], "W": tensors[3]}
    return tensors, options_of(name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MISSING)
def test_an_op_with_extras_keeps_torchs_rules_and_does_what_its_function_does(name, kind, device):
    N = 7
    tensors = call(name, N, device)
    extras = draw_extras(kind, N, E, device, without=MISSING[name])
    arguments, options = form(name, tensors)
    expected = getattr(cute_router, name)(*arguments, **options, extras=extras)
    given = extras.fields() | {"out_ids": torch.empty_like(expected.ids)}
    if not extras.packed:
        given["out_weights"] = torch.empty_like(expected.weights)
    opcheck(getattr(ops, name).extras, tensors, given | options_of(name))
    assert getattr(ops, name).extras(*tensors, **given, **options_of(name)) is None
    assert torch.equal(given["out_ids"], expected.ids)


@pytest.mark.parametrize("name", MISSING)
def test_an_op_has_every_field_and_its_default(name):
    schema = {a.name: a for a in getattr(ops, name).extras._schema.arguments}
    own = set(schema) - {a.name for a in getattr(ops, name).default._schema.arguments}
    assert own == {f.name for f in fields(Extras)} | {"out_weights", "out_ids"}
    assert set(Extras().fields()) == {f.name for f in fields(Extras)}
    for field in fields(Extras):
        wanted = 3 if field.name == "ids_dtype" else field.default  # torch keeps it as a number
        assert schema[field.name].default_value == wanted, field.name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("packed", [False, True])
def test_a_call_with_extras_compiles_once_for_all_numbers_of_tokens(name, packed, device):
    def step(valid, count, *tensors):
        extras = Extras(
            valid=valid, num_valid=count, shared_experts=1, shared_weight=0.5, packed=packed
        )
        arguments, options = form(name, tensors)
        routing = getattr(cute_router, name)(*arguments, **options, extras=extras)
        return routing.weights.float() * 2, routing.ids

    fast, count = compiled(step)
    after_first = None
    for N in (5, 3, 17, 64):
        given = (torch.rand(N, device=device) < 0.5, torch.tensor(N - 1, device=device).int())
        tensors = call(name, N, device)
        assert same(fast(*given, *tensors), step(*given, *tensors)), N
        after_first = after_first or count()
    assert count() == after_first, "compiled again for another N"


def test_logits_and_outputs_are_written_in_compiled_code():
    N = 5
    x, W, bias = call("dense_decode", N, "cpu")
    out, ids = torch.zeros(N, E), torch.zeros(N, TOP_K, dtype=torch.int64)

    def step(x, W, bias, out, ids):
        extras = Extras(out_logits=out, ids_dtype=torch.int64)
        routing = cute_router.dense_decode(x, W, bias, top_k=TOP_K, out_ids=ids, extras=extras)
        return routing.weights + out.sum()

    fast, _ = compiled(step)
    result = fast(x, W, bias, out, ids)
    torch.testing.assert_close(out, x.float() @ W.float().T)
    assert torch.equal(ids, cute_router.dense_decode(x, W, bias, top_k=TOP_K).ids.long())
    assert same([result], [step(x, W, bias, out, ids)])


def test_a_router_passes_extras_on_for_the_rows_of_all_its_leading_dimensions():
    spec = RouterSpec(E, K, TOP_K)
    router, x = Router(spec), torch.randn(2, 3, K).bfloat16()
    extras = Extras(valid=torch.arange(6) != 4, shared_experts=1, packed=True)
    weights, ids = router(x, extras=extras)
    assert weights.shape == ids.shape == (2, 3, TOP_K + 1)
    flat = extended.dense_decode(
        x.view(6, K), router.weight, router.e_score_correction_bias, top_k=TOP_K, extras=extras
    )
    assert torch.equal(ids.view(6, -1), flat.ids)
    assert torch.equal(weights.reshape(6, -1), flat.weights)
    assert (ids[1, 1] == -65536).all()


def test_a_hash_router_takes_extras():
    router = Router(RouterSpec(E, K, TOP_K), "hash", vocab_size=9)
    table = torch.randint(E, (9, TOP_K)).int()
    router.load_weights({"weight": router.weight.data, "tid2eid": table}.items())
    x, tokens = torch.randn(4, K).bfloat16(), torch.tensor([3, 9, 0, 1])
    extras = Extras(num_valid=torch.tensor(3, dtype=torch.int32), shared_experts=1)
    _, ids = router(x, tokens, extras=extras)
    assert ids.tolist() == [[*table[3].tolist(), E], [-1] * 5, [*table[0].tolist(), E], [-1] * 5]
