"""PTX that the DSL has no word for, each instruction named once."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

EMPTY = -1  # the bits of a word of scratch that waits for its value; see `gemm.exchange`


@cute.jit
def load_quad(ptr: cute.Pointer):
    """Four words of global memory, each current on its own; nothing is said of their order."""
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[ptr],
    )


@cute.jit
def store_quad(ptr: cute.Pointer, a: Int32, b: Int32, c: Int32, d: Int32) -> None:
    """Four words of global memory, each seen whole."""
    cute.arch.inline_ptx(
        "st.relaxed.gpu.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[ptr, a, b, c, d],
    )


@cute.jit
def draw(counter: cute.Pointer, last: int) -> Int32:
    """The counter's value before this draw; it runs 0, 1, ..., last, 0, ... and resets itself."""
    return cute.arch.inline_ptx(
        "atom.relaxed.gpu.global.inc.u32 {$w0}, [{$r0}], {$r1};",
        write_only_types=[Int32],
        read_only_args=[counter, Int32(last)],
    )


@cute.jit
def wait_for_peers(cluster: cutlass.Constexpr) -> None:
    """Wait until the barriers of all CTAs of the cluster are initialised (barrier.cluster).

    Every warp that stays waits once, and no wait may need work that another warp does behind its
    own: the hardware asks only for arrivals, but under compute-sanitizer's racecheck no wait ends
    before all threads wait or have exited.
    """
    if cutlass.const_expr(cluster > 1):
        cute.arch.cluster_wait()


@cute.jit
def wait_cluster(barrier: cute.Pointer, phase: int) -> None:
    """Wait for `phase` of a barrier that CTAs of the cluster complete, and see what they wrote.

    The DSL's own wait acquires at CTA scope, which does not cover a peer's st.async.
    """
    done = Int32(0)
    while done == 0:
        done = cute.arch.inline_ptx(
            "{\n\t.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [{$r0}], {$r1};\n\t"
            "selp.b32 {$w0}, 1, 0, p;\n\t}",
            write_only_types=[Int32],
            read_only_args=[barrier, Int32(phase)],
        )


@cute.jit
def arrive_at_peer(barrier: cute.Pointer, peer: Int32) -> None:
    """Arrive at the barrier that stands at this place in CTA `peer` of the cluster.

    The DSL's own arrival releases at CTA scope, which does not cover a peer's wait.
    """
    cute.arch.inline_ptx(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, {$r0}, {$r1};\n\t"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}",
        read_only_args=[barrier, peer],
    )


@cute.jit
def arrive_relaxed_at_peer(barrier: cute.Pointer, peer: Int32) -> None:
    """The same where threads have read and written nothing that it would have to publish.

    Without the fence of all memory that a release at cluster scope costs on Hopper.
    """
    cute.arch.inline_ptx(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, {$r0}, {$r1};\n\t"
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n\t}",
        read_only_args=[barrier, peer],
    )


@cute.jit
def at_peer(ptr: cute.Pointer, peer: Int32) -> Int32:
    """The address of the same place in the shared memory of CTA `peer` of the cluster."""
    return cute.arch.inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};",
        write_only_types=[Int32],
        read_only_args=[ptr, peer],
    )


@cute.jit
def store_async(address: Int32, words: tuple[Int32, ...], barrier: Int32) -> None:
    """Store 2 or 4 words to a peer; its barrier counts their bytes. Addresses are `at_peer`s."""
    if cutlass.const_expr(len(words) == 2):
        cute.arch.inline_ptx(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32"
            " [{$r0}], {{$r1}, {$r2}}, [{$r3}];",
            read_only_args=[address, *words, barrier],
        )
    else:
        cute.arch.inline_ptx(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
            " [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}}, [{$r5}];",
            read_only_args=[address, *words, barrier],
        )
