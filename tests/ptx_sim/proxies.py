"""What the generic and the async proxy may see of each other in a CTA's shared memory.

A thread's stores are the generic proxy's. TMA and the tensor cores are the async proxy's: to them
such a store means nothing until fence.proxy.async, by the thread that stored or, once it has heard
of the store, by the one that issues. Memory has one value here, so that a missing fence changes no
result: it is found by looking who wrote each word, when, and who fenced since.

Of a fence by the issuing thread it is taken for granted that the two threads have met before. That
the generic proxy sees what TMA and MMAs did follows from their barriers, and needs no fence.
"""

from typing import NamedTuple

import numpy as np

from ptx_sim.errors import Hazard

NOBODY = 1024  # stands for a writer in another CTA: beyond every thread of this one
STRANGERS = np.full(32, NOBODY)
WRITER = 11  # bits


class Issue(NamedTuple):
    """When an operation of the async proxy was issued, and when its thread had last fenced."""

    time: int
    fenced: int


class Proxies:
    """Who stored last in each word of a CTA's shared memory, and what TMA loads will overwrite."""

    def __init__(self, name: str, words: int):
        self.name = name
        self.stamps = np.zeros(words, np.int64)  # of stores: time, then thread; 0: no store
        self.fenced = np.zeros(NOBODY + 1, np.int64)  # when, by thread
        self.landing = np.zeros(words, np.int8)  # loads under way to each word
        self.loads = 0  # under way

    def stored(self, first: np.ndarray, n: int, writers: np.ndarray, now: int) -> None:
        """Threads stored n words each."""
        stamps = writers + np.int64(now << WRITER)
        for i in range(n):
            words = first + first.dtype.type(i)
            self.stamps[words] = stamps
            if self.loads and self.landing[words].any():
                raise Hazard(f"{self.name}: a store to what a TMA load under way is to write")

    def fence(self, threads: np.ndarray, now: int) -> None:
        """fence.proxy.async"""
        self.fenced[threads] = now

    def stores(self, words: slice) -> bool:
        """Whether a thread was the last to write any of these words."""
        return bool(self.stamps[words].any())

    def check(self, words: np.ndarray | slice, issue: Issue, what: str) -> None:
        """Raise if the async proxy uses words that it cannot know."""
        stamps = self.stamps[words]
        time, writer = stamps >> WRITER, stamps % (1 << WRITER)
        unfenced = (time > self.fenced[writer]) & (time > issue.fenced)
        if (unfenced | (time > issue.time)).any():
            raise Hazard(f"{self.name}: {what} what was stored without fence.proxy.async since")

    def load_starts(self, words: slice, issue: Issue) -> None:
        """A TMA load is issued."""
        if self.stores(words):
            self.check(words, issue, "a TMA load overwrites")
        self.landing[words] += 1
        self.loads += 1

    def load_lands(self, words: slice) -> None:
        """It writes."""
        self.stamps[words] = 0
        self.landing[words] -= 1
        self.loads -= 1
