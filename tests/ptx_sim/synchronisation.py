"""How warps and kernels wait for each other: fences, the barriers of `barriers`, the grid before.

Fences have no effect here, but their absence is a hazard.
"""

import numpy as np

from ptx_sim import lanes
from ptx_sim.barriers import Mbarrier, Wait
from ptx_sim.errors import Hazard, Misuse, Unsupported
from ptx_sim.lanes import Lanes
from ptx_sim.memory import SHARED_BASE, WINDOW
from ptx_sim.warp import Warp

# --- fences --------------------------------------------------------------------------------------


def nothing(warp: Warp, line: int, m: Lanes, opcode: str, *_operands: Lanes) -> tuple:
    """Fences and hints, which have no effect here."""
    return ()


def fence(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.fenced.join(warp.released(m))
    return ()


def sync_warp(warp: Warp, line: int, m: Lanes, opcode: str, *_mask: Lanes) -> tuple:
    warp.whole(line, m, opcode)
    warp.converge()
    return ()


def fence_inits(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.inits_fenced = True
    return ()


def fence_proxy(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    if not opcode.endswith(".global"):
        warp.cta.shared.proxies.fence(warp.threads[m], warp.tick())
    return ()


def fence_before(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.tmem_fenced_before = True
    return ()


def fence_after(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.tmem_fenced_after = True
    return ()


def grid_wait(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.grid_waited = True
    return ()


# --- barriers of a CTA ---------------------------------------------------------------------------


def bar_arrive(warp: Warp, line: int, m: Lanes, opcode: str, number: Lanes, count: Lanes) -> tuple:
    warp.whole(line, m, opcode)
    warp.synchronise()
    barrier = warp.cta.named_barrier(int(number[0]))
    barrier.arrive(lanes.WARP, int(count[0]), warp.released(m))
    return ()


def bar_sync(warp: Warp, line: int, m: Lanes, opcode: str, number: Lanes, *count: Lanes) -> Wait:
    warp.whole(line, m, opcode)
    warp.synchronise()
    barrier = warp.cta.named_barrier(int(number[0]))
    generation = barrier.generation
    expected = int(count[0][0]) if count else lanes.WARP * len(warp.cta.warps)
    warp.converge()
    barrier.arrive(lanes.WARP, expected, warp.released(m))
    return Wait(warp, barrier, lambda: barrier.generation != generation)


# --- mbarriers -----------------------------------------------------------------------------------


def barrier_init(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, count) -> tuple:
    warp.line = line
    for lane in np.flatnonzero(m):
        at = int(address[lane])
        warp.cta.shared.offset(at)
        if at % 8:
            raise Misuse(f"an mbarrier at {at:#x}: not aligned to 8 bytes")
        name = f"{at - SHARED_BASE & ((1 << WINDOW) - 1)} of {warp.cta}"
        warp.cta.barriers[at] = Mbarrier(name, int(count[lane]), warp.cta.cluster.agents)
        warp.inits_fenced = False
    return ()


def barrier_arrive(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, *count) -> tuple:
    warp.line = line
    clock = warp.released(m)
    for lane in np.flatnonzero(m):
        warp.cta.barrier(int(address[lane])).arrive(clock, int(count[0][lane]) if count else 1)
    return (lanes.constant(0, "u8"),)


def barrier_arrive_peer(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
    warp.line = line
    clock = warp.relaxed() if ".relaxed." in opcode else warp.released(m)
    for lane in np.flatnonzero(m):
        at = int(address[lane])
        cta = warp.cta.cluster.cta(at)

        def arrive(cta=cta, at=at) -> None:
            cta.alive(f"an arrival of {warp} reaches its barrier")
            signal = cta.barrier(at)
            signal.remote |= cta is not warp.cta and ".release." in opcode
            signal.arrive(clock)

        warp.machine.engine.submit(arrive)
    return ()


def barrier_expect(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, count) -> tuple:
    warp.line = line
    for lane in np.flatnonzero(m):
        barrier = warp.cta.barrier(int(address[lane]))
        barrier.expect(int(count[lane]))
        barrier.arrive(warp.released(m))
    return (lanes.constant(0, "u8"),)


def barrier_wait(warp: Warp, line: int, m: Lanes, opcode: str, address, parity, *_time) -> Wait:
    warp.line = line
    warp.tmem_fenced_after = False
    if np.ptp(address[m]) or np.ptp(parity[m]):
        raise Unsupported("lanes of a warp that wait for different phases")
    first = m.argmax()
    barrier, wanted = warp.cta.barrier(int(address[first])), int(parity[first])

    def passed() -> bool:
        if barrier.remote and ".cluster." not in opcode:
            raise Hazard(f"{barrier}: waits at CTA scope for what a peer sends")
        return barrier.passed(wanted)

    return Wait(warp, barrier, passed)


# --- clusters ------------------------------------------------------------------------------------


def cluster_arrive(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.whole(line, m, opcode)
    if not warp.inits_fenced:
        raise Hazard("peers are told of mbarriers without fence.mbarrier_init")
    if warp.cluster_generation is not None:
        raise Misuse("barrier.cluster.arrive twice without a wait")
    warp.cluster_generation = warp.cta.cluster.barrier.generation
    clock = warp.relaxed() if ".relaxed" in opcode else warp.released(m)
    warp.cta.cluster.barrier.arrive(warp, clock)
    return ()


def cluster_wait(warp: Warp, line: int, m: Lanes, opcode: str) -> Wait:
    warp.whole(line, m, opcode)
    generation, warp.cluster_generation = warp.cluster_generation, None
    if generation is None:
        raise Misuse("barrier.cluster.wait without an arrival")
    barrier = warp.cta.cluster.barrier
    if barrier.generation == generation:
        barrier.wait(warp)
    return Wait(warp, barrier, lambda: barrier.generation != generation)
