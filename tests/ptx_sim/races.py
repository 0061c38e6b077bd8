"""Races: two accesses to a word of shared memory, at least one a write, which nothing orders.

An access is a lane's, or one of what a warp has under way: its copies (st.async, cp.async, TMA
loads) and its matrix products. Each of the three is an agent, and accesses have times. A clock says
until when an agent's accesses are known to have happened. A warp hands its clock on where it
releases (arrivals), and joins to it what it acquires (waits); an operation has the clock of its
issue, and makes itself known by its own barrier or wait. A relaxed arrival tells of lanes' accesses
what the last fence knew, and, like tcgen05.commit, of operations all that are known to be over. An
access that meets one that its clock does not know is a race, whatever order the two had here: any
one order shows it.

A lane knows its own accesses, and those of its warp's other lanes up to the last bar.warp.sync or
barrier of the CTA; shuffles and votes order nothing. What a lane acquires its whole warp knows from
then on, and what an operation makes known, it makes known of those ahead of it in its warp too.
Atomics are not looked at, nor lanes of one instruction that write to the same word.
"""

from typing import NamedTuple

import numpy as np

from ptx_sim.errors import Hazard
from ptx_sim.lanes import BITS

LANES, COPIES, PRODUCTS = range(3)  # the agents of a warp
AGENTS = 3
ANY = np.uint32(0xFFFFFFFF)  # all lanes, or what has none


class Clock:
    """What is known: all of each agent's accesses up to `whole`, some lanes' up to `part`."""

    __slots__ = ("lanes", "part", "whole")

    def __init__(self, agents: int):
        self.whole = np.zeros(agents, np.int64)
        self.part = np.zeros(agents, np.int64)
        self.lanes = np.zeros(agents, np.uint32)

    def copy(self) -> "Clock":
        found = Clock(0)
        for name in self.__slots__:
            setattr(found, name, getattr(self, name).copy())
        return found

    def join(self, other: "Clock") -> None:
        """Know what the other one knows. Of two parts the lanes of both up to the later time."""
        self.whole = np.maximum(self.whole, other.whole)
        self.lanes = self.lanes * (self.part > self.whole)
        theirs = other.lanes * (other.part > self.whole)
        self.part = np.maximum(self.part * (self.lanes != 0), other.part * (theirs != 0))
        self.lanes = self.lanes | theirs

    def without_lanes(self) -> "Clock":
        """What is known of operations that are over."""
        found = self.copy()
        found.whole[LANES::AGENTS] = found.part[LANES::AGENTS] = 0
        return found

    def knows(self, agents: np.ndarray, times: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Of each access whether it is known."""
        whole = times <= self.whole[agents]
        return whole | ((times <= self.part[agents]) & (lanes & ~self.lanes[agents] == 0))


class Access(NamedTuple):
    """Who touches memory, when, and what it knows."""

    agent: int
    time: int
    clock: Clock
    line: int  # of the PTX

    @property
    def is_of_lanes(self) -> bool:
        return self.agent % AGENTS == LANES


def runs(first: np.ndarray, n: int, m: np.ndarray) -> np.ndarray:
    """Where the n words of each active lane are, from its own first one on."""
    at = first[m].astype(np.int64)
    return at if n == 1 else (at + np.arange(n)[:, None]).ravel()


class Words(NamedTuple):
    """Words of a CTA's shared memory, each with the lanes that touch it."""

    at: np.ndarray
    lanes: np.ndarray

    @classmethod
    def of(cls, first: np.ndarray, n: int, m: np.ndarray) -> "Words":
        """n words of each active lane, from its own first one on."""
        bits = BITS[m]
        return cls(runs(first, n, m), bits if n == 1 else np.concatenate((bits,) * n))

    @classmethod
    def of_operation(cls, at: np.ndarray) -> "Words":
        """Of an operation without lanes."""
        return cls(at, np.full(at.size, ANY))


class History:
    """The last write to each word of a CTA's shared memory, and the reads since, by reader."""

    def __init__(self, name: str, words: int, rank: int, warps: int):
        self.name = name
        self.warps = warps
        self.writer = np.zeros(words, np.int64)
        self.written = np.zeros(words, np.int64)  # when; 0: never
        self.lanes = np.zeros(words, np.uint32)
        self.line = np.zeros(words, np.int64)
        # Readers are the CTA's own warps, and their products.
        first = rank * warps * AGENTS + np.arange(warps) * AGENTS
        self.readers = np.concatenate((first + LANES, first + PRODUCTS))
        self.column = {agent: i for i, agent in enumerate(self.readers.tolist())}
        self.read = np.zeros((2 * warps, words), np.int64)
        self.read_by = np.zeros((2 * warps, words), np.uint32)

    def reads(self, access: Access, words: Words) -> None:
        self.check_writes(access, words, "reads")
        column = self.column[access.agent]
        times, lanes = self.read[column], self.read_by[column]
        old = times[words.at] <= access.clock.whole[access.agent]  # the whole warp knows those
        lanes[words.at[old]] = 0
        np.bitwise_or.at(lanes, words.at, words.lanes)
        times[words.at] = access.time

    def writes(self, access: Access, words: Words, narrow: bool = False) -> None:
        """narrow: other lanes of the warp may write other bytes of the same words."""
        self.check_writes(access, words, "writes", narrow)
        self.check_reads(access, words)
        same = self.writer[words.at] == access.agent
        same &= self.written[words.at] > access.clock.whole[access.agent]
        self.lanes[words.at[~same] if narrow else words.at] = 0
        np.bitwise_or.at(self.lanes, words.at, words.lanes)
        self.writer[words.at], self.written[words.at] = access.agent, access.time
        self.line[words.at] = access.line

    def check_writes(self, access: Access, words: Words, what: str, narrow: bool = False) -> None:
        """Raise unless the last writes to these words are known."""
        agents, times = self.writer[words.at], self.written[words.at]
        if (times <= access.clock.whole[agents]).all():
            return
        lanes = self.lanes[words.at]
        own = access.is_of_lanes & (agents == access.agent) & (narrow | (lanes & ~words.lanes == 0))
        unknown = ~(own | access.clock.knows(agents, times, lanes))
        if unknown.any():
            i = int(unknown.argmax())
            at, line = words.at[i], self.line[words.at[i]]
            raise Hazard(self.race(access, at, what, int(agents[i]), f"wrote in line {line}"))

    def check_reads(self, access: Access, words: Words) -> None:
        """Raise unless the reads of these words are known."""
        times = self.read[:, words.at]
        readers = self.readers[:, None]
        if (times <= access.clock.whole[readers]).all():
            return
        lanes = self.read_by[:, words.at]
        own = (readers == access.agent) & (lanes & ~words.lanes == 0)
        unknown = ~(own | access.clock.knows(readers, times, lanes))
        if unknown.any():
            column, i = np.argwhere(unknown)[0]
            reader = int(self.readers[column])
            raise Hazard(self.race(access, words.at[i], "writes", reader, "read"))

    def race(self, access: Access, word: int, what: str, other: int, did: str) -> str:
        return (
            f"{self.name}: a race: {self.agent(access.agent)} {what} word {word:#x}, which"
            f" {self.agent(other)} {did}"
        )

    def agent(self, agent: int) -> str:
        warp, kind = divmod(agent, AGENTS)
        rank, number = divmod(warp, self.warps)
        return f"{('', 'a copy of ', 'a product of ')[kind]}CTA {rank} warp {number}"
