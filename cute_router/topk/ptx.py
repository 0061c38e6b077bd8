"""PTX of the selection kernels that the DSL has no word for, each instruction named once.

For `shf` it has one, whose halves are the other way round than its own description says (4.8.1).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, Uint64


@cute.jit
def count_one(counter: cute.Pointer) -> None:
    """Add 1 to a counter in shared memory.

    Of a constant 1 and without a result the hardware adds a warp's equal addresses as one.
    """
    cute.arch.inline_ptx(
        "red.relaxed.cta.shared::cta.add.u32 [{$r0}], 1;", read_only_args=[counter]
    )


@cute.jit
def opaque(word: Int32) -> Int32:
    """The same word, of which the compiler knows nothing: no instruction in the end."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[word]
    )


def lowest_bit(bits: Int32) -> Int32:
    """The place of the lowest bit that is set, of one at least."""
    return cute.arch.popc((bits & -bits) - 1)


@cute.jit
def shift_in(bits: Uint32, word: Uint32) -> Uint32:
    """`bits` shifted up by one, to take in the top bit of `word`."""
    return cute.arch.inline_ptx(
        "shf.l.wrap.b32 {$w0}, {$r0}, {$r1}, 1;",
        write_only_types=[Uint32],
        read_only_args=[word, bits],
    )


@cute.jit
def reserve(counter: cute.Pointer, places: Int32) -> Int32:
    """Add to a counter in shared memory; its value before."""
    return cute.arch.inline_ptx(
        "atom.relaxed.cta.shared::cta.add.u32 {$w0}, [{$r0}], {$r1};",
        write_only_types=[Int32],
        read_only_args=[counter, places],
    )


@cute.jit
def add_to_peer(counter: cute.Pointer, peer: Int32, count: Int32) -> None:
    """Add to the counter that stands at this place in CTA `peer` of the cluster."""
    cute.arch.inline_ptx(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, {$r0}, {$r1};\n\t"
        "red.relaxed.cluster.shared::cluster.add.u32 [there], {$r2};\n\t}",
        read_only_args=[counter, peer, count],
    )


@cute.jit
def store_to_peer(word: cute.Pointer, peer: Int32, value: Int32) -> None:
    """Store to the word that stands at this place in CTA `peer` of the cluster."""
    cute.arch.inline_ptx(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, {$r0}, {$r1};\n\t"
        "st.shared::cluster.b32 [there], {$r2};\n\t}",
        read_only_args=[word, peer, value],
    )


@cute.jit
def store_long_to_peer(word: cute.Pointer, peer: Int32, value: Uint64) -> None:
    """The same for 64 bits."""
    cute.arch.inline_ptx(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, {$r0}, {$r1};\n\t"
        "st.shared::cluster.b64 [there], {$r2};\n\t}",
        read_only_args=[word, peer, value],
    )


@cute.jit
def push_marked(
    at: Int32, marks: Uint32, bit: cutlass.Constexpr, word: Int32, name: Int32
) -> Int32:
    """Store two words to shared memory if a bit of `marks` is set; where the next two would go.

    Without a branch, which the compiler makes of an `if` around a store; the words one by one, for
    of two at once the first would have to be in an even register, and the next one kept free; and
    with a sum that is a new register, for the old one is read late.
    """
    return cute.arch.inline_ptx(
        "{\n\t.reg .pred p;\n\t.reg .b32 m;\n\t"
        f"and.b32 m, {{$r1}}, {1 << bit:#x};\n\t"
        "setp.ne.b32 p, m, 0;\n\t"
        "@p st.shared.b32 [{$r0}], {$r2};\n\t"
        "@p st.shared.b32 [{$r0}+4], {$r3};\n\t"
        "selp.b32 m, 8, 0, p;\n\t"
        "add.s32 {$w0}, {$r0}, m;\n\t}",
        write_only_types=[Int32],
        read_only_args=[at, marks, word, name],
    )
