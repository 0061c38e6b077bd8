"""One decode step through the routers of several MoE layers, as a serving engine runs it.

On a GPU the step is captured in a CUDA graph, checked against the fp64 reference and timed beside
plain torch. Without one, the same step runs on the reference.

    python examples/decode_demo.py --tokens 8 --layers 4 --plot routing.png
    python examples/decode_demo.py --checkpoint model-00002-of-00046.safetensors --layer 5
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import cute_router
from cute_router import Routing, reference

# The routers of DeepSeek-V4-Flash.
EXPERTS, HIDDEN, TOP_K, FACTOR = 256, 4096, 6, 1.5

TOKENS_SHOWN = 3
TIMED_CALLS = 40  # in one graph, so that the cost of a replay is spread thin
REPLAYS = 30
LAYERS_IN_LEGEND = 6


class Layer(NamedTuple):
    """One MoE layer's router and the hidden states that arrive at it."""

    name: str
    x: Tensor
    W: Tensor
    bias: Tensor | None


def main() -> int:
    """Run the demo; 0 if every check held."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = checkpoint_layer(args, device) if args.checkpoint else random_layers(args, device)
    on_gpu = device.type == "cuda"

    print(f"cute_router {cute_router.__version__}: one decode step, {args.tokens} tokens\n")
    describe(layers, args, device)

    routings = capture(lambda: step(layers))[1] if on_gpu else step(layers)
    for layer, routing in zip(layers, routings, strict=True):
        show(layer, routing)

    # The reference is not checked against itself: on the CPU, plain torch is checked instead.
    checked = routings if on_gpu else [eager(layer) for layer in layers]
    agreed = check(layers, checked, "the kernel" if on_gpu else "plain torch in fp32")
    if on_gpu:
        compare_times(layers)
    if args.plot:
        plot(layers, routings, args.plot)
        print(f"plot      {args.plot}")
    return 0 if agreed else 1


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--tokens", type=positive, default=8, help="tokens in the step (8)")
    parser.add_argument("--layers", type=positive, default=4, help="random MoE layers (4)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and states (0)")
    parser.add_argument(
        "--checkpoint", type=Path, help="take the router from this .safetensors file or folder"
    )
    parser.add_argument("--layer", type=int, help="which layer of the checkpoint")
    parser.add_argument("--plot", type=Path, help="draw expert load and scores into this image")
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.layer is None):
        parser.error("--checkpoint and --layer go together")
    return args


def positive(text: str) -> int:
    """A positive int from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def random_layers(args: argparse.Namespace, device: torch.device) -> list[Layer]:
    """Routers of the right geometry with logits of about unit variance."""
    generator = torch.Generator().manual_seed(args.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        Layer(
            f"layer {i}",
            x=normal(args.tokens, HIDDEN).bfloat16().to(device),
            W=(normal(EXPERTS, HIDDEN) * HIDDEN**-0.5).bfloat16().to(device),
            bias=(normal(EXPERTS) * 0.1).to(device),
        )
        for i in range(args.layers)
    ]


def checkpoint_layer(args: argparse.Namespace, device: torch.device) -> list[Layer]:
    """One router from a checkpoint, with random hidden states."""
    from cute_router.checkpoint import load_router

    try:
        router = load_router(args.checkpoint, args.layer)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"decode_demo: {error}") from error
    if router.table is not None:
        raise SystemExit(
            f"decode_demo: layer {args.layer} is a hash layer: its experts are looked up by token"
            " id (tid2eid), not chosen by score, so it is not for this demo; take a later layer"
        )
    x = torch.randn(
        args.tokens, router.weight.shape[1], generator=torch.Generator().manual_seed(args.seed)
    )
    bias = None if router.bias is None else router.bias.to(device)
    return [Layer(f"layer {args.layer}", x.bfloat16().to(device), router.weight.to(device), bias)]


def step(layers: list[Layer]) -> list[Routing]:
    """What the engine calls, once for each layer."""
    return [
        cute_router.dense_decode(
            layer.x, layer.W, layer.bias, top_k=TOP_K, routed_scaling_factor=FACTOR
        )
        for layer in layers
    ]


def eager(layer: Layer) -> Routing:
    """The same router in plain torch operations, fp32 throughout."""
    if layer.x.is_cuda:
        logits = torch.mm(layer.x, layer.W.T, out_dtype=torch.float32)
    else:
        logits = layer.x.float() @ layer.W.float().T
    a = torch.nn.functional.softplus(logits).sqrt()
    ids = (a if layer.bias is None else a + layer.bias).topk(TOP_K).indices
    weights = a.gather(-1, ids)
    return Routing(weights / weights.sum(-1, keepdim=True) * FACTOR, ids.int())


def describe(layers: list[Layer], args: argparse.Namespace, device: torch.device) -> None:
    """Say what runs, where, on whose weights."""
    E, K = layers[0].W.shape
    bias = "no bias" if layers[0].bias is None else "bias"
    source = args.checkpoint.name if args.checkpoint else f"random, seed {args.seed}"
    print(f"router    {E} experts, hidden size {K}, sqrtsoftplus, {bias}, top {TOP_K}, x {FACTOR}")
    print(f"weights   {source}; {len(layers)} layer{'s' if len(layers) > 1 else ''}")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        print(f"runs on   {name}, {cute_router.backend_for(device)} kernels, in a CUDA graph")
    else:
        print("runs on   the CPU, because no CUDA device was found: this is the fp64 reference.")
        print("          It shows what the kernels compute and says nothing of their speed.")


def show(layer: Layer, routing: Routing) -> None:
    """Print the experts and weights of a few tokens."""
    print(f"\n{layer.name}")
    for n in range(min(TOKENS_SHOWN, layer.x.shape[0])):
        chosen = zip(routing.ids[n].tolist(), routing.weights[n].tolist(), strict=True)
        print(f"  token {n:<2}" + "".join(f"  {e:>4}: {w:.3f}" for e, w in chosen))


def check(layers: list[Layer], routings: list[Routing], who: str) -> bool:
    """Compare with the reference, and print how well it agrees.

    An expert may differ where the reference's scores are too close for fp32 logits to tell apart.
    """
    slots = equal = wrong = 0
    worst = 0.0
    for layer, (weights, ids) in zip(layers, routings, strict=True):
        a = reference.activations(reference.logits(layer.x, layer.W))
        s = reference.selection_scores(a, layer.bias)
        expected = reference.select(s, TOP_K)
        fp32_error = (reference.logit_error_bound(layer.x, layer.W) + 1e-6 * s.abs()).amax(-1)
        apart = (s.gather(-1, expected) - s.gather(-1, ids.long())).abs()
        slots += ids.numel()
        equal += int((ids == expected).sum())
        wrong += int((apart > 2 * fp32_error[:, None]).sum())
        difference = weights - reference.weigh(a, ids, FACTOR)
        worst = max(worst, float(difference.abs().max()))
    agreed = wrong == 0 and worst <= 1e-5 * FACTOR
    close = slots - equal - wrong
    print(f"\ncheck     {who} against the reference: {'passed' if agreed else 'FAILED'}")
    print(f"          experts: {equal} of {slots} equal, {close} too close to tell, {wrong} wrong")
    print(f"          weights: within {worst:.1e}; {1e-5 * FACTOR:.1e} allowed")
    return agreed


def capture(
    work: Callable[[], list[Routing]],
) -> tuple[torch.cuda.CUDAGraph, list[Routing]]:
    """Capture `work` in a CUDA graph and replay it once."""
    work()  # what has to be compiled is compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    graph.replay()
    torch.cuda.synchronize()
    return graph, results


def microseconds(route_layers: Callable[[], list[Routing]], calls: int) -> float:
    """Median time of one call, over replays of a graph that repeats the step."""
    steps = max(1, TIMED_CALLS // calls)
    graph, results = capture(lambda: [r for _ in range(steps) for r in route_layers()])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(results))
    return statistics.median(times)


def compare_times(layers: list[Layer]) -> None:
    """Print the time of a call, and plain torch's, both as CUDA graphs."""
    ours = microseconds(lambda: step(layers), len(layers))
    theirs = microseconds(lambda: [eager(layer) for layer in layers], len(layers))
    print(f"time      {ours:.2f} us per call; plain torch, also in a graph, {theirs:.2f} us:")
    print(f"          {theirs / ours:.1f} times as fast. (The weights stay in the L2 cache here;")
    print("          benchmarks/router.py measures with weights that come from memory.)")


def plot(layers: list[Layer], routings: list[Routing], path: Path) -> None:
    """Draw the first layer's score landscape and every layer's expert load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    layer, E = layers[0], layers[0].W.shape[0]
    a = reference.activations(reference.logits(layer.x, layer.W))
    s = reference.selection_scores(a, layer.bias).cpu()
    load = torch.stack([torch.bincount(r.ids.flatten().cpu(), minlength=E) for r in routings])

    figure, (scores, loads) = pyplot.subplots(
        2, 1, figsize=(12, 7), height_ratios=(3, 2), layout="constrained", sharex=True
    )
    image = scores.imshow(s, aspect="auto", cmap="magma", interpolation="nearest")
    tokens = torch.arange(s.shape[0])[:, None].expand_as(routings[0].ids)
    # Markers shrink as rows do, so that they never cover the scores they mark.
    size = min(60.0, 1500.0 / s.shape[0])
    chosen = routings[0].ids.cpu()
    scores.scatter(chosen, tokens, s=size, facecolors="none", edgecolors="#7fe3ff", linewidths=1.2)
    scores.set_title(f"Selection scores, {layer.name}: the {TOP_K} chosen of each token are ringed")
    scores.set_ylabel("token")
    scores.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=scores, label="activation + bias", pad=0.01)

    bottom = torch.zeros(E)
    shades = pyplot.get_cmap("viridis")(torch.linspace(0.15, 0.85, len(layers)))
    for item, counts, shade in zip(layers, load, shades, strict=True):
        label = item.name if len(layers) <= LAYERS_IN_LEGEND else None
        loads.bar(range(E), counts, bottom=bottom, width=1.0, color=shade, label=label)
        bottom += counts
    mean = float(load.sum()) / E
    loads.axhline(mean, color="#d1495b", linewidth=1.2, label=f"even load, {mean:.2f}")
    loads.set_title(f"Expert load: {int(load.sum())} choices")
    loads.set_xlabel("expert")
    loads.set_ylabel("tokens")
    loads.yaxis.set_major_locator(MaxNLocator(integer=True))
    loads.legend(frameon=False, ncols=LAYERS_IN_LEGEND + 1, loc="upper right")
    loads.margins(y=0.3)
    for axes in (scores, loads):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_horizontalalignment("left")
        axes.title.set_x(0.0)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
