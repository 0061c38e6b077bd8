"""A decode loop under torch.compile and a CUDA graph, through layers of `cute_router.Router`.

    compile   the whole step, without a graph break: every router is one op in it
    capture   the compiled step in a CUDA graph, which feeds its tokens back to itself
    replay    once for each token generated

The model is a toy, of random weights: what an expert adds is a vector, and not what an MLP makes of
x. Its routers are real: a hash layer first and scored ones behind it, as in DeepSeek-V4. On the CPU
the step is compiled (with aot_eager) and run, and there is no graph.

    python examples/compiled_decode.py --tokens 8 --layers 4 --steps 16
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cute_router import Router, RouterSpec

VOCAB, TOP_K, FACTOR = 1000, 6, 1.5
WARMUPS = 3  # of the compiled step before its capture


class Layer(nn.Module):
    """x + Σ w_e v_e, over the experts that the router chose."""

    def __init__(self, spec: RouterSpec, hashed: bool):
        super().__init__()
        self.router = Router(
            spec,
            "hash" if hashed else "dense",
            routed_scaling_factor=FACTOR,
            vocab_size=VOCAB if hashed else None,
        )
        if self.router.tid2eid is not None:
            self.router.tid2eid.random_(spec.num_experts)
        vectors = torch.randn(spec.num_experts, spec.hidden_size).bfloat16()
        self.vectors = nn.Parameter(vectors, requires_grad=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states [N, K] of N tokens to the next layer's."""
        # All layers are called alike: a scored one makes no use of the tokens.
        weights, ids = self.router(nn.functional.rms_norm(x, x.shape[-1:]), tokens)
        added: Tensor = (weights.unsqueeze(-1) * self.vectors[ids.long()]).sum(1)
        return x + added.bfloat16()


class Model(nn.Module):
    """Tokens to the next tokens, greedily."""

    def __init__(self, spec: RouterSpec, layers: int):
        super().__init__()
        embedding, head = torch.randn(2, VOCAB, spec.hidden_size).bfloat16()
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.head = nn.Parameter(head, requires_grad=False)
        self.layers = nn.ModuleList(Layer(spec, hashed=i == 0) for i in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """The next token [N] of each."""
        x = self.embedding[tokens]
        for layer in self.layers:
            x = layer(x, tokens)
        return (x @ self.head.T).argmax(-1)


def main() -> int:
    """Generate twice, replayed and called; 0 if both gave the same tokens."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.manual_seed(args.seed)
    model = Model(RouterSpec(args.experts, args.hidden, TOP_K), args.layers).to(device)
    prompt = torch.randint(VOCAB, (args.tokens,)).to(device)

    backend = "inductor" if on_gpu else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    with torch.inference_mode():
        called = generate(compiled, prompt, args.steps)
        if on_gpu:
            tokens = prompt.clone()
            replay = capture(compiled, tokens)
            looped = generate(lambda _: replay(), tokens.copy_(prompt), args.steps)
            other, name = looped, "replays of a CUDA graph"
        else:
            other, name = generate(model, prompt, args.steps), "the model that is not compiled"

    runs_on = torch.cuda.get_device_name(device) if on_gpu else "the CPU, on the fp64 reference"
    print(f"model     {args.layers} routers of {args.experts} experts, hidden size {args.hidden}")
    print(f"runs on   {runs_on}")
    print(f"compiled  by {backend}, as one graph")
    print(f"tokens    of sequence 0: {' '.join(map(str, called[:, 0].tolist()))}")
    same = torch.equal(called, other)
    print(f"check     the same tokens from {name}: {'passed' if same else 'FAILED'}")
    return 0 if same else 1


def generate(step: Callable[[Tensor], Tensor], tokens: Tensor, steps: int) -> Tensor:
    """The tokens [steps, N] that follow."""
    generated = []
    for _ in range(steps):
        tokens = step(tokens)
        generated.append(tokens.clone())  # a replay will write the next ones to the same place
    return torch.stack(generated)


def capture(step: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], Tensor]:
    """A graph of `step` that takes its tokens from `tokens` and leaves the next ones there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):  # all that is compiled or loaded has to be there before
            step(tokens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens.copy_(step(tokens))

    def replay() -> Tensor:
        graph.replay()
        return tokens

    return replay


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--tokens", type=positive, default=8, help="sequences that are decoded at once (8)")
    add("--layers", type=positive, default=4, help="the first of them a hash layer (4)")
    add("--steps", type=positive, default=16, help="tokens to generate for each sequence (16)")
    add("--experts", type=positive, default=256, help="of each layer (256)")
    add("--hidden", type=positive, default=4096, help="hidden size (4096)")
    add("--seed", type=int, default=0, help="of the random weights (0)")
    return parser.parse_args()


def positive(text: str) -> int:
    """A positive int from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
