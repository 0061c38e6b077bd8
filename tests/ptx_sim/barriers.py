"""Barriers: mbarriers, the named barriers of a CTA, and the barrier of a cluster."""

from ptx_sim.errors import Misuse
from ptx_sim.races import Clock

MAX_TX = (1 << 20) - 1


class Condition:
    """Something that warps wait for, and then know what those did who arrived before."""

    def __init__(self, agents: int) -> None:
        self.waiters: list = []
        self.arriving = Clock(agents)  # of the phase that is not over
        self.known = Clock(agents)

    def release(self) -> None:
        """Let the waiters look again."""
        self.known.join(self.arriving)
        self.arriving = Clock(self.known.whole.size)
        waiters, self.waiters = self.waiters, []
        for warp in waiters:
            warp.machine.wake(warp)


class Mbarrier(Condition):
    """An mbarrier: a phase ends when neither arrivals nor bytes are outstanding."""

    def __init__(self, name: str, count: int, agents: int):
        super().__init__(agents)
        self.name = name
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0  # completed so far
        self.remote = False  # whether another CTA has sent to it
        if not 1 <= count <= MAX_TX:
            raise Misuse(f"{name}: an expected count of {count}")

    def expect(self, count: int) -> None:
        self._add(count)

    def arrive(self, clock: Clock, count: int = 1) -> None:
        if self.pending < count:
            raise Misuse(f"{self}: {count} more arrivals than the phase expects")
        self.arriving.join(clock)
        self.pending -= count
        self._settle()

    def complete(self, count: int, agent: int, time: int) -> None:
        """Bytes of what an agent began at some time are there."""
        self.arriving.whole[agent] = max(self.arriving.whole[agent], time)
        self._add(-count)
        self._settle()

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity, current or just before, is complete."""
        return self.phase % 2 != parity

    def _add(self, count: int) -> None:
        self.bytes += count
        if abs(self.bytes) > MAX_TX:
            raise Misuse(f"{self}: more outstanding bytes than an mbarrier can count")

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase += 1
            self.release()

    def __str__(self) -> str:
        return (
            f"mbarrier {self.name}: {self.phase} phases complete, {self.pending} of"
            f" {self.count} arrivals and {self.bytes} bytes outstanding"
        )


class NamedBarrier(Condition):
    """bar.sync and bar.arrive: the number of threads belongs to each use."""

    def __init__(self, name: str, agents: int):
        super().__init__(agents)
        self.name = name
        self.arrived = self.expected = self.generation = 0

    def arrive(self, threads: int, expected: int, clock: Clock) -> None:
        if self.arrived and expected != self.expected:
            raise Misuse(f"{self}; now with {expected} threads")
        self.expected = expected
        self.arriving.join(clock)
        self.arrived += threads
        if self.arrived > expected:
            raise Misuse(f"{self}: too many")
        if self.arrived == expected:
            self.arrived = 0
            self.generation += 1
            self.release()

    def __str__(self) -> str:
        return f"barrier {self.name}: {self.arrived} of {self.expected} threads"


class ClusterBarrier(Condition):
    """barrier.cluster: every warp of the cluster arrives or has exited.

    Where `all_wait`, it opens only when every one waits as well, as under racecheck: there, a wait
    that needs work which another warp does behind its own never ends.
    """

    def __init__(self, warps: int, agents: int, *, all_wait: bool):
        super().__init__(agents)
        self.warps = warps
        self.all_wait = all_wait
        self.arrived: set = set()
        self.waiting: set = set()
        self.exited: set = set()
        self.generation = 0

    def arrive(self, warp, clock: Clock) -> None:
        self.arrived.add(warp)
        self.arriving.join(clock)
        self._settle()

    def wait(self, warp) -> None:
        """A warp that has arrived waits."""
        self.waiting.add(warp)
        self._settle()

    def leave(self, warp) -> None:
        """A warp exits and is expected no more."""
        self.exited.add(warp)
        self._settle()

    def _settle(self) -> None:
        if self.arrived and self.there == self.warps:
            self.arrived.clear()
            self.waiting.clear()
            self.generation += 1
            self.release()

    @property
    def there(self) -> int:
        return len((self.waiting if self.all_wait else self.arrived) | self.exited)

    def __str__(self) -> str:
        return f"cluster barrier: {self.there} of {self.warps} warps"


class Wait:
    """What one warp waits for: a condition and the test that ends the wait."""

    def __init__(self, warp, condition: Condition, over):
        self.warp = warp
        self.condition = condition
        self.over = over

    def ready(self) -> bool:
        """Whether the wait is over; the warp knows then what it waited for."""
        if not self.over():
            return False
        self.warp.clock.join(self.condition.known)
        return True

    def register(self, warp) -> None:
        self.condition.waiters.append(warp)

    def __str__(self) -> str:
        return str(self.condition)
