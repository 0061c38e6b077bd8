"""Where a kernel's results go, and what `cute_router.extras` adds to them.

    slot (token, j)   weights[token, j], ids[token, j]   or one word of both
    no token          -1, 0 in all slots
    logits            as they were summed

What a launch does not have is None here, and no code comes of it.
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int16, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_tensor

from cute_router.extras import ExtrasSpec


class Extra(NamedTuple):
    """The tensors of a launch's extras, as `Extras.arguments` has them."""

    mNumValid: Any  # (1) int32
    mValid: Any  # (N) bytes
    mSecondBias: Any  # (E) fp32
    mSecondMask: Any  # (N) bytes
    mMap: Any  # (E) int32
    mLogits: Any  # (N, E) fp32
    shared_weight: Any  # fp32


class Outputs(NamedTuple):
    """Where the results go, and the run-time value that scales them."""

    mWeights: Any  # (N, k + shared) fp32; None where ids are packed words
    mIds: cute.Tensor  # (N, k + shared) int32 or int64
    factor: Float32
    extra: Any  # Extra, or None

    def of_row(self, token: Any) -> "Outputs":
        """The same with the row of one token for weights and ids."""
        mWeights = None if self.mWeights is None else self.mWeights[token, None]
        return self._replace(mWeights=mWeights, mIds=self.mIds[token, None])

    def masks(self) -> bool:
        """Whether some rows may be no tokens."""
        extra = self.extra
        return extra is not None and (extra.mNumValid is not None or extra.mValid is not None)


def extra_of(arguments: tuple[Any, ...]) -> Extra | None:
    """What stands behind a kernel's other arguments."""
    return Extra(*arguments[0]) if arguments else None


def is_token(out: Outputs, token: Int32) -> Any:
    """Whether row `token` < N is a token; None where all are. Read behind the wait.

    Call it early: a load takes longer than what it would be the first to hold up.
    """
    return _is_token(out.extra, token) if out.masks() else None


@cute.jit
def _is_token(extra: Extra, token: Int32) -> Boolean:
    real = Boolean(True)
    if cutlass.const_expr(extra.mNumValid is not None):
        real = token < extra.mNumValid[0]
    if cutlass.const_expr(extra.mValid is not None):
        real = real and extra.mValid[token] != Uint8(0)
    return real


def bias_of_row(sBias: Any, out: Outputs, token: Int32) -> Any:
    """The bias of a token's row, of one or of two (expert, which) in shared memory."""
    if out.extra is None or out.extra.mSecondMask is None:
        return sBias
    return sBias[None, second_bias(out, token)]


def second_bias(out: Outputs, token: Int32) -> Int32:
    """1 where row `token` < N has the second bias, else 0. Read behind the wait."""
    return Int32(out.extra.mSecondMask[token] != Uint8(0))


@cute.jit
def put_biases(
    sBias: cute.Tensor, mBias: Any, extra: Extra, E: cutlass.Constexpr, tid: Int32, threads: int
) -> None:
    """Both biases to shared memory (expert, which)."""
    expert = tid
    while expert < E:
        sBias[expert, 0] = Float32(0.0)
        if cutlass.const_expr(mBias is not None):
            sBias[expert, 0] = mBias[expert]
        sBias[expert, 1] = extra.mSecondBias[expert]
        expert = expert + threads


@cute.jit
def physical(out: Outputs, expert: Int32) -> Int32:
    """The id of a routed expert in [0, E), as it is returned; -1 stays."""
    name = expert
    if cutlass.const_expr(out.extra is not None and out.extra.mMap is not None):
        if expert >= 0:
            name = out.extra.mMap[expert]
    return name


@cute.jit
def put_slot(out: Outputs, at: Any, name: Int32, share: Float32, real: Any) -> None:
    """Write the slot at coordinate `at`; `real` is what `is_token` says of its row."""
    if cutlass.const_expr(real is not None):
        share = cutlass.select_(real, share, Float32(0.0))
        name = cutlass.select_(real, name, Int32(-1))
    if cutlass.const_expr(out.mWeights is None):
        lower = Float32(share).to(BFloat16).bitcast(Int16).to(Int32) & Int32(0xFFFF)
        out.mIds[at] = (name << 16) | lower
    else:
        out.mWeights[at] = share
        out.mIds[at] = Int32(name).to(out.mIds.element_type)


@cute.jit
def put_shared(
    out: Outputs, k: cutlass.Constexpr, E: Int32, lane: Int32, lanes: cutlass.Constexpr, real: Any
) -> None:
    """Write the slots behind the k-th of a row (`of_row`); `lanes` lanes share them."""
    shared = cute.size(out.mIds) - k
    for first in cutlass.range_constexpr(0, shared, lanes):
        slot = first + lane
        if slot < shared:
            put_slot(out, k + slot, E + slot, out.extra.shared_weight, real)


@cute.jit
def put_logit(out: Outputs, token: Int32, expert: Int32, logit: Float32) -> None:
    """Write one logit."""
    mLogits = out.extra.mLogits
    (mLogits.iterator + (Int64(token) * mLogits.shape[1] + expert)).store(logit)


@cute.jit
def put_logits(out: Outputs, token: Int32, sRow: cute.Tensor, lane: Int32, lanes: int) -> None:
    """Write a token's logits, which lie in shared memory; `lanes` lanes share them."""
    if cutlass.const_expr(out.extra is not None and out.extra.mLogits is not None):
        for expert in cutlass.range(lane, out.extra.mLogits.shape[1], lanes):
            put_logit(out, token, expert, sRow[expert])


# --- stand-ins for `cute.compile` -----------------------------------------------------------------


def fake_results(N, k: int, spec: ExtrasSpec, vector: int = 1) -> tuple[Any, Any]:
    """Weights and ids (N, k + shared), which start at a multiple of `vector` elements."""
    columns = k + spec.shared

    def matrix(dtype):
        align = vector * dtype.width // 8
        return make_fake_tensor(dtype, (N, columns), (columns, 1), assumed_align=align)

    ids = matrix({"int32": Int32, "int64": Int64}[spec.ids])
    return (None if spec.packed else matrix(Float32)), ids


def fake_extra(N, E, spec: ExtrasSpec) -> tuple[Extra, ...]:
    """What `Extras.arguments` gives."""
    if not spec.has_arguments:
        return ()

    def vector(dtype, length):
        return make_fake_tensor(dtype, (length,), (1,), assumed_align=dtype.width // 8)

    logits = make_fake_tensor(Float32, (N, E), (E, 1), assumed_align=4) if spec.logits else None
    return (
        Extra(
            vector(Int32, 1) if spec.num_valid else None,
            vector(Uint8, N) if spec.valid else None,
            vector(Float32, E) if spec.second_bias else None,
            vector(Uint8, N) if spec.second_bias else None,
            vector(Int32, E) if spec.expert_map else None,
            logits,
            Float32(1.0) if spec.shared else None,
        ),
    )
