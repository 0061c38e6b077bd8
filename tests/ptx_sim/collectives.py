"""What the lanes of a warp do together: elect, shuffle, reduce and vote, all with a full mask."""

import numpy as np

from ptx_sim import lanes
from ptx_sim.errors import Unsupported
from ptx_sim.lanes import Lanes
from ptx_sim.warp import Warp


def converge(warp: Warp, line: int, m: Lanes, opcode: str, *_mask: Lanes) -> tuple:
    warp.whole(line, m, opcode)
    return ()


def elect(warp: Warp, line: int, m: Lanes, opcode: str, _mask: Lanes) -> tuple:
    warp.whole(line, m, opcode)
    return lanes.constant(warp.leader, "u4"), np.equal(lanes.LANES, warp.leader)


def shuffle(warp: Warp, line: int, m: Lanes, opcode: str, a, b, c, _mask) -> tuple:
    warp.whole(line, m, opcode)
    if ".up." in opcode:
        if (c != 0).any():
            raise Unsupported(f"{opcode} in parts of a warp")
        return (np.where(b <= lanes.LANES, a[(lanes.LANES - b) & np.uint32(31)], a),)
    if (c != 31).any():
        raise Unsupported(f"{opcode} in parts of a warp")
    source = b if ".idx." in opcode else lanes.LANES ^ b
    if ".idx." not in opcode and ".bfly." not in opcode:
        raise Unsupported(opcode)
    return (a[source & np.uint32(31)],)


def reduce(warp: Warp, line: int, m: Lanes, opcode: str, a: Lanes, _mask: Lanes) -> tuple:
    warp.whole(line, m, opcode)
    _, _, operation, kind = opcode.split(".")
    function = {"min": np.min, "max": np.max, "add": np.sum}[operation]
    typed = a.view(np.int32) if kind == "s32" else a
    return (lanes.constant(int(function(typed)), "u4"),)


def vote(warp: Warp, line: int, m: Lanes, opcode: str, predicate: Lanes, _mask: Lanes) -> tuple:
    warp.whole(line, m, opcode)
    if opcode == "vote.sync.any.pred":
        return (np.full(lanes.WARP, predicate.any()),)
    if opcode == "vote.sync.ballot.b32":
        return (lanes.constant(lanes.mask(predicate), "u4"),)
    raise Unsupported(opcode)
