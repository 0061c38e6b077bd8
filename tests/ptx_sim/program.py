"""Instructions to Python: one function per basic block, each instruction a NumPy operation.

A value is an array of 32 lanes. Registers live in a list; within a block they are local variables,
and at its end those that are live are written back for the lanes that were active. So only what
has an effect beyond registers needs the mask of active lanes.

A block ends before a label, after a branch, and after an instruction that may have to wait (a
"gate"): its function then returns what is waited for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ptx_sim import lanes
from ptx_sim.errors import Hazard, Unsupported
from ptx_sim.operations import Emitter, destinations, is_gate, sources
from ptx_sim.parser import Entry, Instruction, Label, parse


@dataclass
class Block:
    """A basic block: control goes to `target`, if it `exits` nowhere, else to the block behind.

    If it is `conditional`, `run` returns the lanes that branch; of a `gate`, what they wait for.
    """

    instructions: list[Instruction] = field(default_factory=list)
    run: Callable[..., Any] | None = None
    target: int | None = None
    conditional: bool = False
    gate: bool = False
    exits: bool = False


@dataclass
class Program:
    """An executable kernel."""

    entry: Entry
    blocks: list[Block]
    poison: list[np.ndarray]  # what the registers hold at first


@lru_cache(maxsize=16)
def load(ptx: str) -> Program:
    """Parse and translate."""
    entry = parse(ptx)
    check_tmem_loads(entry)
    blocks = split(entry.body)
    slots: dict[str, int] = {}
    for block in blocks:
        for instruction in block.instructions:
            for name in (*destinations(instruction), *sources(instruction)):
                slots.setdefault(name, len(slots))
    live = live_after(blocks)
    chunks, namespace = [], {"np": np, "lanes": lanes}
    for i, block in enumerate(blocks):
        emitter = Emitter(slots, namespace)
        chunks.append(emitter.function(f"block_{i}", block.instructions, live[i]))
    exec(compile("\n".join(chunks), f"<{entry.name[:40]}>", "exec"), namespace)
    for i, block in enumerate(blocks):
        block.run = namespace[f"block_{i}"]
    return Program(entry, blocks, [lanes.poison(name) for name in slots])


def split(body: list[Instruction | Label]) -> list[Block]:
    """Basic blocks in the order of the text; branch targets by index."""
    blocks, starts = [Block()], {}
    for statement in body:
        last = blocks[-1].instructions[-1:] or [None]
        ends = last[0] is not None and (ends_block(last[0]) or is_gate(last[0]))
        if isinstance(statement, Label):
            if blocks[-1].instructions:
                blocks.append(Block())
            starts[statement.name] = len(blocks) - 1
            continue
        if ends or (polls(statement) and blocks[-1].instructions):
            blocks.append(Block())
        if polls(statement):
            # The load itself stands behind a gate that looks at the address first.
            gate = Instruction(statement.line, "gate.poll", statement.operands[1:])
            blocks[-1].instructions.append(gate)
            blocks.append(Block())
        blocks[-1].instructions.append(statement)
    for block in blocks:
        last = block.instructions[-1] if block.instructions else None
        if last is None:
            continue
        block.gate = is_gate(last)
        if last.opcode.startswith("bra"):
            block.target = starts[last.operands[0].name]
            block.conditional = last.guard is not None
        elif last.opcode in ("ret", "exit"):
            if last.guard is not None:
                raise Unsupported("a predicated ret")
            block.exits = True
    return blocks


def ends_block(instruction: Instruction) -> bool:
    """Whether control may go elsewhere."""
    return instruction.opcode.split(".")[0] in ("bra", "ret", "exit")


def polls(instruction: Instruction) -> bool:
    """Whether a loop around this load may wait for another CTA's store."""
    return instruction.opcode.startswith(("ld.relaxed", "ld.acquire", "ld.volatile"))


def successors(blocks: list[Block], i: int) -> Iterator[int]:
    """Blocks that may follow block i."""
    block = blocks[i]
    if block.target is not None:
        yield block.target
    if not block.exits and (block.target is None or block.conditional) and i + 1 < len(blocks):
        yield i + 1


def live_after(blocks: list[Block]) -> list[set[str]]:
    """For each block the registers that may be read after it."""
    reads, writes = [], []
    for block in blocks:
        read: set[str] = set()
        written: set[str] = set()
        for instruction in block.instructions:
            read |= set(sources(instruction)) - written
            if instruction.guard is None:
                written |= set(destinations(instruction))
            else:
                read |= set(destinations(instruction)) - written
        reads.append(read)
        writes.append(written)
    before = [set(read) for read in reads]
    after: list[set[str]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(blocks))):
            after[i] = set().union(*(before[j] for j in successors(blocks, i)))
            found = reads[i] | (after[i] - writes[i])
            if found != before[i]:
                before[i], changed = found, True
    return after


def check_tmem_loads(entry: Entry) -> None:
    """Raise if a register that tcgen05.ld fills is used before tcgen05.wait::ld.

    Copies do not count: NVVM itself places them between the two.
    """
    filling: set[str] = set()
    for statement in entry.body:
        if isinstance(statement, Label):
            continue
        if statement.opcode.startswith("tcgen05.wait::ld"):
            filling.clear()
        elif filling.intersection(sources(statement)):
            if not statement.opcode.startswith("mov."):
                raise Hazard(
                    "a register of tcgen05.ld is used before tcgen05.wait::ld;"
                    f" {entry.source(statement.line)}"
                )
            filling.update(destinations(statement))
        if statement.opcode.startswith("tcgen05.ld"):
            filling.update(destinations(statement))
