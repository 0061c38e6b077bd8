"""Copies that are under way while the warp goes on: cp.async, st.async and TMA."""

import numpy as np

from ptx_sim import lanes
from ptx_sim.access import global_array, word_count
from ptx_sim.errors import Hazard, Misuse, Unsupported
from ptx_sim.lanes import Lanes
from ptx_sim.proxies import STRANGERS
from ptx_sim.races import COPIES, Words, runs
from ptx_sim.warp import Warp

# --- cp.async ------------------------------------------------------------------------------------


def copy_async(warp: Warp, line: int, m: Lanes, opcode: str, to, source, whole, size) -> tuple:
    """16 bytes of each lane, or as many zeros."""
    warp.line = line
    if (whole[m] != 16).any() or ((size[m] != 16) & (size[m] != 0)).any():
        raise Unsupported(f"{opcode} of neither 16 bytes nor none")
    reads = m & (size == 16)
    shared, array = warp.cta.shared, global_array(warp, source, reads) if reads.any() else None
    words = Words.of_operation(runs(shared.index(to, m, 4), 4, m))  # or out of bounds
    access = warp.access(COPIES, m)
    if array is not None:
        array.index(source, reads, 4)

    def land() -> None:
        warp.cta.alive(f"a cp.async of {warp} lands")
        values = (np.zeros(lanes.WARP, np.uint32),) * 4
        if array is not None:
            loads = array.load(source, reads, 4)
            values = tuple(np.where(reads, word, 0).astype(np.uint32) for word in loads)
        if warp.machine.races:
            warp.cta.history.writes(access, words)
        shared.store_generic(to, m, values, warp.threads, warp.tick())

    warp.copies[-1].append(land)
    warp.machine.engine.submit(land)
    return ()


def copy_commit(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.whole(line, m, opcode)
    warp.copies.append([])
    warp.commit(COPIES)
    return ()


def copy_wait(warp: Warp, line: int, m: Lanes, opcode: str, pending: Lanes) -> tuple:
    """The oldest groups have landed, until only `pending` are under way."""
    warp.whole(line, m, opcode)
    while len(warp.copies) - 1 > int(pending[0]):
        for land in warp.copies.popleft():
            warp.machine.engine.finish(land)
    warp.completed(COPIES, int(pending[0]))
    return ()


# --- st.async ------------------------------------------------------------------------------------


def store_async(warp: Warp, line: int, m: Lanes, opcode: str, address, value, barrier) -> tuple:
    warp.line = line
    word_count(opcode)
    values = value if isinstance(value, tuple) else (value,)
    for target in set(barrier[m].tolist()):
        active = m & (barrier == target)
        cta = warp.cta.cluster.cta(target)
        access = warp.access(COPIES, active)

        def arrive(cta=cta, active=active, target=target, access=access) -> None:
            cta.alive(f"a st.async of {warp} arrives")
            first = cta.shared.store_generic(address, active, values, STRANGERS, warp.tick())
            if warp.machine.races:
                at = runs(first, len(values), active)
                cta.history.writes(access, Words.of_operation(at))
            signal = cta.barrier(target)
            signal.remote |= cta is not warp.cta
            size = 4 * len(values) * int(active.sum())
            signal.complete(size, access.agent, access.time)

        warp.machine.engine.submit(arrive)
    return ()


# --- TMA -----------------------------------------------------------------------------------------


def load_tensor(
    warp: Warp, line: int, m: Lanes, opcode: str, to, name, at, barrier, *_hint
) -> tuple:
    warp.line = line
    for lane in np.flatnonzero(m):
        load_box(warp, lane, to, name, at, barrier)
    return ()


def load_box(warp: Warp, lane: int, to: Lanes, name: Lanes, at, barrier: Lanes) -> None:
    """One TMA load, of one box to one CTA."""
    tensor_map = warp.machine.maps.get(int(name[lane]))
    if tensor_map is None:
        raise Misuse(f"{int(name[lane]):#x} is no tensor map")
    if tensor_map.after_wait and not warp.grid_waited:
        raise Hazard(f"{tensor_map.name} is loaded before griddepcontrol.wait")
    cta = warp.cta.cluster.cta(int(to[lane]))
    target, signal = int(to[lane]), int(barrier[lane])
    column, row = (int(c[lane]) for c in at)
    span = cta.shared.span(target, tensor_map.box_bytes)
    cta.shared.proxies.load_starts(span, warp.issue(lane))
    access = warp.access(COPIES, np.equal(lanes.LANES, lane))

    def arrive() -> None:
        cta.alive(f"a TMA load of {tensor_map.name} arrives")
        cta.shared.proxies.load_lands(span)
        if warp.machine.races:
            cta.history.writes(access, Words.of_operation(np.arange(span.start, span.stop)))
        tensor_map.write(cta.shared, target, tensor_map.box(column, row))
        cta.barrier(signal).complete(tensor_map.box_bytes, access.agent, access.time)

    warp.machine.engine.submit(arrive)
