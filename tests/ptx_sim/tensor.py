"""What TMA and the tensor cores do: boxes of bf16 matrices, shared-memory descriptors, MMAs.

Layouts follow the PTX ISA: a 128-byte swizzle exchanges 16-byte pieces by XOR of address bits 4-6
with bits 7-9 of the absolute shared-memory address; a K-major operand is stored in atoms of 8 rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ptx_sim.errors import Misuse, OutOfBounds, Unsupported
from ptx_sim.memory import SHARED_BASE, WINDOW, Shared, Tmem

Watch = Callable[[np.ndarray], None]  # is told the words that an MMA reads, each once

K16 = 16  # depth of one MMA of bf16
VERSION_BLACKWELL = 1
# The swizzle field of a descriptor -> bytes of a row of its atom.
SWIZZLE_BLACKWELL = {0: 16, 2: 128, 4: 64, 6: 32}
SWIZZLE_HOPPER = {0: 16, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True, eq=False)
class TensorMap:
    """The meaning of a tensor map: a matrix of bf16 bits, and the box of one load.

    Rows are `columns` long, `matrix` may be wider; what is outside reads as zero.
    """

    name: str
    matrix: np.ndarray  # (rows, pitch) uint16
    columns: int
    box_rows: int
    box_columns: int = 64
    after_wait: bool = False  # written by the kernel ahead: not to be read before the grid wait

    @property
    def box_bytes(self) -> int:
        return 2 * self.box_rows * self.box_columns

    def box(self, column: int, row: int) -> np.ndarray:
        """The box whose first element is at (row, column)."""
        found = np.zeros((self.box_rows, self.box_columns), np.uint16)
        rows = slice(max(row, 0), max(min(row + self.box_rows, len(self.matrix)), 0))
        columns = slice(max(column, 0), max(min(column + self.box_columns, self.columns), 0))
        piece = self.matrix[rows, columns]
        if piece.size:
            top, left = rows.start - row, columns.start - column
            found[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
        return found

    def write(self, shared: Shared, address: int, box: np.ndarray) -> None:
        """Store a box in shared memory, with the 128-byte swizzle."""
        pitch = 2 * self.box_columns
        offset = shared.offset(address)
        if pitch != 128:
            raise Unsupported("a box whose rows are not 128 bytes")
        if offset % 128:
            raise Misuse(f"TMA to {address:#x}: not aligned to 128 bytes")
        if offset + self.box_bytes > 4 * shared.words.size:
            raise OutOfBounds(f"{shared.name}: TMA of {self.box_bytes} bytes to {address:#x}")
        bytes_ = np.arange(0, self.box_bytes, 2) + (address & ((1 << WINDOW) - 1))
        shared.halves[(swizzled(bytes_, 128) - SHARED_BASE) // 2] = box.ravel()


def swizzled(addresses: np.ndarray, row: int) -> np.ndarray:
    """Addresses under the swizzle of atoms with `row` bytes a row; 16: none."""
    return addresses ^ ((addresses >> 3) & (row - 16))


@dataclass(frozen=True)
class Operand:
    """A decoded shared-memory descriptor of a K-major operand."""

    start: int
    leading: int
    stride: int
    row: int  # bytes of a row of the swizzle atom

    @classmethod
    def decode(cls, bits: int, blackwell: bool) -> "Operand":
        """Read the fields; raise `Misuse` where they cannot be right."""
        if blackwell:
            swizzle, rows = bits >> 61, SWIZZLE_BLACKWELL
            if bits >> 46 & 7 != VERSION_BLACKWELL:
                raise Misuse(f"descriptor {bits:#x}: version {bits >> 46 & 7}, not 1")
        else:
            swizzle, rows = bits >> 62, SWIZZLE_HOPPER
        if swizzle not in rows:
            raise Unsupported(f"descriptor {bits:#x}: swizzle {swizzle}")
        if bits >> 49 & 7:
            raise Unsupported(f"descriptor {bits:#x}: a base offset")
        return cls(*((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32)), rows[swizzle])

    def read(self, shared: Shared, rows: int, watch: Watch | None = None) -> np.ndarray:
        """The rows of 16 elements, in fp32."""
        addresses = swizzled(pattern(self, rows) + self.start, self.row) - SHARED_BASE
        low, high = int(addresses.min()), int(addresses.max())
        if low < 0 or high >= 4 * shared.words.size:
            raise OutOfBounds(f"{shared.name}: an operand from {self.start:#x}")
        if watch is not None:
            watch(addresses[:, ::2].ravel() >> 2)
        return (shared.halves[addresses >> 1].astype(np.uint32) << 16).view(np.float32)


@lru_cache(maxsize=64)
def pattern(operand: Operand, rows: int) -> np.ndarray:
    """Offsets (rows, 16) of an operand's elements before the swizzle."""
    r, k = np.arange(rows)[:, None], 2 * np.arange(K16)[None, :]
    inside = r % 8 * operand.row + k % operand.row
    return inside + r // 8 * operand.stride + k // operand.row * operand.leading


@dataclass(frozen=True)
class MmaShape:
    """A decoded instruction descriptor of kind::f16, bf16 operands and fp32 sums."""

    M: int
    N: int

    @classmethod
    def decode(cls, bits: int) -> "MmaShape":
        wanted = {"D format": (4, 3, 1), "A format": (7, 7, 1), "B format": (10, 7, 1)}
        wanted |= {"sparsity": (0, 15, 0), "negation": (13, 3, 0), "transpose": (15, 3, 0)}
        wanted |= {"reserved bits": (23, 1, 0), "shift and reserved bits": (29, 7, 0)}
        for name, (at, mask, value) in wanted.items():
            if bits >> at & mask != value:
                raise Misuse(f"instruction descriptor {bits:#x}: {name} {bits >> at & mask}")
        M, N = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
        if M not in (64, 128) or not 8 <= N <= 256 or (M == 128 and N % 16):
            raise Misuse(f"instruction descriptor {bits:#x}: M={M}, N={N}")
        return cls(M, N)

    @property
    def lanes(self) -> np.ndarray:
        """The TMEM lane of each row: of 64 rows, 16 for each warp."""
        row = np.arange(self.M)
        return row if self.M == 128 else row // 16 * 32 + row % 16


def tcgen05_mma(
    shared: Shared,
    tmem: Tmem,
    address: int,
    a: int,
    b: int,
    bits: int,
    off: np.ndarray,
    add: bool,
    watch: Watch | None = None,
) -> None:
    """D = A B^T (+ D): D in TMEM at `address`, lanes whose bit of `off` is set are left alone."""
    shape, column, lane = MmaShape.decode(bits), address & 0xFFFF, address >> 16
    if lane not in ((0,) if shape.M == 128 else (0, 16)):
        raise Misuse(f"tcgen05.mma: accumulators from lane {lane}")
    tmem.check(column, shape.N)
    product = (
        Operand.decode(a, True).read(shared, shape.M, watch)
        @ Operand.decode(b, True).read(shared, shape.N, watch).T
    )
    rows = shape.lanes + lane
    D = tmem.words.view(np.float32)[:, column : column + shape.N]
    result = D[rows] + product if add else product
    enabled = (off[rows // 32] >> (rows % 32).astype(np.uint32) & 1) == 0
    D[rows[enabled]] = result[enabled]


def tmem_load(tmem: Tmem, shape: str, count: int, address: int, warp: int) -> tuple:
    """The registers of tcgen05.ld for a warp's 32 lanes."""
    lane, column = address >> 16, address & 0xFFFF
    steps = {"32x32b": (0,), "16x256b": (0, 16)}
    if shape not in steps:
        raise Unsupported(f"tcgen05.ld.{shape}")
    if lane - warp % 4 * 32 not in steps[shape]:
        raise Misuse(f"tcgen05.ld: warp {warp} cannot read from TMEM lane {lane}")
    t = np.arange(32)
    if shape == "32x32b":
        tmem.check(column, count)
        return tuple(tmem.words[lane + t, column + i] for i in range(count))
    tmem.check(column, 8 * count)
    first = column + t % 4 * 2
    return tuple(
        tmem.words[lane + t // 4 + 8 * half, first + 8 * i + j]
        for i in range(count)
        for half in (0, 1)
        for j in (0, 1)
    )


def wgmma(
    shared: Shared, a: int, b: int, n: int, warp: int, watch: Watch | None = None
) -> np.ndarray:
    """A warp's share (registers, 32) of the product of m64nNk16; N = n."""
    A = Operand.decode(a, False).read(shared, 64, watch)[warp % 4 * 16 :][:16]
    product = A @ Operand.decode(b, False).read(shared, n, watch).T
    t = np.arange(32)
    return np.stack(
        [
            product[t // 4 + 8 * half, t % 4 * 2 + 8 * i + j]
            for i in range(n // 8)
            for half in (0, 1)
            for j in (0, 1)
        ]
    )
