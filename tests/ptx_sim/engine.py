"""Asynchronous operations and the policies that decide when they happen.

    eager     at once
    lazy      only when no warp can run, the newest first; the barrier of a cluster opens as late
    random    at any time in any order; warps are slow and fast, clusters start late, and an
              arbitrary lane is elected

What the ISA orders is a queue (the MMAs and commits of a CTA): only its head can happen.
"""

from collections import deque
from collections.abc import Callable, Hashable
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptx_sim.warp import Warp


class Engine:
    """Operations under way."""

    def __init__(self, policy: "Policy"):
        self.policy = policy
        self.free: list[Callable[[], None]] = []
        self.queues: dict[Hashable, deque[Callable[[], None]]] = {}

    def submit(self, operation: Callable[[], None], queue: Hashable = None) -> None:
        """Start an operation; those of one queue happen in order."""
        if self.policy.eager:
            operation()
        elif queue is None:
            self.free.append(operation)
        else:
            self.queues.setdefault(queue, deque()).append(operation)

    def finish(self, operation: Callable[[], None]) -> None:
        """Let an operation of no queue happen now, unless it has."""
        if operation in self.free:
            self.free.remove(operation)
            operation()

    @property
    def busy(self) -> bool:
        return bool(self.free or self.queues)

    def complete_one(self) -> None:
        """Let one operation that can happen do so."""
        choice = self.policy.choose(len(self.free) + len(self.queues))
        if choice < len(self.free):
            self.free.pop(choice)()
            return
        name = list(self.queues)[choice - len(self.free)]
        queue = self.queues[name]
        operation = queue.popleft()
        if not queue:
            del self.queues[name]
        operation()


class Policy:
    """Eager and lazy order, and what they share: lane 0 is elected, warps run in turn."""

    def __init__(self, name: str):
        self.name = name
        self.eager = name == "eager"
        self.all_wait = name == "lazy"  # before the barrier of a cluster opens

    def choose(self, operations: int) -> int:
        """Which of the operations under way happens next."""
        return operations - 1

    def completes_now(self) -> bool:
        """Whether an operation happens although warps can run."""
        return False

    def pick(self, runnable: deque, busy: bool) -> "Warp | None":
        """The warp that runs next, taken out; None for an operation instead, if some are `busy`."""
        return runnable.popleft()

    def quantum(self) -> int:
        """How many blocks it runs, unless it has to wait before."""
        return 1 << 20

    def elected(self) -> int:
        """The lane that elect.sync elects in a warp."""
        return 0

    def pace(self) -> float:
        """The chance that a warp runs when its turn comes, to be multiplied by its CTA's."""
        return 1.0

    def cta_pace(self) -> float:
        """The same of a CTA."""
        return 1.0

    def resident(self, clusters: int) -> int:
        """How many clusters run at a time."""
        return clusters

    def first_column(self) -> int:
        """Where a CTA's TMEM begins."""
        return 0


class RandomPolicy(Policy):
    """Everything that may vary does."""

    def __init__(self, seed: int):
        super().__init__(f"random({seed})")
        self.rng = Random(seed)
        self.rate = self.rng.choice((0.02, 0.1, 0.3))

    def choose(self, operations: int) -> int:
        return self.rng.randrange(operations)

    def completes_now(self) -> bool:
        return self.rng.random() < self.rate

    def pick(self, runnable: deque, busy: bool) -> "Warp | None":
        for _ in range(30):
            i = int(self.rng.random() * len(runnable))
            if self.rng.random() < runnable[i].pace:
                break
        else:  # only slow warps can run: they move when nothing else does
            if busy:
                return None
        runnable[i], runnable[-1] = runnable[-1], runnable[i]
        return runnable.pop()

    def quantum(self) -> int:
        return self.rng.choice((1, 2, 8, 64))

    def elected(self) -> int:
        return self.rng.randrange(32)

    def pace(self) -> float:
        return self.rng.choice((1.0, 1.0, 0.3, 0.03))

    def cta_pace(self) -> float:
        return self.rng.choice((1.0, 1.0, 1.0, 0.001))

    def resident(self, clusters: int) -> int:
        return self.rng.choice((clusters, clusters, self.rng.randint(1, clusters)))

    def first_column(self) -> int:
        return self.rng.choice((0, 32, 128))


def policy_of(name: str) -> Policy:
    """ "eager", "lazy", or "random" with a seed, as "random3"."""
    if name in ("eager", "lazy"):
        return Policy(name)
    if name.startswith("random"):
        return RandomPolicy(int(name.removeprefix("random")))
    raise ValueError(name)
