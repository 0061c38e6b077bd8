"""Sorting networks over values in a thread's registers: no branch, no index of run time.

    sort    a list, best first (Batcher's odd-even merge sort)
    merge   two sorted lists, best first (a bitonic merge)

Lists are Python lists of Uint32 or Float32, worked on while the kernel is traced. What is never
looked at of a sorted list costs nothing: the compiler drops it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Uint32

Order = tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]  # the greater, the lesser


@cute.jit
def greater(a: Uint32, b: Uint32) -> Uint32:
    """The larger of two words."""
    return cute.arch.inline_ptx(
        "max.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b]
    )


@cute.jit
def less(a: Uint32, b: Uint32) -> Uint32:
    """The smaller of two words."""
    return cute.arch.inline_ptx(
        "min.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b]
    )


@cute.jit
def larger(a: Float32, b: Float32) -> Float32:
    """The larger of two numbers, or the number beside a NaN."""
    return cute.arch.inline_ptx(
        "max.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b]
    )


@cute.jit
def smaller(a: Float32, b: Float32) -> Float32:
    """The smaller of two numbers, or the number beside a NaN."""
    return cute.arch.inline_ptx(
        "min.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b]
    )


WORDS: Order = (greater, less)
NUMBERS: Order = (larger, smaller)


def sort(values: list[Any], order: Order) -> list[Any]:
    """`values`, as many as a power of two, in descending order."""
    values, (most, least) = list(values), order
    for i, j in _odd_even_pairs(len(values)):
        values[i], values[j] = most(values[i], values[j]), least(values[i], values[j])
    return values


def merge(ours: list[Any], theirs: list[Any], order: Order) -> list[Any]:
    """Two sorted lists, of one length, a power of two, as one."""
    values, (most, least) = ours + theirs[::-1], order
    apart = len(ours)
    while apart:
        for i in range(len(values)):
            if i & apart == 0:
                j = i + apart
                values[i], values[j] = most(values[i], values[j]), least(values[i], values[j])
        apart //= 2
    return values


def _odd_even_pairs(n: int) -> Iterator[tuple[int, int]]:
    """The comparisons of Batcher's network for n words, in an order in which they can be made."""
    run = 1
    while run < n:  # runs of this length are sorted, and are merged in pairs
        distance = run
        while distance:
            for first in range(distance % run, n - distance, 2 * distance):
                for i in range(first, min(first + distance, n - distance)):
                    if i // (2 * run) == (i + distance) // (2 * run):
                        yield i, i + distance
            distance //= 2
        run *= 2
