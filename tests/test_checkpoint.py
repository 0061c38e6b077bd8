"""Router tensors are found under their published names, and nothing doubtful is let through."""

import json

import pytest
import torch

from cute_router.checkpoint import INDEX, load_router

save_file = pytest.importorskip("safetensors.torch").save_file

E, K = 16, 64
NATIVE = "layers.{}.ffn.gate."
HUGGING_FACE = "model.layers.{}.mlp.gate."
VLLM = "model.layers.{}.ffn.gate."
BIAS = {
    NATIVE: "bias",
    HUGGING_FACE: "e_score_correction_bias",
    VLLM: "e_score_correction_bias",
}


def weight():
    return torch.randn(E, K).bfloat16()


@pytest.fixture
def save(tmp_path):
    """Write tensors into a checkpoint file beside a tensor that is no router's; its path."""

    def write(tensors, name="model.safetensors"):
        save_file({"model.embed.weight": torch.zeros(2, 2), **tensors}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("spelling", [NATIVE, HUGGING_FACE, VLLM])
def test_a_scored_layer_is_found_by_its_published_names(save, spelling):
    tensors = {
        f"{spelling.format(layer)}{name}": t
        for layer in (3, 13)
        for name, t in (("weight", weight()), (BIAS[spelling], torch.randn(E)))
    }
    router = load_router(save(tensors), 3)
    assert torch.equal(router.weight, tensors[spelling.format(3) + "weight"])
    assert torch.equal(router.bias, tensors[spelling.format(3) + BIAS[spelling]])
    assert router.table is None


@pytest.mark.parametrize("spelling", [NATIVE, HUGGING_FACE, VLLM])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_hash_layer_has_a_table_and_no_bias(save, spelling, dtype):
    prefix, table = spelling.format(0), torch.randint(E, (100, 6)).to(dtype)
    router = load_router(save({prefix + "weight": weight(), prefix + "tid2eid": table}), 0)
    assert router.bias is None
    assert router.table.dtype == dtype
    assert torch.equal(router.table, table)


def test_a_folder_is_read_through_its_index(save, tmp_path):
    files = {"weight": "a.safetensors", "bias": "b.safetensors"}
    tensors = {"weight": weight(), "bias": torch.randn(E)}
    for name, file in files.items():
        save({f"layers.4.ffn.gate.{name}": tensors[name]}, file)
    index = {"weight_map": {f"layers.4.ffn.gate.{name}": file for name, file in files.items()}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    router = load_router(tmp_path, 4)
    assert torch.equal(router.weight, tensors["weight"])
    assert torch.equal(router.bias, tensors["bias"])


def test_a_missing_layer_is_refused_with_what_was_found(save):
    path = save({"layers.3.ffn.gate.weight": weight()})
    with pytest.raises(
        ValueError,
        match=r"no router for layer 30 .*: wanted layers\.30\.ffn\.gate\.weight or"
        r" model\.layers\.30\.mlp\.gate\.weight or model\.layers\.30\.ffn\.gate\.weight;"
        r" found layers\.3\.ffn\.gate\.weight$",
    ):
        load_router(path, 30)


def test_a_file_without_routers_is_refused_with_what_it_holds(save):
    with pytest.raises(ValueError, match=r"no router for layer 0 .*; found model\.embed\.weight$"):
        load_router(save({}), 0)


def test_long_lists_of_what_was_found_are_cut(save):
    path = save({f"layers.{i}.ffn.gate.weight": weight() for i in range(12)})
    with pytest.raises(ValueError, match=r"layers\.\d+\.ffn\.gate\.weight and 4 more$"):
        load_router(path, 99)


def test_an_fp32_weight_is_refused_and_not_rounded(save):
    path = save({"layers.3.ffn.gate.weight": torch.randn(E, K)})
    with pytest.raises(TypeError, match=r"layers\.3\.ffn\.gate\.weight must be torch\.bfloat16"):
        load_router(path, 3)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("weight", torch.zeros(E).bfloat16(), ValueError, r"gate\.weight must be 2-D; got 1-D"),
        ("bias", torch.zeros(E).bfloat16(), TypeError, r"gate\.bias must be torch\.float32"),
        ("bias", torch.zeros(1, E), ValueError, r"gate\.bias must be 1-D; got 2-D \(1, 16\)"),
        ("bias", torch.zeros(E - 1), ValueError, r"gate\.bias must have .* 16 experts .*; got 15"),
        ("tid2eid", torch.zeros(100, 6), TypeError, r"gate\.tid2eid must be torch\.int32 or"),
        ("weight_scale", torch.zeros(1), ValueError, r"unknown meaning: \['.*gate.weight_scale'\]"),
    ],
)
def test_an_unexpected_tensor_is_refused_by_name(save, name, tensor, error, message):
    tensors = {"weight": weight(), "bias": torch.randn(E)} | {name: tensor}
    path = save({f"layers.3.ffn.gate.{n}": t for n, t in tensors.items()})
    with pytest.raises(error, match=message):
        load_router(path, 3)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"absent\.safetensors"):
        load_router(tmp_path / "absent.safetensors", 0)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"weights\.bin is not a safetensors file"):
        load_router(path, 0)
