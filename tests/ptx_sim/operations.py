"""Each PTX instruction as Python source: arithmetic as an expression, effects as a call.

Arithmetic never needs the mask of active lanes (see `program`). Everything else is a function of a
warp (see `warp`), which gets the line, the mask `m`, the opcode and the operands, and returns a
tuple of destination values; a gate returns what has to be waited for, or None.
"""

from collections.abc import Callable
from typing import Any

from ptx_sim import access, collectives, copies, lanes, mma, synchronisation
from ptx_sim.errors import Unsupported
from ptx_sim.parser import Address, Immediate, Instruction, Operand, Register, Symbol, Vector

Call = Callable[..., Any]
TMA = "cp.async.bulk.tensor.2d"

# Opcode prefix -> (function, operands that are destinations). The longest prefix counts.
EFFECTS = {
    "ld.shared": (access.load_shared, 1),
    "st.shared": (access.store_shared, 0),
    "ld.global": (access.load_global, 1),
    "ld.relaxed.gpu.global": (access.load_global, 1),
    "st.global": (access.store_global, 0),
    "st.relaxed.gpu.global": (access.store_global, 0),
    "st.shared::cluster": (access.store_peer, 0),
    "atom.relaxed.gpu.global.inc.u32": (access.atomic_inc, 1),
    "atom.relaxed.cta.shared::cta.add.u32": (access.atomic_add, 1),
    "red.relaxed.cta.shared::cta.add.u32": (access.reduce_add, 0),
    "red.relaxed.cluster.shared::cluster.add.u32": (access.reduce_add, 0),
    "mapa.shared::cluster.u32": (access.mapa, 1),
    "elect.sync": (collectives.elect, 2),
    "shfl.sync": (collectives.shuffle, 1),
    "redux.sync": (collectives.reduce, 1),
    "vote.sync": (collectives.vote, 1),
    "bar.warp.sync": (synchronisation.sync_warp, 0),
    "bar.arrive": (synchronisation.bar_arrive, 0),
    "barrier.cluster.arrive": (synchronisation.cluster_arrive, 0),
    "mbarrier.init.shared": (synchronisation.barrier_init, 0),
    "mbarrier.arrive.shared": (synchronisation.barrier_arrive, 1),
    "mbarrier.arrive.release.cluster.shared::cluster": (synchronisation.barrier_arrive_peer, 0),
    "mbarrier.arrive.relaxed.cluster.shared::cluster": (synchronisation.barrier_arrive_peer, 0),
    "mbarrier.arrive.expect_tx.shared": (synchronisation.barrier_expect, 1),
    f"{TMA}.shared::c": (copies.load_tensor, 0),
    "cp.async.cg.shared.global": (copies.copy_async, 0),
    "cp.async.commit_group": (copies.copy_commit, 0),
    "cp.async.wait_group": (copies.copy_wait, 0),
    "st.async": (copies.store_async, 0),
    "griddepcontrol.wait": (synchronisation.grid_wait, 0),
    "griddepcontrol.launch_dependents": (synchronisation.nothing, 0),
    "fence.mbarrier_init": (synchronisation.fence_inits, 0),
    "fence.proxy.async": (synchronisation.fence_proxy, 0),
    "fence.acq_rel": (synchronisation.fence, 0),
    "prefetch.tensormap": (synchronisation.nothing, 0),
    "setmaxnreg": (synchronisation.nothing, 0),
    "wgmma.fence": (synchronisation.nothing, 0),
    "wgmma.commit_group": (mma.wgmma_commit, 0),
    "tcgen05.fence::before_thread_sync": (synchronisation.fence_before, 0),
    "tcgen05.fence::after_thread_sync": (synchronisation.fence_after, 0),
    "tcgen05.wait::ld": (collectives.converge, 0),
    "tcgen05.alloc": (mma.tmem_alloc, 0),
    "tcgen05.dealloc": (mma.tmem_free, 0),
    "tcgen05.relinquish_alloc_permit": (mma.tmem_relinquish, 0),
    "tcgen05.mma.cta_group::1.kind::f16": (mma.mma, 0),
    "tcgen05.commit.cta_group::1": (mma.mma_commit, 0),
    "tcgen05.ld": (mma.tmem_load, 1),
}
# The same for gates; of their destinations there is only try_wait's predicate, then true.
GATES = {
    "gate.poll": access.poll,
    "bar.sync": synchronisation.bar_sync,
    "barrier.cluster.wait": synchronisation.cluster_wait,
    "mbarrier.try_wait.parity": synchronisation.barrier_wait,
    "wgmma.mma_async": mma.wgmma,
    "wgmma.wait_group": mma.wgmma_wait,
}

COMPARE = {
    "eq": "{} == {}",
    "ne": "{} != {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "num": "~(np.isnan({}) | np.isnan({}))",
    "nan": "np.isnan({}) | np.isnan({})",
    "equ": "~({0} < {1}) & ~({0} > {1})",
    "neu": "({0} != {1}) | np.isnan({0}) | np.isnan({1})",
    "ltu": "~({} >= {})",
    "leu": "~({} > {})",
    "gtu": "~({} <= {})",
    "geu": "~({} < {})",
}
# NumPy's `!=` is true of NaN, PTX's `ne` is not.
COMPARE_FLOAT = {**COMPARE, "ne": "({0} < {1}) | ({0} > {1})"}
# Integers: the same for signed and unsigned.
INTEGER = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^", "mul": "*"}
FLOAT = {
    "add": "lanes.canonical({} + {})",
    "sub": "lanes.canonical({} - {})",
    "mul": "lanes.canonical({} * {})",
    "div": "lanes.canonical({} / {})",
    "min": "lanes.canonical(np.fmin({}, {}))",
    "max": "lanes.canonical(np.fmax({}, {}))",
    "neg": "-{}",
    "abs": "np.abs({})",
    "fma": "lanes.canonical(lanes.fma({}, {}, {}))",
    "ex2": "lanes.canonical(lanes.ex2({}))",
    "rcp": "lanes.canonical(lanes.rcp({}))",
    "sqrt": "lanes.canonical(lanes.sqrt({}))",
}
HALVES = ("f16", "bf16")


def effect(opcode: str) -> tuple[Call, int] | None:
    """(function, destinations) of an instruction that is not mere arithmetic, no gate."""
    found = [prefix for prefix in EFFECTS if opcode.startswith(prefix)]
    return EFFECTS[max(found, key=len)] if found else None


def gate(opcode: str) -> Call | None:
    """The function of a gate."""
    return next((function for prefix, function in GATES.items() if opcode.startswith(prefix)), None)


def is_gate(instruction: Instruction) -> bool:
    """Whether a warp may have to wait here."""
    return gate(instruction.opcode) is not None


def registers(operand: Operand) -> list[str]:
    """The registers that an operand names."""
    match operand:
        case Register(name):
            return [name]
        case Vector(items):
            return [name for item in items for name in registers(item)]
        case Address(base, _, coordinates):
            return registers(base) + registers(Vector(coordinates))
    return []


def destination_count(instruction: Instruction) -> int:
    """How many leading operands are written."""
    opcode = instruction.opcode
    if found := effect(opcode):
        return found[1]
    if gate(opcode):
        return 1 if opcode.startswith(("mbarrier.try_wait", "wgmma.mma_async")) else 0
    return 0 if opcode.split(".")[0] in ("bra", "ret", "exit") else 1


def destinations(instruction: Instruction) -> list[str]:
    """The registers that an instruction writes."""
    written = instruction.operands[: destination_count(instruction)]
    return registers(Vector(written))


def sources(instruction: Instruction) -> list[str]:
    """The registers that an instruction reads."""
    updates = instruction.opcode.startswith("wgmma.mma_async")  # reads what it writes
    read = instruction.operands[0 if updates else destination_count(instruction) :]
    guard = [instruction.guard.name] if instruction.guard else []
    return registers(Vector(read)) + guard


class Emitter:
    """Writes the function of one block."""

    def __init__(self, slots: dict[str, int], namespace: dict[str, object]):
        self.slots = slots
        self.namespace = namespace  # of the source: constants and what it calls go there
        self.lines: list[str] = []
        self.have: dict[tuple[str, str], str] = {}  # (register, type) -> local variable
        self.written: set[str] = set()
        self.count = 0

    def function(self, name: str, instructions: list[Instruction], live: set[str]) -> str:
        """The source of `name(w, R, m)`: warp, its registers, the mask of active lanes."""
        result = "None"
        for instruction in instructions:
            if instruction.opcode.startswith("bra"):
                if instruction.guard is not None:
                    result = self.guard(instruction)
            elif function := gate(instruction.opcode):
                result = self.gate(function, instruction)
            elif instruction.opcode not in ("ret", "exit"):
                self.emit(instruction)
        kept = sorted(self.written & live, key=self.slots.__getitem__)
        if kept:
            values = [(self.slots[r], self.get(r, lanes.register_type(r))) for r in kept]
            self.lines.append("if m is lanes.ALL:")
            self.lines += [f"    R[{slot}] = {value}" for slot, value in values]
            self.lines.append("else:")
            self.lines += [f"    R[{s}] = np.where(m, {v}, R[{s}])" for s, v in values]
        self.lines.append(f"return {result}")
        return "\n    ".join([f"def {name}(w, R, m):", *self.lines])

    # --- values ---------------------------------------------------------------------------------

    def get(self, register: str, kind: str) -> str:
        """A local variable with the register's bits as `kind`."""
        if (register, kind) not in self.have:
            natural = lanes.register_type(register)
            known = next((k for r, k in self.have if r == register), None)
            if known is None:
                self.have[register, natural] = self.local(f"R[{self.slots[register]}]")
                known = natural
            if known != kind:
                value = self.have[register, known]
                if lanes.DTYPES[kind].itemsize == lanes.DTYPES[known].itemsize:
                    expression = f"{value}.view('{kind}')"
                else:  # the low bits of a wider register
                    expression = f"{value}.astype('u{kind[1]}').view('{kind}')"
                self.have[register, kind] = self.local(expression)
        return self.have[register, kind]

    def put(self, register: str, kind: str, expression: str) -> None:
        """Give the register a new value, of type `kind`."""
        value = self.local(expression)
        for key in [key for key in self.have if key[0] == register]:
            del self.have[key]
        self.have[register, kind] = value
        self.written.add(register)

    def local(self, expression: str) -> str:
        self.count += 1
        self.lines.append(f"v{self.count} = {expression}")
        return f"v{self.count}"

    def constant(self, value: int, kind: str) -> str:
        name = f"{kind}_{value:x}".replace("-", "m")
        self.namespace[name] = lanes.constant(value, kind)
        return name

    def value(self, operand: Operand, kind: str) -> str:
        """An operand as `kind`."""
        match operand:
            case Register(name):
                return self.get(name, kind)
            case Immediate(value):
                return self.constant(value, kind)
            case Symbol(name):
                return f"w.symbols['{name}'].astype('{kind}')"
        raise Unsupported(f"{operand} as a value")

    def guard(self, instruction: Instruction) -> str:
        """The lanes that a guard lets through."""
        assert instruction.guard is not None
        value = self.get(instruction.guard.name, "p")
        return f"~{value}" if instruction.negated else value

    # --- instructions ---------------------------------------------------------------------------

    def emit(self, instruction: Instruction) -> None:
        """One instruction that is neither branch nor gate."""
        if found := effect(instruction.opcode):
            self.effect(instruction, *found)
            return
        if instruction.opcode.startswith("ld.param"):
            size = int(instruction.parts[-1][1:]) // 8
            target, address = instruction.operands
            for i, name in enumerate(registers(target)):
                place = f"'{address.base.name}', {address.offset + i * size}, {size}"
                self.put(name, f"u{size}", self.call(access.load_param, [place]))
            return
        if instruction.parts[0] == "mov" and isinstance(instruction.operands[0], Vector):
            low, high = instruction.operands[0].items
            size = int(instruction.parts[-1][1:]) // 8
            whole, half = f"u{size}", f"u{size // 2}"
            value = self.value(instruction.operands[1], whole)
            self.put(low.name, half, f"{value}.astype('{half}')")
            self.put(
                high.name, half, f"({value} >> {self.constant(4 * size, whole)}).astype('{half}')"
            )
            return
        kind, expression = self.arithmetic(instruction)
        target = instruction.operands[0].name
        if instruction.guard is not None:
            old = self.get(target, kind)
            expression = f"np.where({self.guard(instruction)}, {expression}, {old})"
        self.put(target, kind, expression)

    def arithmetic(self, instruction: Instruction) -> tuple[str, str]:
        """(type, expression) of a result."""
        parts, inputs = instruction.parts, instruction.operands[1:]
        name, last = parts[0], parts[-1]
        if name == "mov" and isinstance(inputs[0], Vector):
            size = int(last[1:]) // 8
            low, high = (self.value(item, f"u{size // 2}") for item in inputs[0].items)
            return f"u{size}", f"lanes.pair({low}, {high})"
        if name == "cvt":
            return self.convert(parts, inputs[0])
        if last == "pred":
            values = [self.value(item, "p") for item in inputs]
            form = {"mov": "{}", "not": "~{}", "and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}"}
            return "p", form[name].format(*values)
        if name == "setp" and len(parts) != 3:
            raise Unsupported(instruction.opcode)
        if name == "setp" and last in HALVES:
            values = [f"lanes.{last}({self.value(item, 'u2')})" for item in inputs]
            return "p", COMPARE_FLOAT[parts[1]].format(*values)
        if name in ("add", "sub") and parts[1:-1] == ["rn", "f32"] and last in HALVES:  # of fp32
            a, b = f"lanes.{last}({self.value(inputs[0], 'u2')})", self.value(inputs[1], "f4")
            return "f4", FLOAT[name].format(a, b)
        if last == "f32x2":  # two of fp32 in a register of 64 bits
            halves = [f"{self.value(item, 'u8')}.view('f4')" for item in inputs]
            return "u8", f"({FLOAT[name].format(*halves)}).view('u8')"
        kind = {"b": "u", "u": "u", "s": "i", "f": "f"}[last[0]] + str(int(last[1:]) // 8)
        if name == "setp":
            form = (COMPARE_FLOAT if kind[0] == "f" else COMPARE)[parts[1]]
            return "p", form.format(*(self.value(item, kind) for item in inputs))
        if name == "selp":
            a, b = (self.value(item, kind) for item in inputs[:2])
            return kind, f"np.where({self.value(inputs[2], 'p')}, {a}, {b})"
        if name in ("mov", "cvta"):
            return kind, self.value(inputs[0], kind)
        if kind[0] == "f":
            values = [self.value(item, kind) for item in inputs]
            if name not in FLOAT:
                raise Unsupported(instruction.opcode)
            return kind, FLOAT[name].format(*values)
        return self.integer(instruction, kind)

    def integer(self, instruction: Instruction, kind: str) -> tuple[str, str]:
        """Integer arithmetic."""
        name, parts, inputs = instruction.parts[0], instruction.parts, instruction.operands[1:]
        wide = kind[0] + str(2 * int(kind[1]))
        if name in ("mul", "mad") and parts[1] == "wide":
            a, b = (f"{self.value(item, kind)}.astype('{wide}')" for item in inputs[:2])
            sum_ = f" + {self.value(inputs[2], wide)}" if name == "mad" else ""
            return wide, f"{a} * {b}{sum_}"
        if name == "mul" and parts[1] == "hi":
            a, b = (self.value(item, kind) for item in inputs)
            return kind, f"lanes.high({a}, {b}, '{wide}')"
        if name == "mad":
            a, b, c = (self.value(item, kind) for item in inputs)
            return kind, f"{a} * {b} + {c}"
        if name == "shf" and parts[1:3] == ["l", "wrap"]:
            a, b, c = (self.value(item, "u4") for item in inputs)
            return kind, f"lanes.funnel({a}, {b}, {c})"
        if name == "dp2a" and parts[2:] == ["u32", "u32"]:
            a, b, c = (self.value(item, "u4") for item in inputs)
            return kind, f"lanes.dot_halves({a}, {b}, {16 * (parts[1] == 'hi')}) + {c}"
        if name == "prmt" and len(parts) == 2:
            a, b, c = (self.value(item, "u4") for item in inputs)
            return kind, f"lanes.permute({a}, {b}, {c})"
        if name == "lop3":
            a, b, c = (self.value(item, kind) for item in inputs[:3])
            return kind, f"lanes.lop3({a}, {b}, {c}, {inputs[3].value})"
        if name in ("shl", "shr"):
            count = self.value(inputs[1], "u4")
            count = count if kind == "u4" else f"{count}.astype('{kind}')"
            return kind, f"{self.value(inputs[0], kind)} {'<<' if name == 'shl' else '>>'} {count}"
        if name in INTEGER:
            unsigned = "u" + kind[1]
            a, b = (self.value(item, unsigned) for item in inputs)
            return unsigned, f"{a} {INTEGER[name]} {b}"
        values = [self.value(item, kind) for item in inputs]
        forms = {"min": "np.minimum({}, {})", "max": "np.maximum({}, {})", "neg": "-{}"}
        forms |= {"not": "~{}", "abs": "np.abs({})", "clz": "lanes.leading_zeros({})"}
        forms["bfind"] = "np.uint32(31) - lanes.leading_zeros({})"
        forms["popc"] = "np.bitwise_count({}).astype('u4')"
        if name == "div":
            return kind, f"lanes.quotient({values[0]}, {values[1]})"
        if name == "max" and parts[1] == "relu":
            return kind, f"np.maximum({forms['max'].format(*values)}, 0)"
        if name not in forms:
            raise Unsupported(instruction.opcode)
        return kind, forms[name].format(*values)

    def convert(self, parts: list[str], source: Operand) -> tuple[str, str]:
        """cvt between integers, to fp32, and from it to bf16."""
        if parts[-2] == "f32" and parts[-1] in HALVES:
            return "f4", f"lanes.{parts[-1]}({self.value(source, 'u2')})"
        if parts[1:] == ["rn", "bf16", "f32"]:
            return "u2", f"lanes.to_bf16({self.value(source, 'f4')})"
        to, of = (p[0].replace("s", "i") + str(int(p[1:]) // 8) for p in parts[-2:])
        if "f" in of or (to[0] == "f" and parts[1] != "rn"):
            raise Unsupported(".".join(parts))
        value = self.value(source, of)
        kind = to if to[1] != "1" else to[0] + "2"  # the least register has 16 bits
        return kind, f"{value}.astype('{to}')" + (f".astype('{kind}')" if kind != to else "")

    # --- effects --------------------------------------------------------------------------------

    def arguments(self, operands: tuple[Operand, ...], literal: str = "u4") -> list[str]:
        """Operands as these functions take them: arrays, sums for addresses, tuples."""
        found = []
        for operand in operands:
            match operand:
                case Address(base, offset, coordinates):
                    kind = lanes.register_type(base.name)
                    text = self.value(base, kind)
                    found.append(f"{text} + {self.constant(offset, kind)}" if offset else text)
                    if coordinates:
                        found.append(f"({', '.join(self.value(c, 'i4') for c in coordinates)})")
                case Vector(items):
                    found.append(f"({', '.join(self.arguments(items, literal))},)")
                case Register(name):
                    found.append(self.get(name, lanes.register_type(name)))
                case Immediate(value):
                    found.append(self.constant(value, literal))
        return found

    def call(self, function: Call, arguments: list[str]) -> str:
        """A call of a function of a warp."""
        name = function.__name__
        known = self.namespace.setdefault(name, function)
        assert known is function, f"two functions are called {name}"
        return f"{name}({', '.join(['w', *arguments])})"

    def effect(self, instruction: Instruction, function: Call, count: int) -> None:
        """The call of an effect, and its results into registers."""
        targets = registers(Vector(instruction.operands[:count]))
        literal = "u8" if instruction.parts[0] == "st" and instruction.parts[-1] == "b64" else "u4"
        arguments = self.arguments(instruction.operands[count:], literal)
        mask = f"m & {self.guard(instruction)}" if instruction.guard else "m"
        head = [str(instruction.line), mask, repr(instruction.opcode)]
        call = self.call(function, head + arguments)
        if not targets:
            self.lines.append(call)
            return
        if instruction.guard is not None:
            raise Unsupported(f"@ {instruction.opcode}")
        results = self.local(call)
        for i, target in enumerate(targets):
            kind = lanes.register_type(target)
            # A register may be wider than what is loaded.
            extended = ".view('i4').astype('i8').view('u8')"
            signed = instruction.parts[-1] == "s32"
            widened = "" if kind != "u8" else extended if signed else ".astype('u8')"
            self.put(target, kind, f"{results}[{i}]{widened}")

    def gate(self, function: Call, instruction: Instruction) -> str:
        """The call that ends a block whose last instruction may have to wait."""
        if instruction.guard is not None:
            raise Unsupported(f"@ {instruction.opcode}")
        operands = instruction.operands
        head = [str(instruction.line), "m", repr(instruction.opcode)]
        if function is synchronisation.barrier_wait:
            self.put(operands[0].name, "p", "lanes.ALL")
            operands = operands[1:]
        if function is mma.wgmma:  # works on the registers themselves, and later
            accumulators = registers(operands[0])
            for register in accumulators:
                self.get(register, "u4")
            head.append(repr([self.slots[register] for register in accumulators]))
            operands = operands[1:]
        return self.call(function, head + self.arguments(operands))
