"""The 32 lanes of a warp as NumPy arrays: types, constants, and PTX's own arithmetic."""

import numpy as np

Lanes = np.ndarray  # one value for each lane
WARP = 32
ALL = np.ones(WARP, bool)  # tested by identity: every lane is active
LANES = np.arange(WARP, dtype=np.uint32)
BITS = np.uint32(1) << LANES  # of each in a mask
ALL.flags.writeable = LANES.flags.writeable = BITS.flags.writeable = False

DTYPES = {
    "p": np.dtype(bool),
    "u1": np.dtype(np.uint8),
    "i1": np.dtype(np.int8),
    "u2": np.dtype(np.uint16),
    "i2": np.dtype(np.int16),
    "u4": np.dtype(np.uint32),
    "i4": np.dtype(np.int32),
    "f4": np.dtype(np.float32),
    "u8": np.dtype(np.uint64),
    "i8": np.dtype(np.int64),
}
# A 16-bit float's bits as fp32, which is exact.


def mask(m: Lanes) -> int:
    """The active lanes as bits."""
    return int(np.packbits(m, bitorder="little").view(np.uint32)[0])


def register_type(name: str) -> str:
    """The type a register's value is kept in: unsigned, of its width; its prefix tells."""
    for prefix, kind in (("%rd", "u8"), ("%rs", "u2"), ("%p", "p"), ("%r", "u4")):
        if name.startswith(prefix):
            return kind
    raise ValueError(name)


def poison(name: str) -> np.ndarray:
    """What a register holds before it is written: a NaN, or an address that is nowhere."""
    kind = register_type(name)
    return np.zeros(WARP, bool) if kind == "p" else constant(-1, kind)


def constant(value: int, kind: str) -> np.ndarray:
    """All lanes hold the bits of `value`."""
    dtype = DTYPES[kind]
    if kind == "p":
        return np.full(WARP, value != 0)
    bits = value & ((1 << 8 * dtype.itemsize) - 1)
    return np.full(WARP, bits, f"u{dtype.itemsize}").view(dtype)


def flush(a: np.ndarray) -> np.ndarray:
    """.ftz: subnormals become zeros of their sign."""
    return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a)


def ex2(a: np.ndarray) -> np.ndarray:
    """ex2.approx.ftz.f32, to fp32's precision."""
    return flush(np.exp2(flush(a)))


def rcp(a: np.ndarray) -> np.ndarray:
    """rcp.approx.ftz.f32, to fp32's precision."""
    return flush(np.float32(1) / flush(a))


def sqrt(a: np.ndarray) -> np.ndarray:
    """sqrt.approx.ftz.f32, to fp32's precision."""
    return flush(np.sqrt(flush(a)))


def canonical(a: np.ndarray) -> np.ndarray:
    """A new array, in which every NaN becomes the one that fp32 arithmetic results in."""
    a.view(np.uint32)[a != a] = 0x7FFFFFFF
    return a


def f16(bits: np.ndarray) -> np.ndarray:
    """The fp16 numbers of these bits, in fp32."""
    return bits.view(np.float16).astype(np.float32)


def bf16(bits: np.ndarray) -> np.ndarray:
    """The bf16 numbers of these bits, in fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(a: np.ndarray) -> np.ndarray:
    """cvt.rn.bf16.f32: the bits of the nearest bf16, of two the even one; one NaN for all."""
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(a != a, np.uint32(0x7FFF), rounded).astype(np.uint16)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """The bitwise function whose value for bits a, b, c is bit 4a + 2b + c of the table."""
    found = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn.f32: the product is exact in fp64 (its sum rounds twice, which ties may show)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    """clz.b32"""
    return np.array([32 - int(v).bit_length() for v in a], np.uint32)


def funnel(low: np.ndarray, upper: np.ndarray, count: np.ndarray) -> np.ndarray:
    """shf.l.wrap.b32: the upper word of both, shifted left."""
    wide = (upper.astype(np.uint64) << np.uint64(32)) | low
    return (wide << (count & np.uint32(31)).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def permute(low: np.ndarray, upper: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32: four of the eight bytes of both words, or, where bit 3 of a selector's digit is
    set, eight times the sign of one."""
    wide = (upper.astype(np.uint64) << np.uint64(32)) | low
    result = np.zeros_like(low)
    for i in range(4):
        digit = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (wide >> (8 * (digit & 7)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        byte = np.where(digit > 7, (byte >> np.uint32(7)) * np.uint32(255), byte)
        result |= byte << np.uint32(8 * i)
    return result


def dot_halves(halves: np.ndarray, bytes_: np.ndarray, first: int) -> np.ndarray:
    """dp2a: both halves of a word times two bytes of another, from bit `first` on."""
    low, high = (bytes_ >> np.uint32(bit) & np.uint32(0xFF) for bit in (first, first + 8))
    return (halves & np.uint32(0xFFFF)) * low + (halves >> np.uint32(16)) * high


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b of 32-bit integers, rounded towards zero; 0 for b = 0, of which PTX says nothing."""
    safe = np.where(b == 0, 1, b)
    return np.where(b == 0, 0, np.trunc(a / safe.astype(np.float64))).astype(a.dtype)


def high(a: np.ndarray, b: np.ndarray, wide: str) -> np.ndarray:
    """The upper half of the product of two values of half the width of `wide`."""
    if a.dtype.itemsize == 8:  # twice that NumPy has not
        return np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], a.dtype)
    product = a.astype(wide) * b.astype(wide)
    return (product >> product.dtype.type(4 * product.dtype.itemsize)).astype(a.dtype)


def halves(value: np.ndarray) -> tuple[np.ndarray, ...]:
    """The lower and upper word of 64 bits, or a word by itself."""
    if value.dtype.itemsize == 4:
        return (value,)
    return value.astype(np.uint32), (value >> np.uint64(32)).astype(np.uint32)


def pair(low: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """mov d, {low, upper} of a register twice as wide"""
    wide = np.dtype(f"u{2 * low.itemsize}").type
    return low.astype(wide) | (upper.astype(wide) << wide(8 * low.itemsize))
