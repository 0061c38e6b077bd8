"""The sizes of `topk` and the kinds of scores that the tests of it run on.

A `Size` says what is compiled; its scores are of any kind in `SCORES`. The sizes are few, for each
may be a kernel, and the kinds many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch
from topk_oracle import BITS
from torch import Tensor

from cute_router.topk.radix import radix_config
from cute_router.topk.rows import serves

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I32, I64 = torch.int32, torch.int64
MANTISSA = {F32: 23, F16: 10, BF16: 7}  # bits
MANY = 5003  # rows: so many that few lanes share a row; they fill no CTA


@dataclass(frozen=True)
class Size:
    """A call of `topk`, but for its data."""

    rows: int
    L: int
    k: int
    dtype: torch.dtype = F32
    index: torch.dtype = I64
    lengths: torch.dtype | None = None
    padding: int = 0  # entries between rows
    offset: int = 0  # entries between an aligned address and the first row

    @property
    def id(self) -> str:
        """The size as pytest names it."""
        parts = [f"{self.rows}x{self.L}", f"k{self.k}", short(self.dtype)]
        if self.index is I32:
            parts.append("to-int32")
        if self.lengths is not None:
            parts.append(f"lengths-{short(self.lengths)}")
        if self.padding:
            parts.append(f"pad{self.padding}")
        if self.offset:
            parts.append(f"off{self.offset}")
        return "-".join(parts)


def short(dtype: torch.dtype) -> str:
    """A dtype's name."""
    return str(dtype).removeprefix("torch.")


def ids(size: Size) -> str:
    """For `pytest.mark.parametrize(..., ids=ids)`."""
    return size.id


# --- sizes --------------------------------------------------------------------------------------

# One kernel for each line: L and k are part of it, and whether there are many rows.
SHORT = [
    Size(37, 1, 1),
    Size(33, 7, 7),  # k = L, rows of odd lengths
    Size(5, 32, 32),
    Size(130, 33, 32, F16),
    Size(MANY, 64, 6),
    Size(MANY, 128, 8, BF16),
    Size(MANY, 129, 9, padding=2),
    Size(MANY, 144, 31),
    Size(3, 160, 32, lengths=I32),
    Size(1, 256, 6),
    Size(65, 256, 8, BF16),
    Size(MANY, 256, 6),
    Size(MANY, 256, 8, F16, I32),
    Size(MANY, 256, 8, lengths=I64),
    Size(7, 300, 17, offset=1),
    Size(64, 384, 6, index=I32),
    Size(MANY, 384, 6),
    Size(9, 513, 1),
    Size(6, 1000, 16),
    Size(12, 1023, 5, F16),
    Size(31, 1024, 32),
    Size(MANY, 1024, 32),
    Size(6, 1024, 32, BF16, I32, I64),
]
# Clusters of 1 to 16 CTAs, rows in registers and not, lists of every capacity, odd starts.
LONG = [
    Size(5, 33, 33),
    Size(1, 1025, 40),
    Size(3, 2000, 100),
    Size(1, 2048, 512),
    Size(2, 4096, 2048),
    Size(4, 4096, 4096),  # k = L
    Size(1, 8192, 512),
    Size(1, 16384, 1000),
    Size(2, 65536, 1),
    Size(1, 131072, 2048),
    Size(1, 1 << 20, 2048),
    Size(4, 32768, 2048),
    Size(32, 8192, 1024),
    Size(40, 50000, 700),
    Size(70, 3000, 6),
    Size(133, 5000, 4096),
    Size(256, 16384, 2048),
    Size(300, 1500, 50),
    Size(16, 1 << 20, 2048),
    Size(1, 131072, 2048, BF16),
    Size(8, 32768, 512, BF16, I32),
    Size(200, 2000, 64, BF16, lengths=I32),
    Size(1, 1 << 20, 4096, F16),
    Size(64, 4096, 300, F16, lengths=I64),
    Size(6, 20000, 2000, lengths=I64),
    Size(130, 1234, 77, index=I32, lengths=I32, padding=2),
    Size(1, 50000, 1500, lengths=I64),
    Size(2, 70001, 900),  # rows of odd lengths
    Size(3, 9999, 333, BF16, padding=3),
    Size(150, 1111, 111, offset=1),
    Size(1, 524287, 777, offset=1),
]


def variant(size: Size, seed: int) -> Size:
    """Another size that the same kernel serves, as far as one is soon found."""
    random = Random(f"{size.id} {seed}")
    if serves(size.L, size.k):
        fewest, most = (1, 2048) if size.rows <= 2048 else (2049, 2 * MANY)
        return replace(size, rows=random.randint(fewest, most))
    config = config_of_long(size)
    for _ in range(20):
        other = replace(
            size,
            rows=random.randint(1, size.rows),
            L=random.randint(max(size.L * 3 // 4, 33), size.L),
            k=random.randint(size.k // 2 + 1, size.k),
        )
        long = other.k <= other.L and not serves(other.L, other.k)
        if long and config_of_long(other) == config:
            return other
    return size


def is_vector(size: Size) -> bool:
    """Whether all rows start at multiples of 16 bytes."""
    row = (size.L + size.padding) * size.dtype.itemsize
    return size.offset == 0 and (size.rows == 1 or row % 16 == 0)


def config_of_long(size: Size) -> object:
    """What dispatch would choose on a Hopper GPU, whatever device there is."""
    return radix_config(
        size.rows,
        size.L,
        size.k,
        "sm_90a",
        dtype=short(size.dtype),
        index=short(size.index),
        lengths=None if size.lengths is None else short(size.lengths),
        vector=is_vector(size),
    )


# --- scores -------------------------------------------------------------------------------------


@dataclass
class Draw:
    """Random numbers of one call, and what the kinds below make of them."""

    size: Size
    device: str
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.shape = (self.size.rows, self.size.L)

    def normal(self) -> Tensor:
        """Standard normal fp32."""
        return torch.randn(self.shape, generator=self.generator, device=self.device)

    def integers(self, high: int, low: int = 0) -> Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, self.shape, generator=self.generator, device=self.device)

    def chance(self, p: float) -> Tensor:
        """True with probability p."""
        return torch.rand(self.shape, generator=self.generator, device=self.device) < p

    def full(self, value: float) -> Tensor:
        """The same number everywhere."""
        return torch.full(self.shape, value, device=self.device)

    def ramp(self) -> Tensor:
        """Numbers from -3 to 3 in rising order."""
        return torch.linspace(-3, 3, self.size.L, device=self.device).expand(self.shape)

    def floats(self, bits: Tensor) -> Tensor:
        """The floats of the size's dtype with these (lower) bits."""
        return bits.to(BITS[self.size.dtype]).view(self.size.dtype)

    def near(self, value: float, steps: int = 16) -> Tensor:
        """`value` and what follows it: floats that differ in their last bits only."""
        one = torch.tensor(value, dtype=self.size.dtype).view(BITS[self.size.dtype]).item()
        return self.floats(one + self.integers(steps))

    def nans(self) -> Tensor:
        """NaNs of both signs with any payload."""
        dtype = self.size.dtype
        exponent = torch.tensor(math.inf, dtype=dtype).view(BITS[dtype]).item()
        sign = self.integers(2) << (8 * dtype.itemsize - 1)
        return self.floats(exponent | sign | self.integers(1 << MANTISSA[dtype], low=1))

    def any_bits(self) -> Tensor:
        """Any floats that there are."""
        return self.floats(self.integers(1 << 8 * self.size.dtype.itemsize))

    def mixed(self, p: float, these: Tensor, others: Tensor) -> Tensor:
        """`these` with probability p, else `others`."""
        dtype = self.size.dtype
        return torch.where(self.chance(p), these.to(dtype), others.to(dtype))

    def share(self, part: float) -> float:
        """The probability of which about `part` of the k chosen ones come."""
        return min(1.0, part * self.size.k / self.size.L)

    def nibbles(self) -> Tensor:
        """Floats whose every run of 4 bits is all 0 or all 1: crowds at each digit of a search."""
        bits = torch.zeros(self.shape, dtype=I64, device=self.device)
        for place in range(2 * self.size.dtype.itemsize):
            bits |= (self.integers(2) * 15) << 4 * place
        return self.floats(bits)

    def slope(self) -> Tensor:
        """The best k together somewhere in the row: all in one CTA's part, or across a border."""
        start = self.integers(self.size.L)[:, :1]
        column = torch.arange(self.size.L, device=self.device)
        inside = (column - start) % self.size.L < self.size.k
        return torch.where(inside, self.normal() + 50, self.normal())


SCORES: dict[str, Callable[[Draw], Tensor]] = {
    "normal": Draw.normal,
    "all equal": lambda d: d.full(-1.5),
    "rising": Draw.ramp,
    "falling": lambda d: d.ramp().flip(1),
    "few values": lambda d: d.integers(3).float(),
    "zeros of both signs": lambda d: torch.where(d.chance(0.5), 0.0, -0.0),
    "infinities": lambda d: d.mixed(0.5, d.normal(), d.normal() * math.inf),
    "all -inf": lambda d: d.full(-math.inf),
    "one number among -inf": lambda d: d.mixed(1 / d.size.L, d.normal(), d.full(-math.inf)),
    "nan": Draw.nans,
    "nan among numbers": lambda d: d.mixed(d.share(0.5), d.nans(), d.normal()),
    "numbers among nan": lambda d: d.mixed(0.1, d.normal(), d.nans()),
    "any bits": Draw.any_bits,
    "subnormal": lambda d: d.floats(
        d.integers(1 << MANTISSA[d.size.dtype]) | d.integers(2) << (8 * d.size.dtype.itemsize - 1)
    ),
    "near ties": lambda d: d.near(1.0),
    "near ties below zero": lambda d: d.near(-1.0),
    "near ties among the chosen": lambda d: d.mixed(d.share(1.5), d.near(2.0), d.normal() - 9),
    "near ties at the edge": lambda d: d.mixed(d.share(0.5), d.normal() + 9, d.near(1.0, 4)),
    "ties at the edge": lambda d: d.mixed(d.share(0.5), d.normal() + 9, d.full(1.0)),
    "one power of two": lambda d: d.near(1.0, 1 << MANTISSA[d.size.dtype]),
    "crowded digits": Draw.nibbles,
    "the best together": Draw.slope,
    "huge": lambda d: d.normal() * 3e38,
}


def laid_out(size: Size, scores: Tensor) -> Tensor:
    """The scores [rows, L] as they lie in memory; what is around them is NaN, and ranks first."""
    stride = size.L + size.padding
    whole = torch.full(
        (size.offset + size.rows * stride,), math.nan, dtype=size.dtype, device=scores.device
    )
    view = whole[size.offset :].view(size.rows, stride)[:, : size.L]
    return view.copy_(scores)


def draw(size: Size, kind: str, device: str, seed: int = 0) -> Tensor:
    """Scores of one kind."""
    return laid_out(size, SCORES[kind](Draw(size, device, seed)).to(size.dtype))


def draw_mixed(size: Size, device: str, seed: int) -> Tensor:
    """Scores of three kinds: a row's neighbours are of other ones."""
    random = Random(f"{size.id} {seed}")
    scores = torch.empty(size.rows, size.L, dtype=size.dtype, device=device)
    for turn, kind in enumerate(random.sample(list(SCORES), k=3)):
        made = SCORES[kind](Draw(size, device, random.getrandbits(32)))
        scores[turn::3] = made[turn::3].to(size.dtype)
    return laid_out(size, scores)


def draw_lengths(size: Size, device: str, seed: int = 0) -> Tensor | None:
    """Lengths of all sorts for a size that has any: none, a few, about k, all, and no lengths."""
    if size.lengths is None:
        return None
    random = Random(f"{size.id} {seed}")
    info, L, k = torch.iinfo(size.lengths), size.L, size.k
    some = [0, 1, -1, k - 1, k, k + 1, L - 1, L, L + 1, info.min, info.max]
    lengths = [
        random.choice(some) if random.random() < 0.5 else random.randint(0, L)
        for _ in range(size.rows)
    ]
    return torch.tensor(lengths, dtype=size.lengths, device=device)
