"""The routers of a Hugging Face DeepSeek model, swapped for those of this package and back.

    build     a tiny model with random weights, from its config: nothing is downloaded
    patch     its routers, and hold each to the model's own on the same hidden states
    generate  a few tokens
    unpatch   it, and see that all is as it was

The check is against the model's own routers evaluated in fp32. As they are, those of V4 round their
logits to bf16, and so choose a few other experts; those of V3 do not.

It runs on the GPU if there is one, and needs `pip install '.[transformers]'`.

    python examples/hf_swap.py --model v4 v3 --prompt 64 --generate 8
"""

import argparse
import copy
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cute_router import backend_for, reference
from cute_router.integrations.transformers import patch, unpatch

VOCAB, EXPERTS, HIDDEN, TOP_K = 1000, 64, 128, 6
WEIGHT_ERROR = 2e-5  # of the scaling factor: twice what either side may be off
V4 = {
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
V3 = {
    "first_k_dense_replace": 1,  # the first layer has no experts
    "n_group": 8,
    "topk_group": 4,
    "intermediate_size": 128,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def main() -> int:
    """Swap the routers of each model; 0 if every check held."""
    args = parse_args()
    transformers.logging.set_verbosity_error()
    passed = [swap(name, args) for name in args.model]
    return 0 if all(passed) else 1


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", nargs="+", choices=["v4", "v3"], default=["v4", "v3"], help="(v4 v3)")
    add("--batch", type=positive, default=2, help="sequences (2)")
    add("--prompt", type=positive, default=64, help="tokens of each (64)")
    add("--generate", type=positive, default=8, help="tokens to generate for each (8)")
    add("--seed", type=int, default=0, help="of the random weights and prompts (0)")
    return parser.parse_args()


def positive(text: str) -> int:
    """A positive int from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def swap(name: str, args: argparse.Namespace) -> bool:
    """Patch and unpatch one model; whether every check held."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(name).to(device)
    prompt = torch.randint(VOCAB, (args.batch, args.prompt)).to(device)
    describe(model, args, device)

    own = {name: copy.deepcopy(router) for name, router in routers(model).items()}
    tensors = model.state_dict(keep_vars=True)
    logits, _ = run(model, prompt)

    patched = patch(model)
    _, calls = run(model, prompt)
    print(f"patched   {len(patched)} routers; which experts are those of the model's own router")
    print(f"          {'on the same hidden states, evaluated':36} {'in fp32':>14} {'as it is':>14}")
    agreed = [compare(name, own[name], *calls[name]) for name in patched]
    print(f"check     the experts and weights of fp32: {verdict(all(agreed))}")
    tokens = generate(model, prompt, args.generate)
    print(f"generated {' '.join(map(str, tokens[0].tolist()))}")

    unpatch(model)
    after = model.state_dict(keep_vars=True)
    restored = after.keys() == tensors.keys() and all(after[n] is t for n, t in tensors.items())
    restored &= torch.equal(run(model, prompt)[0], logits)
    print(f"check     the model as before, once unpatched: {verdict(restored)}\n")
    return all(agreed) and restored


def build(name: str) -> Any:
    """A model with random weights in bf16."""
    v4 = name == "v4"
    make = transformers.DeepseekV4Config if v4 else transformers.DeepseekV3Config
    config = make(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        q_lora_rank=32,
        max_position_embeddings=4096,
        eos_token_id=None,
        **(V4 if v4 else V3),
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for router in routers(model).values():
        nn.init.normal_(router.weight, std=HIDDEN**-0.5)
        if hasattr(router, "tid2eid"):
            router.tid2eid.copy_(torch.rand(VOCAB, EXPERTS).topk(TOP_K).indices)
        else:  # from_pretrained keeps the bias in fp32, from_config does not
            router.e_score_correction_bias = torch.randn(EXPERTS) * 0.1
    return model


def routers(model: nn.Module) -> dict[str, Any]:
    """The routers of a model, patched or not."""
    return {name: module for name, module in model.named_modules() if name.endswith(".mlp.gate")}


def describe(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Say what runs, and where."""
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else "the CPU, on the fp64 reference"
    print(f"model     {type(model).__name__} of transformers {transformers.__version__}")
    print(f"          {EXPERTS} experts, hidden size {HIDDEN}, bf16, random, seed {args.seed}")
    print(f"runs on   {where}{f', {backend_for(device)} kernels' if on_gpu else ''}")


@torch.no_grad()
def run(model: Any, prompt: Tensor) -> tuple[Tensor, dict[str, tuple[Any, Any]]]:
    """The model's logits, and the arguments and results of each router by name."""
    calls: dict[str, tuple[Any, Any]] = {}
    names = {router: name for name, router in routers(model).items()}

    def record(router: Any, arguments: Any, result: Any) -> None:
        calls[names[router]] = arguments, result

    hooks = [router.register_forward_hook(record) for router in names]
    logits: Tensor = model(prompt).logits
    for hook in hooks:
        hook.remove()
    return logits, calls


@torch.no_grad()
def compare(name: str, own: Any, arguments: tuple[Any, ...], result: tuple[Any, ...]) -> bool:
    """Hold a patched router to the model's `own`; whether it agrees with that in fp32."""
    x, *token_ids = arguments
    in_fp32 = copy.deepcopy(own).float()
    expected = in_fp32(x.float(), *token_ids)
    mine, theirs, as_is = (spread(*r[1:]) for r in (result, expected, own(*arguments)))
    shared = [int(((mine > 0) & (other > 0)).sum()) for other in (theirs, as_is)]
    counts = [f"{count} of {int((mine > 0).sum())}" for count in shared]
    print(f"          {name:36} {counts[0]:>14} {counts[1]:>14}")

    agrees = (mine - theirs).abs().amax(-1) <= WEIGHT_ERROR * own.routed_scaling_factor
    if not token_ids:  # chosen by score, they may differ where fp32 cannot tell scores apart
        bound = reference.logit_error_bound(x.flatten(0, -2), own.weight).amax(-1)
        agrees |= margin(in_fp32, expected[0]) <= 4 * bound + 4e-6
    return bool(agrees.all())


def spread(weights: Tensor, ids: Tensor) -> Tensor:
    """The weight of every expert [N, E], 0 for those that are not chosen."""
    everyone = torch.zeros(len(ids), EXPERTS, device=ids.device)
    return everyone.scatter_add(-1, ids, weights.float())


def margin(own: Any, logits: Tensor) -> Tensor:
    """How far [N] the scores of each token are from another choice, of groups or of experts."""
    grouped = hasattr(own, "num_group")
    a = reference.activations(logits, "sigmoid" if grouped else "sqrtsoftplus")
    s = reference.selection_scores(a, own.e_score_correction_bias)
    margins = []
    if grouped:
        two_best = s.unflatten(-1, (own.num_group, -1)).topk(2).values
        margins.append(gap(two_best.sum(-1), own.topk_group))
        removed = reference.removed_by_groups(s, own.num_group, own.topk_group)
        s = s.masked_fill(removed, -torch.inf)
    margins.append(gap(s, own.top_k))
    return torch.stack(margins).amin(0)


def gap(scores: Tensor, k: int) -> Tensor:
    """Between the k-th best and the next."""
    best = scores.topk(k + 1).values
    return best[:, k - 1] - best[:, k]


def generate(model: Any, prompt: Tensor, count: int) -> Tensor:
    """The tokens that follow, greedily."""
    tokens: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        pad_token_id=0,
        max_new_tokens=count,
        do_sample=False,
    )
    return tokens[:, prompt.shape[1] :]


def verdict(passed: bool) -> str:
    """How a check went."""
    return "passed" if passed else "FAILED"


if __name__ == "__main__":
    sys.exit(main())
