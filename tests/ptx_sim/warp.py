"""A warp: its lanes' control flow, and the instructions that do more than arithmetic.

The methods that `operations.EFFECTS` and `operations.GATES` name take the line, the mask of active
lanes, the opcode and the operands. Effects return a tuple of results; gates return what has to be
waited for, or None.
"""

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ptx_sim import lanes, tensor
from ptx_sim.barriers import Mbarrier, Wait
from ptx_sim.errors import Hazard, Misuse, Unsupported
from ptx_sim.memory import SHARED_BASE, WINDOW, Poll, Region
from ptx_sim.proxies import STRANGERS, Issue
from ptx_sim.tensor import TensorMap

if TYPE_CHECKING:
    from ptx_sim.machine import Cta

Lanes = np.ndarray


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

    # --- control flow ---------------------------------------------------------------------------

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

    def nothing(self, line: int, m: Lanes, opcode: str, *_operands: Lanes) -> tuple:
        """Fences and hints, which have no effect here."""
        return ()

    def converge(self, line: int, m: Lanes, opcode: str, *_mask: Lanes) -> tuple:
        self.whole(line, m, opcode)
        return ()

    # --- fences, which have no effect here but whose absence is a hazard -------------------------

    def fence_inits(self, line: int, m: Lanes, opcode: str) -> tuple:
        self.inits_fenced = True
        return ()

    def fence_proxy(self, line: int, m: Lanes, opcode: str) -> tuple:
        if not opcode.endswith(".global"):
            self.cta.shared.proxies.fence(self.threads[m], self.tick())
        return ()

    def tick(self) -> int:
        """A new time."""
        self.machine.time += 1
        return self.machine.time

    def issue(self, lane: int) -> Issue:
        """What the async proxy has to know of an operation that a lane issues."""
        fenced = self.cta.shared.proxies.fenced[self.threads[lane]]
        return Issue(self.machine.time, int(fenced))

    def fence_before(self, line: int, m: Lanes, opcode: str) -> tuple:
        self.tmem_fenced_before = True
        return ()

    def fence_after(self, line: int, m: Lanes, opcode: str) -> tuple:
        self.tmem_fenced_after = True
        return ()

    def synchronise(self) -> None:
        """This warp meets others: order what it did in TMEM, and will do, by fences."""
        if not self.tmem_fenced_before:
            raise Hazard("TMEM was read, with no tcgen05.fence::before_thread_sync since")
        self.tmem_fenced_after = False

    # --- exchange between lanes -----------------------------------------------------------------

    def elect(self, line: int, m: Lanes, opcode: str, _mask: Lanes) -> tuple:
        self.whole(line, m, opcode)
        return lanes.constant(self.leader, "u4"), np.equal(lanes.LANES, self.leader)

    def shuffle(self, line: int, m: Lanes, opcode: str, a, b, c, _mask) -> tuple:
        self.whole(line, m, opcode)
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

    def reduce(self, line: int, m: Lanes, opcode: str, a: Lanes, _mask: Lanes) -> tuple:
        self.whole(line, m, opcode)
        _, _, operation, kind = opcode.split(".")
        function = {"min": np.min, "max": np.max, "add": np.sum}[operation]
        typed = a.view(np.int32) if kind == "s32" else a
        return (lanes.constant(int(function(typed)), "u4"),)

    def vote(self, line: int, m: Lanes, opcode: str, predicate: Lanes, _mask: Lanes) -> tuple:
        self.whole(line, m, opcode)
        if opcode == "vote.sync.any.pred":
            return (np.full(lanes.WARP, predicate.any()),)
        if opcode == "vote.sync.ballot.b32":
            bits = np.packbits(predicate, bitorder="little").view(np.uint32)
            return (lanes.constant(int(bits[0]), "u4"),)
        raise Unsupported(opcode)

    # --- loads and stores -----------------------------------------------------------------------

    def load_param(self, name: str, offset: int, size: int) -> Lanes:
        value = self.machine.params[name]
        if isinstance(value, TensorMap):
            raise Misuse(f"the tensor map {value.name} is opaque")
        return lanes.constant(int.from_bytes(value[offset : offset + size], "little"), f"u{size}")

    def words(self, opcode: str) -> int:
        """Words of 32 bits that a load or store moves for each lane."""
        parts = opcode.split(".")
        size = {"b32": 1, "u32": 1, "s32": 1, "f32": 1, "b64": 2}.get(parts[-1])
        if size is None:
            raise Unsupported(opcode)
        return size * (int(parts[-2][1]) if parts[-2] in ("v2", "v4") else 1)

    def loaded(self, opcode: str, region: Region, address: Lanes, m: Lanes) -> tuple:
        """What a load gets, one array for each destination."""
        if opcode.endswith(".b16"):
            return (region.load_half(address, m),)
        if opcode.endswith(".b8"):
            return (region.load_byte(address, m),)
        words = region.load(address, m, self.words(opcode))
        if not opcode.endswith(".b64"):
            return words
        return tuple(lanes.pair(*words[i : i + 2]) for i in range(0, len(words), 2))

    def stored(self, opcode: str, value) -> tuple:
        """The words that a store writes."""
        values = value if isinstance(value, tuple) else (value,)
        words = tuple(word for v in values for word in lanes.halves(v))
        if len(words) != self.words(opcode):
            raise Unsupported(opcode)
        return words

    def load_shared(self, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
        self.line = line
        return self.loaded(opcode, self.cta.shared, address, m)

    def store_shared(self, line: int, m: Lanes, opcode: str, address: Lanes, value) -> tuple:
        self.line = line
        if m.any():
            words = self.stored(opcode, value)
            self.cta.shared.store_generic(address, m, words, self.threads, self.tick())
        return ()

    def store_peer(self, line: int, m: Lanes, opcode: str, address: Lanes, value) -> tuple:
        self.line = line
        for cta, active in self.peers(address, m):
            words = self.stored(opcode, value)
            cta.shared.store_generic(address, active, words, STRANGERS, self.tick())
        return ()

    def peers(self, address: Lanes, m: Lanes):
        """The CTAs that the lanes address, each with the lanes that do."""
        ranks = address >> np.uint32(WINDOW)
        for rank in set(ranks[m].tolist()):
            active = m & (ranks == rank)
            cta = self.cta.cluster.cta(int(address[active.argmax()]))
            cta.alive(f"{self} reaches into its shared memory")
            yield cta, active

    def atomic_add(self, line: int, m: Lanes, opcode: str, address: Lanes, value: Lanes) -> tuple:
        self.line = line
        old = np.zeros(lanes.WARP, np.uint32)
        shared = self.cta.shared
        index = shared.index(address, m, 1)
        for lane in np.flatnonzero(m):
            old[lane] = shared.words[index[lane]]
            shared.words[index[lane]] += value[lane]
        return (old,)

    def reduce_add(self, line: int, m: Lanes, opcode: str, address: Lanes, value: Lanes) -> tuple:
        self.line = line
        for cta, active in self.peers(address, m):
            index = cta.shared.index(address, active, 1)
            np.add.at(cta.shared.words, index[active], value[active])
        return ()

    def array(self, address: Lanes, m: Lanes):
        """The global array that the lanes address, if they may touch it already."""
        array = self.machine.memory.array(address, m)
        if array.name in self.machine.dependent and not self.grid_waited:
            raise Hazard(f"{array.name} is touched before griddepcontrol.wait")
        return array

    def load_global(self, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
        self.line = line
        if not m.any():
            raise Unsupported(f"{opcode} by no lane")
        return self.loaded(opcode, self.array(address, m), address, m)

    def store_global(self, line: int, m: Lanes, opcode: str, address: Lanes, value) -> tuple:
        self.line = line
        if not m.any():
            return ()
        array = self.array(address, m)
        if opcode.endswith(".b16"):
            array.store_half(address, m, value)
            return ()
        values = self.stored(opcode, value)
        array.index(address, m, len(values))  # bounds and alignment of the whole
        if ".relaxed." not in opcode:
            array.store(address, m, values)
            return ()
        for i, word in enumerate(values):  # others see each word on its own, in any order
            at = address + np.uint64(4 * i)
            self.machine.engine.submit(partial(array.store, at, m, (word,)))
        return ()

    def atomic_inc(self, line: int, m: Lanes, opcode: str, address: Lanes, last: Lanes) -> tuple:
        self.line = line
        old = np.zeros(lanes.WARP, np.uint32)
        array = self.machine.memory.array(address, m)  # a ticket may be drawn before the wait
        for lane in np.flatnonzero(m):
            one = np.equal(lanes.LANES, lane)
            (words,) = array.load(address, one, 1)
            old[lane] = words[lane]
            new = 0 if old[lane] >= last[lane] else old[lane] + 1
            array.store(address, one, (np.full(lanes.WARP, new, np.uint32),))
        return (old,)

    def poll(self, line: int, m: Lanes, opcode: str, address: Lanes) -> Poll | None:
        """The same load again, of what nobody has stored to since, waits for a store."""
        self.line = line
        array = self.array(address, m)
        packets = (address[m] - np.uint64(array.base)) >> np.uint64(4)
        if packets.max() >= len(array.versions):
            return None  # out of bounds: the load will say so
        poll = Poll(array, packets)
        key = (line, packets.tobytes(), poll.stamp)
        again, self.last_poll = key == self.last_poll, key
        return poll if again else None

    def grid_wait(self, line: int, m: Lanes, opcode: str) -> tuple:
        self.grid_waited = True
        return ()

    # --- cp.async -------------------------------------------------------------------------------

    def copy_async(self, line: int, m: Lanes, opcode: str, to, source, whole, size) -> tuple:
        """16 bytes of each lane, or as many zeros."""
        self.line = line
        if (whole[m] != 16).any() or ((size[m] != 16) & (size[m] != 0)).any():
            raise Unsupported(f"{opcode} of neither 16 bytes nor none")
        reads = m & (size == 16)
        shared, array = self.cta.shared, self.array(source, reads) if reads.any() else None
        shared.index(to, m, 4)  # out of bounds: say so here
        if array is not None:
            array.index(source, reads, 4)

        def land() -> None:
            self.cta.alive(f"a cp.async of {self} lands")
            values = (np.zeros(lanes.WARP, np.uint32),) * 4
            if array is not None:
                words = array.load(source, reads, 4)
                values = tuple(np.where(reads, word, 0).astype(np.uint32) for word in words)
            shared.store_generic(to, m, values, self.threads, self.tick())

        self.copies[-1].append(land)
        self.machine.engine.submit(land)
        return ()

    def copy_commit(self, line: int, m: Lanes, opcode: str) -> tuple:
        self.whole(line, m, opcode)
        self.copies.append([])
        return ()

    def copy_wait(self, line: int, m: Lanes, opcode: str, pending: Lanes) -> tuple:
        """The oldest groups have landed, until only `pending` are under way."""
        self.whole(line, m, opcode)
        while len(self.copies) - 1 > int(pending[0]):
            for land in self.copies.popleft():
                self.machine.engine.finish(land)
        return ()

    # --- clusters -------------------------------------------------------------------------------

    def mapa(self, line: int, m: Lanes, opcode: str, address: Lanes, rank: Lanes) -> tuple:
        self.line = line
        if (rank[m] >= self.machine.cluster_size).any():
            raise Misuse(f"mapa to CTA {rank[m].max()} of {self.machine.cluster_size}")
        offset = address & np.uint32((1 << WINDOW) - 1)
        return (offset | rank << np.uint32(WINDOW),)

    def store_async(self, line: int, m: Lanes, opcode: str, address, value, barrier) -> tuple:
        self.line = line
        self.words(opcode)
        values = value if isinstance(value, tuple) else (value,)
        for target in set(barrier[m].tolist()):
            active = m & (barrier == target)
            cta = self.cta.cluster.cta(target)

            def arrive(cta=cta, active=active, target=target) -> None:
                cta.alive(f"a st.async of {self} arrives")
                cta.shared.store_generic(address, active, values, STRANGERS, self.tick())
                signal = cta.barrier(target)
                signal.remote |= cta is not self.cta
                signal.complete(4 * len(values) * int(active.sum()))

            self.machine.engine.submit(arrive)
        return ()

    def cluster_arrive(self, line: int, m: Lanes, opcode: str) -> tuple:
        self.whole(line, m, opcode)
        if not self.inits_fenced:
            raise Hazard("peers are told of mbarriers without fence.mbarrier_init")
        if self.cluster_generation is not None:
            raise Misuse("barrier.cluster.arrive twice without a wait")
        self.cluster_generation = self.cta.cluster.barrier.generation
        self.cta.cluster.barrier.arrive(self)
        return ()

    def cluster_wait(self, line: int, m: Lanes, opcode: str) -> Wait:
        self.whole(line, m, opcode)
        generation, self.cluster_generation = self.cluster_generation, None
        if generation is None:
            raise Misuse("barrier.cluster.wait without an arrival")
        barrier = self.cta.cluster.barrier
        return Wait(barrier, lambda: barrier.generation != generation)

    # --- barriers of the CTA --------------------------------------------------------------------

    def bar_arrive(self, line: int, m: Lanes, opcode: str, number: Lanes, count: Lanes) -> tuple:
        self.whole(line, m, opcode)
        self.synchronise()
        self.cta.named_barrier(int(number[0])).arrive(lanes.WARP, int(count[0]))
        return ()

    def bar_sync(self, line: int, m: Lanes, opcode: str, number: Lanes, *count: Lanes) -> Wait:
        self.whole(line, m, opcode)
        self.synchronise()
        barrier = self.cta.named_barrier(int(number[0]))
        generation = barrier.generation
        expected = int(count[0][0]) if count else lanes.WARP * len(self.cta.warps)
        barrier.arrive(lanes.WARP, expected)
        return Wait(barrier, lambda: barrier.generation != generation)

    def barrier_init(self, line: int, m: Lanes, opcode: str, address: Lanes, count) -> tuple:
        self.line = line
        for lane in np.flatnonzero(m):
            at = int(address[lane])
            self.cta.shared.offset(at)
            if at % 8:
                raise Misuse(f"an mbarrier at {at:#x}: not aligned to 8 bytes")
            name = f"{at - SHARED_BASE & ((1 << WINDOW) - 1)} of {self.cta}"
            self.cta.barriers[at] = Mbarrier(name, int(count[lane]))
            self.inits_fenced = False
        return ()

    def barrier_arrive(self, line: int, m: Lanes, opcode: str, address: Lanes, *count) -> tuple:
        self.line = line
        for lane in np.flatnonzero(m):
            self.cta.barrier(int(address[lane])).arrive(int(count[0][lane]) if count else 1)
        return (lanes.constant(0, "u8"),)

    def barrier_arrive_peer(self, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
        self.line = line
        for lane in np.flatnonzero(m):
            at = int(address[lane])
            cta = self.cta.cluster.cta(at)

            def arrive(cta=cta, at=at) -> None:
                cta.alive(f"an arrival of {self} reaches its barrier")
                signal = cta.barrier(at)
                signal.remote |= cta is not self.cta and ".release." in opcode
                signal.arrive()

            self.machine.engine.submit(arrive)
        return ()

    def barrier_expect(self, line: int, m: Lanes, opcode: str, address: Lanes, count) -> tuple:
        self.line = line
        for lane in np.flatnonzero(m):
            barrier = self.cta.barrier(int(address[lane]))
            barrier.expect(int(count[lane]))
            barrier.arrive()
        return (lanes.constant(0, "u8"),)

    def barrier_wait(self, line: int, m: Lanes, opcode: str, address, parity, *_time) -> Wait:
        self.line = line
        self.tmem_fenced_after = False
        if np.ptp(address[m]) or np.ptp(parity[m]):
            raise Unsupported("lanes of a warp that wait for different phases")
        first = m.argmax()
        barrier, wanted = self.cta.barrier(int(address[first])), int(parity[first])

        def passed() -> bool:
            if barrier.remote and ".cluster." not in opcode:
                raise Hazard(f"{barrier}: waits at CTA scope for what a peer sends")
            return barrier.passed(wanted)

        return Wait(barrier, passed)

    # --- TMA ------------------------------------------------------------------------------------

    def load_tensor(self, line: int, m: Lanes, opcode: str, to, name, at, barrier, *_hint) -> tuple:
        self.line = line
        for lane in np.flatnonzero(m):
            self.load_box(lane, to, name, at, barrier)
        return ()

    def multicast_tensor(
        self, line: int, m: Lanes, opcode: str, to, name, at, barrier, mask, *_hint
    ) -> tuple:
        """The same box to the same place of every CTA of a mask, each of whose barriers counts."""
        self.line = line
        place = np.uint32((1 << WINDOW) - 1)
        for lane in np.flatnonzero(m):
            for rank in range(16):
                if int(mask[lane]) >> rank & 1:
                    window = np.uint32(rank << WINDOW)
                    self.load_box(lane, to & place | window, name, at, barrier & place | window)
        return ()

    def load_box(self, lane: int, to: Lanes, name: Lanes, at, barrier: Lanes) -> None:
        """One TMA load, of one box to one CTA."""
        tensor_map = self.machine.maps.get(int(name[lane]))
        if tensor_map is None:
            raise Misuse(f"{int(name[lane]):#x} is no tensor map")
        if tensor_map.after_wait and not self.grid_waited:
            raise Hazard(f"{tensor_map.name} is loaded before griddepcontrol.wait")
        cta = self.cta.cluster.cta(int(to[lane]))
        target, signal = int(to[lane]), int(barrier[lane])
        column, row = (int(c[lane]) for c in at)
        span = cta.shared.span(target, tensor_map.box_bytes)
        cta.shared.proxies.load_starts(span, self.issue(lane))

        def arrive() -> None:
            cta.alive(f"a TMA load of {tensor_map.name} arrives")
            cta.shared.proxies.load_lands(span)
            tensor_map.write(cta.shared, target, tensor_map.box(column, row))
            cta.barrier(signal).complete(tensor_map.box_bytes)

        self.machine.engine.submit(arrive)

    # --- tcgen05 --------------------------------------------------------------------------------

    def tmem_alloc(self, line: int, m: Lanes, opcode: str, address: Lanes, columns) -> tuple:
        self.whole(line, m, opcode)
        first = self.cta.tmem.allocate(int(columns[0]))
        self.cta.shared.store(address, np.equal(lanes.LANES, 0), (lanes.constant(first, "u4"),))
        return ()

    def tmem_free(self, line: int, m: Lanes, opcode: str, address: Lanes, columns) -> tuple:
        self.whole(line, m, opcode)
        self.cta.tmem.free(int(address[0]), int(columns[0]))
        return ()

    def tmem_relinquish(self, line: int, m: Lanes, opcode: str) -> tuple:
        self.whole(line, m, opcode)
        self.cta.tmem.relinquished = True
        return ()

    def mma(self, line: int, m: Lanes, opcode: str, to, a, b, bits, off, add) -> tuple:
        self.line = line
        for lane in np.flatnonzero(m):
            operands = [int(v[lane]) for v in (to, a, b, bits)]
            operands += [np.array([v[lane] for v in off]), bool(add[lane]), self.issue(lane)]

            def multiply(operands=operands) -> None:
                self.cta.alive("a tcgen05.mma runs")
                tensor.tcgen05_mma(self.cta.shared, self.cta.tmem, *operands)

            self.machine.engine.submit(multiply, queue=self.cta)
        return ()

    def mma_commit(self, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
        self.line = line
        for lane in np.flatnonzero(m):
            at = int(address[lane])
            cta = self.cta.cluster.cta(at)

            def arrive(cta=cta, at=at) -> None:
                cta.alive("a tcgen05.commit arrives")
                cta.barrier(at).arrive()

            self.machine.engine.submit(arrive, queue=self.cta)
        return ()

    def tmem_load(self, line: int, m: Lanes, opcode: str, address: Lanes) -> tuple:
        self.whole(line, m, opcode)
        if not self.tmem_fenced_after:
            raise Hazard("TMEM is read without tcgen05.fence::after_thread_sync")
        if np.ptp(address):
            raise Misuse("tcgen05.ld: the lanes disagree on the address")
        self.tmem_fenced_before = False
        _, _, _, _, shape, count, _ = opcode.split(".")
        return tensor.tmem_load(self.cta.tmem, shape, int(count[1:]), int(address[0]), self.number)

    # --- wgmma ----------------------------------------------------------------------------------

    def wgmma(self, line: int, m: Lanes, opcode: str, slots: list[int], a, b, add, *flags) -> None:
        """Queue this warp's quarter of a product; it happens at the latest when waited for."""
        self.whole(line, m, opcode)
        n = int(opcode.split(".")[4].split("n")[1].split("k")[0])
        if [int(flag[0]) for flag in flags] != [1, 1, 0, 0] or len(slots) != n // 2:
            raise Unsupported(f"{opcode} with scales, transposed operands or registers")
        bits, adds = (int(a[0]), int(b[0])), bool(add[0])
        issue = self.issue(0)

        def multiply() -> None:
            product = tensor.wgmma(self.cta.shared, *bits, n, self.number, issue)
            for slot, value in zip(slots, product, strict=True):
                old = self.registers[slot].view(np.float32)
                self.registers[slot] = (old + value if adds else value).view(np.uint32)

        self.wgmmas[-1].append(multiply)

    def wgmma_commit(self, line: int, m: Lanes, opcode: str) -> tuple:
        self.whole(line, m, opcode)
        self.wgmmas.append([])
        if self.machine.policy.eager:
            self.finish_wgmmas(0)
        return ()

    def wgmma_wait(self, line: int, m: Lanes, opcode: str, pending: Lanes) -> None:
        self.whole(line, m, opcode)
        self.finish_wgmmas(int(pending[0]))

    def finish_wgmmas(self, pending: int) -> None:
        """Run the oldest groups until only `pending` are under way."""
        while len(self.wgmmas) - 1 > pending:
            for multiply in self.wgmmas.popleft():
                multiply()
