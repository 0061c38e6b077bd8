"""Matrix products: tcgen05 with its tensor memory, and wgmma; `tensor` has the mathematics."""

import numpy as np

from ptx_sim import lanes, tensor
from ptx_sim.errors import Hazard, Misuse, Unsupported
from ptx_sim.lanes import Lanes
from ptx_sim.races import PRODUCTS, Words
from ptx_sim.warp import Warp


def watch(warp: Warp, lane: int, m: Lanes) -> tensor.Watch:
    """What looks at the operands of a product that `lane`, one of lanes `m`, issues now."""
    shared, history = warp.cta.shared, warp.cta.history
    issue, access = warp.issue(lane), warp.access(PRODUCTS, m)

    def seen(words: np.ndarray) -> None:
        if shared.proxies.stores(slice(words.min(), words.max() + 1)):
            shared.proxies.check(words, issue, "an MMA reads")
        if warp.machine.races:
            history.reads(access, Words.of_operation(words))

    return seen


# --- tcgen05 -------------------------------------------------------------------------------------


def tmem_alloc(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, columns) -> tuple:
    warp.whole(line, m, opcode)
    first = warp.cta.tmem.allocate(int(columns[0]))
    lane = np.equal(lanes.LANES, 0)
    index = warp.cta.shared.store(address, lane, (lanes.constant(first, "u4"),))
    if warp.machine.races:
        warp.cta.history.writes(warp.access(), Words.of(index, 1, lane))
    return ()


def tmem_free(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes, columns) -> tuple:
    warp.whole(line, m, opcode)
    warp.cta.tmem.free(int(address[0]), int(columns[0]))
    return ()


def tmem_relinquish(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.whole(line, m, opcode)
    warp.cta.tmem.relinquished = True
    return ()


def mma(warp: Warp, line: int, m: Lanes, opcode: str, to, a, b, bits, off, add) -> tuple:
    warp.line = line
    for lane in np.flatnonzero(m):
        operands = [int(v[lane]) for v in (to, a, b, bits)]
        operands += [np.array([v[lane] for v in off]), bool(add[lane])]
        operands.append(watch(warp, int(lane), np.equal(lanes.LANES, lane)))

        def multiply(operands=operands) -> None:
            warp.cta.alive("a tcgen05.mma runs")
            tensor.tcgen05_mma(warp.cta.shared, warp.cta.tmem, *operands)

        warp.machine.engine.submit(multiply, queue=warp.cta)
    return ()


def mma_commit(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
    warp.line = line
    done = warp.clock.without_lanes()
    done.whole[warp.agent + PRODUCTS] = warp.tick()
    for lane in np.flatnonzero(m):
        at = int(address[lane])
        cta = warp.cta.cluster.cta(at)

        def arrive(cta=cta, at=at) -> None:
            cta.alive("a tcgen05.commit arrives")
            cta.barrier(at).arrive(done)

        warp.machine.engine.submit(arrive, queue=warp.cta)
    return ()


def tmem_load(warp: Warp, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
    warp.whole(line, m, opcode)
    if not warp.tmem_fenced_after:
        raise Hazard("TMEM is read without tcgen05.fence::after_thread_sync")
    if np.ptp(address):
        raise Misuse("tcgen05.ld: the lanes disagree on the address")
    warp.tmem_fenced_before = False
    _, _, _, _, shape, count, _ = opcode.split(".")
    return tensor.tmem_load(warp.cta.tmem, shape, int(count[1:]), int(address[0]), warp.number)


# --- wgmma ---------------------------------------------------------------------------------------


def wgmma(
    warp: Warp, line: int, m: Lanes, opcode: str, slots: list[int], a, b, add, *flags
) -> None:
    """Queue this warp's quarter of a product; it happens at the latest when waited for."""
    warp.whole(line, m, opcode)
    n = int(opcode.split(".")[4].split("n")[1].split("k")[0])
    if [int(flag[0]) for flag in flags] != [1, 1, 0, 0] or len(slots) != n // 2:
        raise Unsupported(f"{opcode} with scales, transposed operands or registers")
    bits, adds = (int(a[0]), int(b[0])), bool(add[0])
    seen = watch(warp, 0, m)

    def multiply() -> None:
        product = tensor.wgmma(warp.cta.shared, *bits, n, warp.number, seen)
        for slot, value in zip(slots, product, strict=True):
            old = warp.registers[slot].view(np.float32)
            warp.registers[slot] = (old + value if adds else value).view(np.uint32)

    warp.wgmmas[-1].append(multiply)


def wgmma_commit(warp: Warp, line: int, m: Lanes, opcode: str) -> tuple:
    warp.whole(line, m, opcode)
    warp.wgmmas.append([])
    warp.commit(PRODUCTS)
    if warp.machine.policy.eager:
        finish_wgmmas(warp, 0)
    return ()


def wgmma_wait(warp: Warp, line: int, m: Lanes, opcode: str, pending: Lanes) -> None:
    warp.whole(line, m, opcode)
    finish_wgmmas(warp, int(pending[0]))
    warp.completed(PRODUCTS, int(pending[0]))


def finish_wgmmas(warp: Warp, pending: int) -> None:
    """Run the oldest groups until only `pending` are under way."""
    while len(warp.wgmmas) - 1 > pending:
        for multiply in warp.wgmmas.popleft():
            multiply()
