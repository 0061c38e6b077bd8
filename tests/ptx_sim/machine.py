"""The machine: clusters of CTAs, their warps, and the loop that runs them.

A warp runs block by block, the active lanes with the lowest program counter first, until it has to
wait or its quantum is over. Between turns asynchronous operations happen, as the policy decides.
When no warp can run and nothing is under way, that is a deadlock.
"""

from collections import deque

import numpy as np

from ptx_sim.barriers import ClusterBarrier, Mbarrier, NamedBarrier
from ptx_sim.engine import Engine, Policy
from ptx_sim.errors import Deadlock, Misuse, SimulationError
from ptx_sim.memory import WINDOW, GlobalMemory, Shared, Tmem
from ptx_sim.program import Program
from ptx_sim.races import AGENTS, History
from ptx_sim.tensor import TensorMap
from ptx_sim.warp import Warp

MAX_TURNS = 20_000_000  # blocks of one launch: far more than any kernel here needs


class Cta:
    """A CTA: its memories and barriers."""

    def __init__(self, cluster: "Cluster", rank: int, place: tuple[int, int]):
        self.machine = cluster.machine
        self.cluster = cluster
        self.rank = rank
        self.place = place
        self.shared = Shared(rank, self.machine.shared_bytes)
        self.tmem = Tmem(self.machine.policy.first_column())
        self.pace = self.machine.policy.cta_pace()
        self.barriers: dict[int, Mbarrier] = {}
        self.named: dict[int, NamedBarrier] = {}
        warps = self.machine.program.entry.threads // 32
        self.history = History(self.shared.name, self.shared.words.size, rank, warps)
        self.warps = [Warp(self, i) for i in range(warps)]
        self.running = warps

    def __str__(self) -> str:
        return f"CTA {self.place}"

    @property
    def exited(self) -> bool:
        return self.running == 0

    def alive(self, what: str) -> None:
        """Raise if this CTA has exited, for its memory is gone."""
        if self.exited:
            raise Misuse(f"{what} after {self} has exited")

    def barrier(self, address: int) -> Mbarrier:
        """The mbarrier at an address of this CTA."""
        found = self.barriers.get(address)
        if found is None:
            raise Misuse(f"{self}: no mbarrier has been initialised at {address:#x}")
        return found

    def named_barrier(self, number: int) -> NamedBarrier:
        if number not in self.named:
            self.named[number] = NamedBarrier(f"{number} of {self}", self.cluster.agents)
        return self.named[number]

    def leave(self, warp: Warp) -> None:
        """A warp exits."""
        self.running -= 1
        self.cluster.barrier.leave(warp)
        if not self.exited:
            return
        if self.tmem.allocated:
            raise Misuse(f"{self} exits with TMEM columns allocated: {self.tmem.allocated}")
        for barrier in self.barriers.values():
            if barrier.bytes:
                raise Misuse(f"{self} exits with bytes outstanding: {barrier}")


class Cluster:
    """CTAs that see each other's shared memory."""

    def __init__(self, machine: "Machine", first: int, y: int):
        self.machine = machine
        count = machine.program.entry.threads // 32 * machine.cluster_size
        self.agents = count * AGENTS  # of which a clock tells
        self.barrier = ClusterBarrier(count, self.agents, all_wait=machine.policy.all_wait)
        self.ctas = [Cta(self, rank, (first + rank, y)) for rank in range(machine.cluster_size)]

    @property
    def exited(self) -> bool:
        return all(cta.exited for cta in self.ctas)

    def cta(self, address: int) -> Cta:
        """The CTA that holds a shared::cluster address."""
        rank = address >> WINDOW
        if rank >= len(self.ctas):
            raise Misuse(f"shared memory address {address:#x}: no CTA {rank} in the cluster")
        return self.ctas[rank]


class Machine:
    """One launch."""

    def __init__(
        self,
        program: Program,
        params: list[bytes | TensorMap],
        memory: GlobalMemory,
        policy: Policy,
        *,
        grid: tuple[int, int],
        cluster_size: int,
        shared_bytes: int,
        dependent: frozenset[str] = frozenset(),
        races: bool = False,
    ):
        self.program = program
        self.memory = memory
        self.policy = policy
        self.cluster_size = cluster_size
        self.shared_bytes = shared_bytes
        self.dependent = dependent  # arrays that are not to be touched before griddepcontrol.wait
        # Whether races are looked for, which takes about as long as all else: one order shows them.
        self.races = races or policy.eager
        self.params = dict(zip((p.name for p in program.entry.params), params, strict=True))
        self.maps = {}
        self.param_addresses = {}
        for i, (name, value) in enumerate(self.params.items()):
            self.param_addresses[name] = (1 << 60) + 4096 * i
            if isinstance(value, TensorMap):
                self.maps[self.param_addresses[name]] = value
        self.engine = Engine(policy)
        self.runnable: deque[Warp] = deque()
        self.clusters: list[Cluster] = []
        self.time = 0  # counts stores to shared memory and proxy fences
        self.waiting = [(x, y) for y in range(grid[1]) for x in range(0, grid[0], cluster_size)]

    def wake(self, warp: Warp) -> None:
        """What the warp waited for may have come."""
        self.runnable.append(warp)

    def run(self) -> None:
        """Run the launch to its end; raise a `SimulationError` if it goes wrong."""
        with np.errstate(all="ignore"):
            resident = self.policy.resident(len(self.waiting))
            for _ in range(resident):
                self.start_cluster()
            for _ in range(MAX_TURNS):
                busy, warp = self.engine.busy, None
                if self.runnable and not (busy and self.policy.completes_now()):
                    warp = self.policy.pick(self.runnable, busy)
                if warp is not None:
                    self.advance(warp)
                elif busy:
                    self.engine.complete_one()
                elif self.unfinished():
                    raise Deadlock(self.report())
                else:
                    return
        raise Deadlock(f"no end after {MAX_TURNS} turns\n{self.report()}")

    def start_cluster(self) -> None:
        """The next cluster takes its place on the machine."""
        if self.waiting:
            cluster = Cluster(self, *self.waiting.pop(0))
            self.clusters.append(cluster)
            self.runnable.extend(warp for cta in cluster.ctas for warp in cta.warps)

    def advance(self, warp: Warp) -> None:
        """One turn of a warp."""
        try:
            wait = warp.advance(self.policy.quantum())
        except SimulationError as error:
            if warp.line:
                error.add_note(f"{warp}, {self.program.entry.source(warp.line)}")
            raise
        if wait is not None:
            wait.register(warp)
        elif not warp.exited:
            self.runnable.append(warp)
        else:
            warp.cta.leave(warp)
            if warp.cta.cluster.exited:
                self.clusters.remove(warp.cta.cluster)
                self.start_cluster()

    def unfinished(self) -> list[Warp]:
        """Warps that have not exited."""
        ctas = (cta for cluster in self.clusters for cta in cluster.ctas)
        return [warp for cta in ctas for warp in cta.warps if not warp.exited]

    def report(self) -> str:
        """Where every warp stands, and every barrier of its CTA."""
        lines, seen = [], set()
        for warp in self.unfinished()[:24]:
            source = self.program.entry.source(warp.line) if warp.line else "the start"
            lines.append(f"{warp} waits for {warp.wait} at {source}")
            if warp.cta not in seen:
                seen.add(warp.cta)
                lines += [f"    {barrier}" for barrier in warp.cta.barriers.values()]
        return "\n".join(["deadlock:", *lines])
