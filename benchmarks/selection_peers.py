"""Top-k kernels and gates of other projects: what they once took, and QuACK's as it is called."""

from collections.abc import Callable

from peers import Gate, imported, sglang_gate, vllm_gate
from problem import Call
from torch import Tensor

# Recorded 2026-11 on an H200, each alone: microseconds by (rows, length, k) or by N.
# FlashInfer 0.7.2.post1: sorted; sorted, deterministic and ties to the lower index; unsorted.
# QuACK 0.6.5: powers of two only, without the last bits of a value, k rounded up to 8.
FLASHINFER = ("FlashInfer sorted", "FlashInfer deterministic", "FlashInfer unsorted")
QUACK = "QuACK"
TOPK: dict[tuple[int, int, int], tuple[float, float, float, float | None]] = {
    (1, 256, 6): (17.7, 14.5, 6.2, 2.75),
    (64, 256, 6): (20.9, 16.2, 6.4, 3.01),
    (64, 384, 6): (21.0, 16.2, 6.1, None),
    (8192, 256, 8): (264, 305, 262, 4.74),
    (8192, 384, 6): (281, 318, 275, None),
    (32768, 256, 8): (1049, 1229, 1088, 14.3),
    (1, 8192, 512): (36.2, 22.9, 9.9, None),
    (1, 131072, 2048): (67.7, 71.4, 13.0, None),
    (4, 32768, 2048): (50.8, 42.4, 12.0, None),
    (32, 8192, 1024): (41.6, 27.6, 11.1, None),
    (64, 32768, 512): (48.1, 31.7, 18.0, None),
    (64, 131072, 2048): (88.4, 78.9, 57.9, None),
    (256, 16384, 2048): (68.1, 72.8, 33.3, None),
    (1, 1048576, 2048): (70.7, 285, 40.8, None),
    (16, 1048576, 2048): (168, 355, 115, None),
}
# SGLang 0.5.23 and vLLM 0.33.0, on given fp32 logits, k = 6: by E, then N.
GATES: dict[int, dict[int, tuple[float, float]]] = {
    256: {
        1: (2.88, 2.61),
        64: (3.02, 2.56),
        1024: (4.36, 4.02),
        8192: (14.35, 13.27),
        32768: (48.59, 43.10),
    },
    384: {
        1: (3.11, 2.80),
        64: (3.25, 2.89),
        1024: (4.79, 4.44),
        8192: (21.31, 18.53),
        32768: (76.38, 65.49),
    },
}

SGLANG, VLLM = "SGLang gate", "vLLM gate"
GATE_MAKERS: dict[str, Callable[[], Gate]] = {SGLANG: sglang_gate, VLLM: vllm_gate}


def recorded_topk(rows: int, length: int, k: int) -> dict[str, float]:
    """What peers took for a point of top-k."""
    found = zip((*FLASHINFER, QUACK), TOPK[rows, length, k], strict=True)
    return {name: us for name, us in found if us is not None}


def recorded_gate(E: int, N: int) -> dict[str, float]:
    """What peers took for a gate."""
    return dict(zip((SGLANG, VLLM), GATES[E][N], strict=True))


def on_logits(make: Callable[[], Gate]) -> Callable[[list[Tensor], Tensor], Call]:
    """A gate that is called on given logits."""

    def maker(logits: list[Tensor], bias: Tensor) -> Call:
        gate = make()
        return lambda i: gate(logits[i], bias)

    return maker


def quack(scores: list[Tensor], k: int) -> Call:
    """QuACK's top-k, for a k that is a power of two and at least 8."""
    select = imported("quack.topk", "topk_fwd")
    length = scores[0].shape[1]
    if length & (length - 1) or not 64 <= length <= 4096 or k > 128:
        raise NotImplementedError("takes powers of two, 64 to 4096 entries, k up to 128")
    most = max(8, 1 << (k - 1).bit_length())

    def call(i: int) -> tuple[Tensor, Tensor]:
        values, indices = select(scores[i], most)
        return values[:, :k], indices[:, :k]

    return call
