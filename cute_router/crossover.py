"""Which of the two dense kernels serves a batch: the one whose model promises the less time.

Both models are of an H200 (`heuristics`, `prefill_heuristics`); other targets follow it.
"""

from functools import cache

from cute_router import heuristics, prefill_heuristics
from cute_router.heuristics import TOKEN_BUCKETS, decode_config
from cute_router.prefill_heuristics import prefill_config
from cute_router.spec import RouterSpec

ALWAYS = 64  # tokens, for which decode was the faster one of every router measured


@cache
def decode_tokens(num_experts: int, hidden_size: int) -> int:
    """The most tokens that the decode kernel serves; batches of more are the prefill kernel's."""
    try:
        spec = RouterSpec(num_experts, hidden_size, top_k=1)
    except ValueError:  # whichever kernel is asked will say in full what is wrong
        return ALWAYS

    def decodes(N: int) -> bool:
        few, many = decode_config(spec, N, "sm_90a"), prefill_config(spec, N, "sm_90a")
        return heuristics.cycles(few, N) <= prefill_heuristics.cycles(many, N)

    return max(N for N in TOKEN_BUCKETS if N == ALWAYS or (N > ALWAYS and decodes(N)))
