"""Loads, stores and atomics, of shared memory, a peer's too, of global memory and of parameters."""

from functools import partial

import numpy as np

from ptx_sim import lanes
from ptx_sim.errors import Hazard, Misuse, Unsupported
from ptx_sim.lanes import Lanes
from ptx_sim.memory import WINDOW, Poll, Region
from ptx_sim.proxies import STRANGERS
from ptx_sim.races import Words
from ptx_sim.tensor import TensorMap
from ptx_sim.warp import Warp


def load_param(warp: Warp, name: str, offset: int, size: int) -> Lanes:
    value = warp.machine.params[name]
    if isinstance(value, TensorMap):
        raise Misuse(f"the tensor map {value.name} is opaque")
    return lanes.constant(int.from_bytes(value[offset : offset + size], "little"), f"u{size}")


def load_shared(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
    warp.line = line
    found = loaded(opcode, warp.cta.shared, address, m)
    if warp.machine.races and m.any():
        warp.cta.history.reads(warp.access(), shared_words(warp.cta, opcode, address, m))
    return found


def store_shared(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, value) -> tuple:
    warp.line = line
    narrow = opcode.endswith((".b8", ".b16"))
    if not m.any():
        return ()
    writers, now = warp.threads, warp.tick()
    if narrow:
        warp.cta.shared.store_narrow(opcode, address, m, value, writers, now)
    else:
        warp.cta.shared.store_generic(address, m, stored(opcode, value), writers, now)
    if warp.machine.races:
        words = shared_words(warp.cta, opcode, address, m)
        warp.cta.history.writes(warp.access(), words, narrow)
    return ()


def store_peer(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, value) -> tuple:
    warp.line = line
    for cta, active in peers(warp, address, m):
        words = stored(opcode, value)
        cta.shared.store_generic(address, active, words, STRANGERS, warp.tick())
        if warp.machine.races:
            cta.history.writes(warp.access(), shared_words(cta, opcode, address, active))
    return ()


def mapa(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, rank: Lanes) -> tuple:
    warp.line = line
    if (rank[m] >= warp.machine.cluster_size).any():
        raise Misuse(f"mapa to CTA {rank[m].max()} of {warp.machine.cluster_size}")
    offset = address & np.uint32((1 << WINDOW) - 1)
    return (offset | rank << np.uint32(WINDOW),)


def load_global(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
    warp.line = line
    if not m.any():
        raise Unsupported(f"{opcode} by no lane")
    return loaded(opcode, global_array(warp, address, m), address, m)


def store_global(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, value) -> tuple:
    warp.line = line
    if not m.any():
        return ()
    array = global_array(warp, address, m)
    if opcode.endswith(".b16"):
        array.store_half(address, m, value)
        return ()
    values = stored(opcode, value)
    array.index(address, m, len(values))  # bounds and alignment of the whole
    if ".relaxed." not in opcode:
        array.store(address, m, values)
        return ()
    for i, word in enumerate(values):  # others see each word on its own, in any order
        at = address + np.uint64(4 * i)
        warp.machine.engine.submit(partial(array.store, at, m, (word,)))
    return ()


def poll(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes) -> Poll | None:
    """The same load again, of what nobody has stored to since, waits for a store."""
    warp.line = line
    array = global_array(warp, address, m)
    packets = (address[m] - np.uint64(array.base)) >> np.uint64(4)
    if packets.max() >= len(array.versions):
        return None  # out of bounds: the load will say so
    poll = Poll(array, packets)
    key = (line, packets.tobytes(), poll.stamp)
    again, warp.last_poll = key == warp.last_poll, key
    return poll if again else None


# --- atomics -------------------------------------------------------------------------------------


def atomic_add(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, value: Lanes) -> tuple:
    warp.line = line
    old = np.zeros(lanes.WARP, np.uint32)
    shared = warp.cta.shared
    index = shared.index(address, m, 1)
    for lane in np.flatnonzero(m):
        old[lane] = shared.words[index[lane]]
        shared.words[index[lane]] += value[lane]
    return (old,)


def atomic_inc(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, last: Lanes) -> tuple:
    warp.line = line
    old = np.zeros(lanes.WARP, np.uint32)
    array = warp.machine.memory.array(address, m)  # a ticket may be drawn before the wait
    for lane in np.flatnonzero(m):
        one = np.equal(lanes.LANES, lane)
        (words,) = array.load(address, one, 1)
        old[lane] = words[lane]
        new = 0 if old[lane] >= last[lane] else old[lane] + 1
        array.store(address, one, (np.full(lanes.WARP, new, np.uint32),))
    return (old,)


def reduce_add(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, value: Lanes) -> tuple:
    warp.line = line
    for cta, active in peers(warp, address, m):
        index = cta.shared.index(address, active, 1)
        np.add.at(cta.shared.words, index[active], value[active])
    return ()


# --- what they share -----------------------------------------------------------------------------


def word_count(opcode: str) -> int:
    """Words of 32 bits that a load or store moves for each lane."""
    parts = opcode.split(".")
    size = {"b32": 1, "u32": 1, "s32": 1, "f32": 1, "b64": 2}.get(parts[-1])
    if size is None:
        raise Unsupported(opcode)
    return size * vector_size(opcode)


def vector_size(opcode: str) -> int:
    """Elements that a load or store moves for each lane."""
    vector = opcode.split(".")[-2]
    return int(vector[1]) if vector in ("v2", "v4") else 1


def shared_words(cta, opcode: str, address: Lanes, m: Lanes) -> Words:
    """The words of a CTA's shared memory that a load or store touches."""
    size = vector_size(opcode) * int(opcode.rsplit(".", 1)[1][1:]) // 8
    first = (address - np.uint32(cta.shared.base)) >> np.uint32(2)
    return Words.of(first, max(1, size // 4), m)


def loaded(opcode: str, region: Region, address: Lanes, m: Lanes) -> tuple:
    """What a load gets, one array for each destination."""
    if opcode.endswith((".b8", ".b16")):
        count = vector_size(opcode)
        load = region.load_bytes if opcode.endswith(".b8") else region.load_halves
        return load(address, m, count)
    words = region.load(address, m, word_count(opcode))
    if not opcode.endswith(".b64"):
        return words
    return tuple(lanes.pair(*words[i : i + 2]) for i in range(0, len(words), 2))


def stored(opcode: str, value) -> tuple:
    """The words that a store writes."""
    values = value if isinstance(value, tuple) else (value,)
    words = tuple(word for v in values for word in lanes.halves(v))
    if len(words) != word_count(opcode):
        raise Unsupported(opcode)
    return words


def peers(warp: Warp, address: Lanes, m: Lanes):
    """The CTAs that the lanes address, each with the lanes that do."""
    ranks = address >> np.uint32(WINDOW)
    for rank in set(ranks[m].tolist()):
        active = m & (ranks == rank)
        cta = warp.cta.cluster.cta(int(address[active.argmax()]))
        cta.alive(f"{warp} reaches into its shared memory")
        yield cta, active


def global_array(warp: Warp, address: Lanes, m: Lanes):
    """The global array that the lanes address, if they may touch it already."""
    array = warp.machine.memory.array(address, m)
    if array.name in warp.machine.dependent and not warp.grid_waited:
        raise Hazard(f"{array.name} is touched before griddepcontrol.wait")
    return array
