"""Configurations of the kernels that route by token id."""

from dataclasses import dataclass

from cute_router.extras import PLAIN, ExtrasSpec
from cute_router.spec import HIDDEN_MULTIPLE, RouterSpec
from cute_router.topk.config import WARP, dependent_launch

MAX_GATE_THREADS = 512  # K = 4096 in one load a thread and expert
FLIGHT = 16  # 16-byte loads of a thread that are on their way at once: 64 registers
MAX_FLIGHT_STEPS = 4  # of those, along K: each needs a load of x too


@dataclass(frozen=True)
class HashConfig:
    """One compiled kernel that looks experts up by token id and weighs them equally.

    top_k:      k, the entries of a table row.
    arch:       the compile target.
    token_bits: of a token id, 32 or 64.
    table_bits: of a table entry, 32 or 64.
    vector:     entries that a thread copies; divides k and the table's row stride.
    pdl:        launched under programmatic dependent launch, where the target knows it.
    extras:     what calls have beside the defaults; with any, `vector` is 1.
    """

    top_k: int
    arch: str
    token_bits: int = 64
    table_bits: int = 64
    vector: int = 1
    pdl: bool = True
    extras: ExtrasSpec = PLAIN

    @property
    def row_threads(self) -> int:
        """Threads to a token."""
        return self.top_k // self.vector

    @property
    def tokens(self) -> int:
        """Tokens of a CTA, so many that its threads are whole warps, and 96 or more."""
        return 128 if self.row_threads == 1 else 64 if self.row_threads == 2 else 32

    @property
    def overlaps(self) -> bool:
        """Whether the kernel waits for the one ahead and lets the one behind start."""
        return self.pdl and dependent_launch(self.arch)


@dataclass(frozen=True)
class HashGateConfig:
    """One compiled kernel that looks experts up and weighs them by their products alone.

    spec: the router: hidden size, k, scoring (no softmax) and renormalisation. The number of
          experts is a run-time value and is not looked at.
    token_bits: 0 where there are no token ids, and row n of the table is that of token n.
    The other fields are those of `HashConfig`.
    """

    spec: RouterSpec
    arch: str
    token_bits: int = 64
    table_bits: int = 64
    pdl: bool = True
    extras: ExtrasSpec = PLAIN

    @property
    def chunks(self) -> int:
        """Pieces of a row that one load takes."""
        return self.spec.hidden_size // HIDDEN_MULTIPLE

    @property
    def steps(self) -> int:
        """Chunks of a thread."""
        # More sums, and more rows to point to, than FLIGHT take twice the registers a thread.
        most = MAX_GATE_THREADS if self.spec.top_k <= FLIGHT else MAX_GATE_THREADS // 2
        return -(-self.chunks // most)

    @property
    def threads(self) -> int:
        """Threads of a CTA, which has one token: whole warps."""
        return -(-self.chunks // (self.steps * WARP)) * WARP

    @property
    def slots(self) -> int:
        """Experts whose rows are on their way at once."""
        return min(self.spec.top_k, FLIGHT)

    @property
    def flight(self) -> int:
        """Chunks of a thread that are on their way at once."""
        return min(self.steps, max(1, FLIGHT // self.slots), MAX_FLIGHT_STEPS)

    @property
    def overlaps(self) -> bool:
        """Whether the kernel waits for the one ahead and lets the one behind start."""
        return self.pdl and dependent_launch(self.arch)


@dataclass(frozen=True)
class HashLogitsConfig:
    """One compiled kernel that looks experts up and weighs them by given logits.

    spec: the router: k, scoring and renormalisation; its sizes are run-time values.
    dtype: of the logits, "float32", "float16" or "bfloat16".
    The other fields are those of `HashGateConfig`.
    """

    spec: RouterSpec
    arch: str
    token_bits: int = 64
    table_bits: int = 64
    warps: int = 4  # tokens of a CTA
    dtype: str = "float32"
    extras: ExtrasSpec = PLAIN
