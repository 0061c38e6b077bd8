"""An entry of a long row as one integer: its key, then its index, inverted.

    composite(a) > composite(b)  iff  a ranks before b

The entries of a row have different composites, so that a search for the k-th best among them always
ends, and a sort of them has one result, whatever the data and the order of events. 0 is below all.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, Uint64

from cute_router.spec import MAX_LENGTH
from cute_router.topk.key import key
from cute_router.topk.ptx import opaque
from cute_router.topk.radix_config import INDEX_BITS

BITS = 32 + INDEX_BITS


@cute.jit
def composite(value: Float32, index: Int32) -> Uint64:
    """The composite of the entry at `index`."""
    inverted = Uint32(Int32(MAX_LENGTH - 1) - index)
    # Else half of the key is kept from where the entry was counted to here, for many, and spilled.
    value = opaque(value.bitcast(Int32)).bitcast(Float32)
    return (Uint64(key(value, nan="first")) << INDEX_BITS) | Uint64(inverted)


@cute.jit
def index_of(entry: Uint64) -> Int32:
    """The index of an entry."""
    return Int32(MAX_LENGTH - 1) - (Int32(entry) & Int32(MAX_LENGTH - 1))
