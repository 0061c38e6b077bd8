"""Configurations of the selection kernels."""

from dataclasses import dataclass
from typing import Any

from cute_router.extras import PLAIN, ExtrasSpec
from cute_router.spec import RouterSpec

WARP = 32
BLOCK = 8  # entries that a lane takes at once
MAX_ROW = 1024  # entries of a row that a few lanes hold in registers
MAX_ROW_TOP_K = 32
MAX_ENTRIES = 48  # of a row, that a lane holds in registers
LIST = 16  # entries of a row's list, at least


def dsl_type(name: str) -> Any:
    """The DSL's type of a torch dtype's name."""
    import cutlass

    return getattr(cutlass, {"bfloat16": "BFloat16"}.get(name, name.capitalize()))


def run_of(dtype: str) -> int:
    """Entries of 16 bytes."""
    return 4 if dtype == "float32" else 8


def dtype_name(dtype: Any) -> str:
    """A torch dtype's name, as configurations hold it."""
    return str(dtype).removeprefix("torch.")


def row_shape(rows: int, length: int) -> tuple[int, int]:
    """Lanes for each of up to `rows` rows of scores, and warps of a CTA.

    Fewer lanes exchange less; more hide the latency of memory while there are few rows. (H200,
    L = 256 and 384: docs/perf_log.md.)
    """
    lanes = 32 if rows <= 2048 else 8
    return fitted(lanes, length), 2 if rows <= 2048 else 4


def gate_shape(rows: int, length: int) -> tuple[int, int]:
    """The same for logits, which take more work for each entry."""
    if rows <= 256:
        lanes, warps = 32, 1
    elif rows <= 2048:
        lanes, warps = 16, 1
    elif rows <= 16384:
        lanes, warps = 16, 8
    else:
        lanes, warps = 8, 4
    return fitted(lanes, length), warps


def at_most(lanes: int, length: int) -> int:
    """So many lanes, or fewer where some would have no entry."""
    while lanes > 4 and lanes * BLOCK >= 2 * length:
        lanes //= 2
    return lanes


def fitted(lanes: int, length: int, room: int = MAX_ENTRIES) -> int:
    """`at_most` so many lanes, but more where one has not `room` for its entries."""
    lanes = at_most(lanes, length)
    while lanes * room < length:
        lanes *= 2
    return lanes


def width(top_k: int) -> int:
    """Entries of a row that `topk.sieve` sorts: k, or more."""
    return 1 << (top_k - 1).bit_length()


def capacity(top_k: int) -> int:
    """Entries that it has room for on the list of those that may be among the k best."""
    return max(2 * width(top_k), LIST)


def dependent_launch(arch: str) -> bool:
    """Whether a target knows programmatic dependent launch."""
    return not arch.startswith("sm_8")


@dataclass(frozen=True)
class GateConfig:
    """One compiled gate kernel: the router's step on given logits.

    spec:   the router; its hidden size is not looked at.
    arch:   the compile target.
    dtype:  of the logits, "float32", "float16" or "bfloat16".
    vector: whether rows are whole runs of 16 bytes and start at multiples of them.
    lanes:  of a warp, for each token; 32 unless `by_threshold`.
    warps:  of a CTA.
    pdl:    launched under programmatic dependent launch, where the target knows it.
    extras: what calls have beside the defaults.
    """

    spec: RouterSpec
    arch: str
    dtype: str = "float32"
    vector: bool = True
    lanes: int = 32
    warps: int = 4
    pdl: bool = True
    extras: ExtrasSpec = PLAIN

    @property
    def run(self) -> int:
        """Neighbouring logits that a lane copies at once."""
        return run_of(self.dtype)

    @property
    def overlaps(self) -> bool:
        """Whether the kernel waits for the one ahead and lets the one behind start."""
        return self.pdl and dependent_launch(self.arch)

    @property
    def by_threshold(self) -> bool:
        """Whether a threshold decides. Softmax and groups need every logit of a token."""
        return self.spec.scores_are_independent


@dataclass(frozen=True)
class RowsConfig:
    """One compiled kernel for the k best of short rows.

    length:  L, entries of a row.
    top_k:   k.
    dtype:   of the scores, "float32", "float16" or "bfloat16".
    arch:    the compile target.
    index:   of the returned indices, "int64" or "int32".
    lengths: of the rows' valid lengths, "int64" or "int32"; None where every row is whole.
    vector:  whether rows are whole runs of 16 bytes and start at multiples of them.
    lanes:   of a warp, for each row.
    warps:   of a CTA.
    pdl:     launched under programmatic dependent launch, where the target knows it.
    """

    length: int
    top_k: int
    dtype: str
    arch: str
    index: str = "int64"
    lengths: str | None = None
    vector: bool = True
    lanes: int = 32
    warps: int = 4
    pdl: bool = True

    @property
    def run(self) -> int:
        """Neighbouring scores that a lane copies at once."""
        return run_of(self.dtype)

    @property
    def overlaps(self) -> bool:
        """Whether the kernel waits for the one ahead and lets the one behind start."""
        return self.pdl and dependent_launch(self.arch)
