"""Memories: arrays of 32-bit words behind addresses. Nothing outside them can be touched.

Shared memory appears at (rank << 24) + 1024 in every CTA of a cluster, so that an address of one
CTA is none of another. Each global array has a terabyte of addresses to itself.
"""

from collections import defaultdict
from functools import cached_property

import numpy as np

from ptx_sim.errors import Misuse, OutOfBounds
from ptx_sim.lanes import ALL
from ptx_sim.proxies import Proxies

SHARED_BASE = 1024
WINDOW = 24  # bits of an address within a CTA's shared memory
ARRAY = 40  # bits of an address within a global array
POISON = 0x7FFD7FFD  # a NaN, two of half the size, and as an index one of nothing


class Region:
    """Words from address `base` on, `size` bytes if not all; loads and stores by lanes."""

    def __init__(self, name: str, base: int, words: np.ndarray, size: int | None = None):
        self.name = name
        self.base = base
        self.words = words
        self.halves = words.view(np.uint16)
        self.bytes = words.view(np.uint8)
        self.size = words.nbytes if size is None else size

    def offsets(self, addresses: np.ndarray, m: np.ndarray, n: int) -> np.ndarray:
        """Where the n bytes at each address are; those of inactive lanes count for nothing."""
        kind = addresses.dtype.type
        offsets = addresses - kind(self.base)
        if m is not ALL and not m.all():
            offsets = np.where(m, offsets, kind(0))
        if np.bitwise_or.reduce(offsets) & kind(n - 1) or offsets.max() > self.size - n:
            raise OutOfBounds(
                f"{self.name}: {n} bytes at offsets {offsets.min():#x} to {offsets.max():#x}"
                f" of {self.size}: outside, or misaligned"
            )
        return offsets

    def index(self, addresses: np.ndarray, m: np.ndarray, n: int) -> np.ndarray:
        """The first of n words at each address."""
        offsets = self.offsets(addresses, m, 4 * n)
        return offsets >> offsets.dtype.type(2)

    def load(self, addresses: np.ndarray, m: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
        """n words for each active lane."""
        index = self.index(addresses, m, n)
        return tuple(self.words[index + index.dtype.type(i)] for i in range(n))

    def load_halves(self, addresses: np.ndarray, m: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
        """n times two bytes for each active lane."""
        index = self.offsets(addresses, m, 2 * n) >> addresses.dtype.type(1)
        return tuple(self.halves[index + index.dtype.type(i)] for i in range(n))

    def load_bytes(self, addresses: np.ndarray, m: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
        """n bytes for each active lane, each in a register of 16 bits."""
        index = self.offsets(addresses, m, n)
        return tuple(self.bytes[index + index.dtype.type(i)].astype(np.uint16) for i in range(n))

    def store_half(self, addresses: np.ndarray, m: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Two bytes of each active lane; returns the word of each lane."""
        offsets = self.offsets(addresses, m, 2)
        self.halves[offsets[m] >> offsets.dtype.type(1)] = value[m].astype(np.uint16)
        return offsets >> offsets.dtype.type(2)

    def store_byte(self, addresses: np.ndarray, m: np.ndarray, value: np.ndarray) -> np.ndarray:
        """The lowest byte of each active lane; returns the word of each lane."""
        offsets = self.offsets(addresses, m, 1)
        self.bytes[offsets[m]] = value[m].astype(np.uint8)
        return offsets >> offsets.dtype.type(2)

    def store(
        self, addresses: np.ndarray, m: np.ndarray, values: tuple[np.ndarray, ...]
    ) -> np.ndarray:
        """len(values) words of each active lane; where lanes collide, the last wins.

        Returns the first word of each lane.
        """
        index = self.index(addresses, m, len(values))
        whole = m is ALL or m.all()
        for i, value in enumerate(values):
            at = index + index.dtype.type(i)
            if whole:
                self.words[at] = value
            else:
                self.words[at[m]] = value[m]
        return index


class Shared(Region):
    """The shared memory of a CTA, poisoned."""

    def __init__(self, rank: int, size: int):
        words = np.full(-(-size // 16) * 4, POISON, np.uint32)
        super().__init__(f"shared memory of CTA {rank}", (rank << WINDOW) + SHARED_BASE, words)
        self.proxies = Proxies(self.name, words.size)

    def store_generic(
        self,
        addresses: np.ndarray,
        m: np.ndarray,
        values: tuple[np.ndarray, ...],
        writers: np.ndarray,
        now: int,
    ) -> np.ndarray:
        """`store` by threads, at time `now`."""
        index = self.store(addresses, m, values)
        self.proxies.stored(index[m], len(values), writers[m], now)
        return index

    def store_narrow(
        self,
        opcode: str,
        addresses: np.ndarray,
        m: np.ndarray,
        value: np.ndarray,
        writers: np.ndarray,
        now: int,
    ) -> None:
        """The same for a byte, or two, of each lane."""
        store = self.store_byte if opcode.endswith(".b8") else self.store_half
        self.proxies.stored(store(addresses, m, value)[m], 1, writers[m], now)

    def span(self, address: int, size: int) -> slice:
        """The words of `size` bytes from an address of this CTA."""
        first = self.offset(address) // 4
        return slice(first, first + size // 4)

    def offset(self, address: int) -> int:
        """The place in this memory of an address of this CTA."""
        offset = address - self.base
        if not 0 <= offset < 4 * self.words.size:
            raise OutOfBounds(f"{self.name}: address {address:#x}")
        return offset


class GlobalArray(Region):
    """A global array. Polls that wait for a packet of 16 bytes are woken when it is stored."""

    def __init__(self, name: str, number: int, words: np.ndarray, size: int | None):
        super().__init__(name, number << ARRAY, words, size)
        self.versions = np.zeros(words.size // 4 + 1, np.int64)
        self.polls: dict[int, list[Poll]] = defaultdict(list)

    def store(
        self, addresses: np.ndarray, m: np.ndarray, values: tuple[np.ndarray, ...]
    ) -> np.ndarray:
        index = super().store(addresses, m, values)
        packets = index[m] >> index.dtype.type(2)
        self.versions[packets] += 1
        if self.polls:
            for packet in packets.tolist():
                for poll in self.polls.pop(packet, ()):
                    poll.wake()
        return index


class Poll:
    """A warp that found nothing new where it looked, and looks again after a store there."""

    def __init__(self, array: GlobalArray, packets: np.ndarray):
        self.array, self.packets = array, packets
        self.stamp = array.versions[packets].tobytes()
        self.waiters: list = []

    def ready(self) -> bool:
        return self.array.versions[self.packets].tobytes() != self.stamp

    def register(self, warp) -> None:
        self.waiters = [warp]
        for packet in set(self.packets.tolist()):
            self.array.polls[packet].append(self)

    def wake(self) -> None:
        for warp in self.waiters:
            warp.machine.wake(warp)
        self.waiters = []

    def __str__(self) -> str:
        return f"polls {self.array.name}, packets {sorted(set(self.packets.tolist()))[:8]}"


class GlobalMemory:
    """The arrays of a launch."""

    def __init__(self) -> None:
        self.arrays: dict[int, GlobalArray] = {}

    def add(self, name: str, words: np.ndarray, size: int | None = None) -> int:
        """Make an array reachable, or only its first `size` bytes; its address."""
        number = len(self.arrays) + 1
        self.arrays[number] = GlobalArray(name, number, words, size)
        return number << ARRAY

    def array(self, addresses: np.ndarray, m: np.ndarray) -> GlobalArray:
        """The array that the active lanes address."""
        first = int(addresses[m.argmax()])
        found = self.arrays.get(first >> ARRAY)
        if found is None:
            raise OutOfBounds(f"global address {first:#x} is in no array")
        return found


class Tmem:
    """The tensor memory of a CTA: 128 lanes of 512 columns, poisoned; columns are allocated."""

    LANES, COLUMNS = 128, 512

    def __init__(self, first_column: int):
        self.next = first_column  # as if another CTA of the SM held those before
        self.allocated: dict[int, int] = {}
        self.relinquished = False

    @cached_property
    def words(self) -> np.ndarray:
        return np.full((self.LANES, self.COLUMNS), 0xFFFFFFFF, np.uint32)

    def allocate(self, columns: int) -> int:
        """The first of `columns` new columns."""
        if self.relinquished:
            raise Misuse("tcgen05.alloc after tcgen05.relinquish_alloc_permit")
        if columns < 32 or columns & (columns - 1) or self.next + columns > self.COLUMNS:
            raise Misuse(f"tcgen05.alloc of {columns} columns")
        first, self.next = self.next, self.next + columns
        self.allocated[first] = columns
        return first

    def free(self, first: int, columns: int) -> None:
        """Give columns back, all of one allocation."""
        if self.allocated.pop(first, None) != columns:
            raise Misuse(f"tcgen05.dealloc of {columns} columns from {first}: not so allocated")
        self.words[:, first : first + columns] = 0xFFFFFFFF

    def check(self, first: int, columns: int) -> None:
        """Raise unless the columns are allocated."""
        for start, size in self.allocated.items():
            if start <= first and first + columns <= start + size:
                return
        raise Misuse(f"TMEM columns {first} to {first + columns - 1} are not allocated")
