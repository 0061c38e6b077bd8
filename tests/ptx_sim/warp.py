"""A warp: its state and its lanes' control flow.

What its instructions do beyond arithmetic are functions of a warp, of which `operations.EFFECTS`
and `operations.GATES` are the table: in `access`, `collectives`, `copies`, `mma` and
`synchronisation`. Each takes the warp, the line, the mask of active lanes, the opcode and the
operands. Effects return a tuple of results; gates return what has to be waited for, or None.
"""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from ptx_sim import lanes
from ptx_sim.barriers import Wait
from ptx_sim.errors import Hazard, Misuse
from ptx_sim.lanes import Lanes
from ptx_sim.memory import Poll
from ptx_sim.proxies import Issue
from ptx_sim.races import AGENTS, COPIES, LANES, PRODUCTS, Access, Clock

if TYPE_CHECKING:
    from ptx_sim.machine import Cta


class Warp:
    """32 lanes."""

    def __init__(self, cta: "Cta", number: int):
        self.cta = cta
        self.machine = cta.machine
        self.number = number
        self.registers = list(self.machine.program.poison)
        self.pending: dict[int, Lanes] = {0: lanes.ALL}  # block -> lanes that run it next
        self.wait: Wait | Poll | None = None
        self.line = 0  # of the last effect
        self.leader = self.machine.policy.elected()
        self.pace = self.machine.policy.pace() * cta.pace
        self.grid_waited = False
        self.cluster_generation: int | None = None
        self.last_poll: tuple | None = None
        self.wgmmas: deque[list] = deque([[]])  # groups, the open one last
        self.copies: deque[list] = deque([[]])  # the same of cp.async
        self.commits = {kind: deque() for kind in (COPIES, PRODUCTS)}  # times of their groups
        self.agent = (cta.rank * cta.history.warps + number) * AGENTS
        self.clock = Clock(cta.cluster.agents)
        self.fenced = Clock(cta.cluster.agents)  # what the last fence released
        # What formally needs a fence, though nothing goes wrong here without.
        self.inits_fenced = True
        self.tmem_fenced_before = self.tmem_fenced_after = True
        self.threads = lanes.LANES + np.uint32(lanes.WARP * number)
        self.symbols = self.special_registers()

    def __str__(self) -> str:
        return f"{self.cta} warp {self.number}"

    def special_registers(self) -> dict[str, Lanes]:
        """Special registers, and the addresses of shared memory and parameters."""
        x, y = self.cta.place
        found = {
            "%tid.x": self.threads,
            "%laneid": lanes.LANES,
            "%ctaid.x": lanes.constant(x, "u4"),
            "%ctaid.y": lanes.constant(y, "u4"),
            "%cluster_ctarank": lanes.constant(self.cta.rank, "u4"),
            "__dynamic_shmem__0": lanes.constant(self.cta.shared.base, "u4"),
        }
        for name, address in self.machine.param_addresses.items():
            found[name] = lanes.constant(address, "u8")
        return found

    @property
    def exited(self) -> bool:
        return not self.pending

    def advance(self, quantum: int) -> "Wait | Poll | None":
        """Run up to `quantum` blocks; what the warp then waits for, if it does.

        Lanes that wait keep the warp's other lanes waiting: a warp that waits for itself, which a
        GPU's independent lanes would get out of, is a deadlock here.
        """
        if self.wait is not None:
            if not self.wait.ready():
                return self.wait
            self.wait = None
        blocks, pending = self.machine.program.blocks, self.pending
        for _ in range(quantum):
            if not pending:
                break
            i = min(pending)
            m = pending.pop(i)
            block = blocks[i]
            result = block.run(self, self.registers, m)
            if block.exits:
                continue
            if block.target is None:
                self.merge(i + 1, m)
            elif not block.conditional or (result | ~m).all():
                self.merge(block.target, m)
            elif not (result & m).any():
                self.merge(i + 1, m)
            else:
                self.merge(block.target, m & result)
                self.merge(i + 1, m & ~result)
            if block.gate and result is not None and not result.ready():
                self.wait = result
                return result
        return None

    def merge(self, block: int, m: Lanes) -> None:
        """Lanes `m` go on at `block`, together with those that are there."""
        if block in self.pending:
            m = self.pending[block] | m
            m = lanes.ALL if m.all() else m
        self.pending[block] = m

    def whole(self, line: int, m: Lanes, opcode: str) -> None:
        """Raise unless all lanes are active, as `.sync` with a full mask and `.aligned` demand."""
        self.line = line
        if not m.all():
            raise Misuse(f"{opcode} by {int(m.sum())} lanes of a warp")

    def tick(self) -> int:
        """A new time."""
        self.machine.time += 1
        return self.machine.time

    def issue(self, lane: int) -> Issue:
        """What the async proxy has to know of an operation that a lane issues."""
        fenced = self.cta.shared.proxies.fenced[self.threads[lane]]
        return Issue(self.machine.time, int(fenced))

    def synchronise(self) -> None:
        """This warp meets others: order what it did in TMEM, and will do, by fences."""
        if not self.tmem_fenced_before:
            raise Hazard("TMEM was read, with no tcgen05.fence::before_thread_sync since")
        self.tmem_fenced_after = False

    # --- what races are found by

    def access(self, kind: int = LANES, m: Lanes = lanes.ALL) -> Access:
        """An access of now, of lanes `m` or by what they have issued."""
        late = kind != LANES and self.machine.races  # its clock is looked at when it happens
        clock = self.released(m) if late else self.clock
        return Access(self.agent + kind, self.tick(), clock, self.line)

    def released(self, m: Lanes) -> Clock:
        """What lanes `m` know, their own accesses among it."""
        clock = self.clock.copy()
        clock.part[self.agent] = self.machine.time
        clock.lanes[self.agent] = lanes.mask(m)
        return clock

    def relaxed(self) -> Clock:
        """What an arrival tells that releases nothing itself."""
        clock = self.clock.without_lanes()
        clock.join(self.fenced)
        return clock

    def converge(self) -> None:
        """The lanes know each other's accesses."""
        self.clock.whole[self.agent] = self.machine.time

    def commit(self, kind: int) -> None:
        """What is under way of this kind is a group."""
        self.commits[kind].append(self.tick())

    def completed(self, kind: int, pending: int) -> None:
        """All but the last `pending` groups are over."""
        while len(self.commits[kind]) > pending:
            self.clock.whole[self.agent + kind] = self.commits[kind].popleft()
