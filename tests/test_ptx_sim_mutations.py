"""What the simulator would catch: faults planted in the kernels' PTX, each seen under some order.

A fault counts as caught if the simulator raises or an answer is wrong. Most show under the eager
order, in which warps run in turn until they have to wait. What no order can show:

- what a memory model weaker than sequential consistency does, apart from the hazards below, the
  proxy fences of `test_ptx_sim_proxies.py` and the races of `test_ptx_sim_races.py`;
- a dropped griddepcontrol.launch_dependents: it changes when the next kernel starts, no value;
- a wrong cache hint, a wrong suspend-time hint, a prefetch of the wrong tensor map;
- a dropped tcgen05.relinquish_alloc_permit: it lets another CTA of the SM allocate sooner;
- an N of the instruction descriptor that is too large, but whose columns are allocated;
- a load warp that exits before its last loads land: the MMA warp waits for the same barriers;
- a wrong tensor map: the simulator takes its meaning from the configuration.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from ptx_sim.errors import SimulationError
from ptx_sim.launch import ptx_of, simulate
from ptx_sim.problem import assert_same, exact_inputs, expected

from cute_router.gemm.config import DecodeConfig
from cute_router.spec import RouterSpec

N = 13
RESIDENT = DecodeConfig(RouterSpec(128, 4 * 2 * 64 - 24), "sm_100a", 64, 16, 4, 2)
RING = DecodeConfig(RouterSpec(128, 4 * 5 * 64 - 24), "sm_100a", 64, 16, 4, 2)
WIDE = DecodeConfig(RouterSpec(128, 4 * 2 * 64 - 24), "sm_100a", 128, 16, 4, 2)
SEEDS = 30

Edit = Callable[[str], str]


def swap(pattern: str, replacement: str | Callable, which: int = 0) -> Edit:
    """Replace match number `which` of a regular expression, from the end if negative."""

    def edit(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx, re.DOTALL))
        assert matches, f"nothing to mutate: {pattern}"
        match = matches[which]
        new = replacement(match) if callable(replacement) else match.expand(replacement)
        return ptx[: match.start()] + new + ptx[match.end() :]

    return edit


def drop(pattern: str, which: int = 0) -> Edit:
    """Delete a statement that begins with `pattern`."""
    return swap(rf"{pattern}[^;]*;", "", which)


def drop_all(pattern: str) -> Edit:
    """Delete every statement that begins with `pattern`."""
    return lambda ptx: re.sub(rf"{pattern}[^;]*;", "", ptx)


def pass_wait(which: int) -> Edit:
    """Let the wait number `which` (of those that the DSL emits) pass at once."""
    return swap(
        r"mbarrier\.try_wait\.parity\.shared\.b64 P1,[^;]*;", "setp.eq.u32 P1, 0, 0;", which
    )


def flip(bit: int, first: str = r"4611\d{15}", which: int = 0) -> Edit:
    """Flip a bit of a constant."""
    return swap(first, lambda match: str(int(match[0]) ^ (1 << bit)), which)


def signal_self(ptx: str) -> str:
    """Let the first st.async signal this CTA's barrier instead of the owner's."""
    own = re.search(r"try_wait\.parity\.acquire\.cluster[^;]*(\[%r\d+\])", ptx)
    assert own
    return swap(r"(st\.async[^;]*, )\[%r\d+\]", rf"\1{own[1]}")(ptx)


def look_at_two_words(ptx: str) -> str:
    """Let the receiver look at no more than the first two words of a packet."""
    for _ in range(2):
        ptx = swap(r"setp\.ne\.b32\s+(%p\d+), %r\d+, -1;", r"setp.eq.u32 \1, 0, 0;", 2)(ptx)
        ptx = swap(r"setp\.eq\.b32\s+(%p\d+), %r\d+, -1;", r"setp.ne.u32 \1, 0, 0;", 2)(ptx)
    return ptx


@dataclass(frozen=True)
class Fault:
    """An edit of a kernel's PTX, and the most harmless order that shows it."""

    name: str
    edit: Edit
    under: str = "eager"  # or "lazy", or "random": some seed
    config: DecodeConfig = RESIDENT


INSTRUCTION = r"\b67372176\b"  # the instruction descriptor of M=64, N=16
TMA = r"cp\.async\.bulk\.tensor[^;]*"
MMA = r"tcgen05\.mma"

FAULTS = [
    # descriptors
    Fault("W's swizzle is none", flip(62, which=1)),
    Fault("x's swizzle is 64 bytes", flip(63, which=0)),
    Fault(
        "W's stride between 8 rows is half", swap(r"4611756662049538048", "4611756524610584576", 1)
    ),
    Fault("a descriptor of version 0", flip(46)),
    Fault("a K step that is repeated", flip(1, which=2)),
    Fault("the second stage's W is the first's", flip(9, which=9)),
    Fault("N of the instruction descriptor is half", swap(INSTRUCTION, "67241104")),
    Fault("N of the instruction descriptor exceeds the allocation", swap(INSTRUCTION, "68158608")),
    Fault("M of the instruction descriptor is doubled", swap(INSTRUCTION, "134480016")),
    Fault("operands are fp16", flip(7, INSTRUCTION)),
    Fault("sums are fp16", flip(4, INSTRUCTION)),
    Fault("an operand is negated", flip(13, INSTRUCTION)),
    # MMA and TMEM
    Fault(
        "the first MMA adds to what was there",
        swap(r"mov\.pred\s+(%p\d+), 0;", r"mov.pred \1, -1;"),
    ),
    Fault("a later MMA does not add", swap(r"mov\.pred\s+(%p\d+), -1;", r"mov.pred \1, 0;", 3)),
    Fault("an MMA is missing", drop(MMA, 5)),
    Fault("output lanes are disabled", swap(r"(tcgen05\.mma[^;]*)\{(%r\d+)", r"\1{%r1", 7)),
    Fault("every lane issues an MMA", swap(r"@%p\d+ bra[^;]*;(?=[^@]*tcgen05\.mma)", "", 3)),
    Fault("the product is never committed", drop(r"tcgen05\.commit", -1)),
    Fault(
        "the commit precedes the last MMA",
        swap(
            r"(tcgen05\.mma[^;]*;)([^;]*;[^;]*;[^;]*;[^;]*?)(tcgen05\.commit[^;]*;)", r"\3\2\1", -1
        ),
        "lazy",
    ),
    Fault("TMEM is not given back", drop(r"tcgen05\.dealloc")),
    Fault(
        "TMEM is given back before it is read",
        swap(
            r"bar\.sync\s+2, 160;(?=[^;]*thread_sync;[^;]*bra[^;]*;[^;]*;\s+tcgen05\.dealloc)",
            "bar.arrive 2, 160;",
            -1,
        ),
    ),
    Fault(
        "too few TMEM columns are given back",
        swap(r"mov\.b32\s+(%r\d+), 32;(?=\s+tcgen05\.dealloc)", r"mov.b32 \1, 16;"),
    ),
    Fault("warps read the lanes of warp 0", swap(r"14680064", "0")),
    Fault("rows of TMEM are shifted", swap(r"14680064", "15728640")),
    Fault(
        "rows of a thread are shifted",
        swap(r"shr\.u32\s+(%r\d+), (%r\d+), 2;(?=\s+shl)", r"shr.u32 \1, \2, 3;"),
    ),
    Fault("TMEM is read from the wrong column", swap(r"(tcgen05\.ld[^;]*\[%r\d+)\]", r"\1+8]")),
    Fault(
        "lanes 64 and up read others' rows",
        swap(r"(tcgen05\.ld[^;]*\[%r\d+)\]", r"\1+1048576]"),
        config=WIDE,
    ),
    Fault("TMEM is used before it has arrived", drop(r"tcgen05\.wait::ld")),
    # TMA
    Fault(
        "coordinates of W are swapped", swap(r"(cp\.async[^;]*)\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}")
    ),
    Fault(
        "coordinates of x are swapped",
        swap(r"(cp\.async[^;]*)\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}", -1),
    ),
    Fault(
        "a K block is loaded twice",
        swap(r"add\.s32\s+(%r\d+), (%r\d+), 64;(?=[^;]*;\s+cp\.)", r"add.s32 \1, \2, 0;"),
    ),
    Fault("a load lands 128 bytes late", swap(r"\[%r1\+8192\]", "[%r1+8320]")),
    Fault("a load lands between rows", swap(r"\[%r1\+8192\]", "[%r1+8208]")),
    Fault(
        "a load signals another stage",
        swap(r"(cp\.async[^;]*\], )(\[[^;]*\])(.*?cp\.async[^;]*\], )(\[[^;]*\])", r"\1\4\3\4"),
    ),
    Fault("a load is missing", drop(TMA, -1)),
    Fault("every lane loads", swap(r"@%p\d+ bra[^;]*;(?=[^@]*cp\.async)", "", -1)),
    Fault("x is loaded before the grid wait", drop(r"griddepcontrol\.wait", -1)),
    Fault("results are stored before the grid wait", drop(r"griddepcontrol\.wait", 0)),
    # mbarriers
    Fault("too few bytes are expected", swap(r"\b10240;", "10112;")),
    Fault("too many bytes are expected", swap(r"\b10240;", "10368;")),
    Fault("the x tile's bytes are not expected", swap(r"\b10240;", "8192;")),
    Fault(
        "a barrier wants two arrivals",
        swap(r"mov\.b32\s+(%r\d+), 1;(?=\s+mbarrier\.init)", r"mov.b32 \1, 2;"),
    ),
    Fault("a barrier is not initialised", drop(r"mbarrier\.init", 2)),
    Fault(
        "too few partial sums are expected",
        swap(r"shl\.b32\s+(%r\d+), (%r\d+), 10;(?=\s+add)", r"shl.b32 \1, \2, 9;"),
    ),
    Fault("MMAs do not wait for the loads", pass_wait(-2), "lazy"),
    Fault("MMAs wait for the wrong phase", swap(r"P1, (\[%r\d+\]), 0, 1", r"P1, \1, 1, 1", -2)),
    Fault("the epilogue does not wait for the product", pass_wait(0)),
    Fault(
        "the epilogue waits for the next phase",
        swap(r"P1, (\[%r\d+\]), 0, 1", r"P1, \1, 1, 1", 0),
    ),
    Fault(
        "an owner does not wait for partial sums",
        swap(r"mbarrier\.try_wait\.parity\.acquire\.cluster[^;]*;", "setp.eq.u32 p, 0, 0;"),
    ),
    # a ring of stages
    Fault("a stage is refilled before it is read", pass_wait(1), config=RING),
    Fault(
        "a stage is refilled one round early",
        swap(r"P1, (\[%r\d+\]), %r\d+, 1", r"P1, \1, 1, 1", 0),
        config=RING,
    ),
    Fault("a stage is never freed", drop(r"tcgen05\.commit", 0), config=RING),
    Fault(
        "the wrong stage is freed",
        swap(r"(tcgen05\.commit[^;]*)\[[^;]*\](.*?tcgen05\.commit[^;]*)(\[[^;]*\])", r"\1\3\2\3"),
        config=RING,
    ),
    Fault("a refill is not expected", drop(r"mbarrier\.arrive\.expect_tx", 3), config=RING),
    # barriers of CTA and cluster
    Fault("the CTA does not meet after the barriers' start", drop(r"bar\.sync\s+0")),
    Fault("keys are ranked before all are there", drop(r"bar\.sync\s+1, 128", 0)),
    Fault("candidates are ranked before all are there", drop(r"bar\.sync\s+1, 128", 1)),
    Fault("weights precede the choice", drop(r"bar\.sync\s+1, 128", 2)),
    Fault(
        "a barrier counts too few threads",
        swap(r"bar\.sync\s+1, 128", "bar.sync 1, 96", 0),
    ),
    Fault(
        "a barrier counts too many threads",
        swap(r"bar\.sync\s+1, 128", "bar.sync 1, 160", 0),
    ),
    Fault("the epilogue does not release TMEM", drop(r"bar\.arrive\s+2")),
    Fault("peers' barriers are not waited for", drop_all(r"barrier\.cluster\.wait"), "random"),
    Fault(
        "the loads do not wait for the cluster, so that none may under racecheck",
        drop(r"barrier\.cluster\.wait", 1),
        "lazy",
        RING,
    ),
    Fault("the cluster is not told of the barriers", drop(r"barrier\.cluster\.arrive")),
    # exchange within the cluster
    Fault("partial sums go to the wrong owner", swap(r"(mapa[^;]*, %r\d+, )%r\d+", r"\g<1>0", 0)),
    Fault(
        "partial sums go beyond the cluster",
        swap(r"shr\.u32\s+(%r\d+), (%r\d+), 2;(?=\s+mapa)", r"shr.u32 \1, \2, 0;"),
    ),
    Fault("partial sums signal this CTA", signal_self),
    Fault("two columns are exchanged", swap(r"(st\.async[^;]*)\{(%r\d+), (%r\d+)", r"\1{\3, \2")),
    Fault(
        "a slice of K overwrites another",
        swap(r"mad\.lo\.s32\s+(%r\d+), (%r\d+), 272", r"mad.lo.s32 \1, \2, 256"),
    ),
    Fault("a partial sum is sent twice", swap(r"st\.async[^;]*;", r"\g<0> \g<0>", 0)),
    # exchange between clusters
    Fault("tickets do not wrap", swap(r"(atom[^;]*\], )1;", r"\g<1>7;")),
    Fault(
        "every tile believes it is the last",
        swap(r"(atom\..*?st\.shared\.b32\s+\[[^;]*\], )%r\d+", r"\g<1>1"),
    ),
    Fault(
        "a packet is not polled again",
        swap(r"(ld\.relaxed.*?ld\.relaxed.*?)@%p\d+ bra[^;]*;", r"\1"),
    ),
    Fault("two words of a packet are not looked at", look_at_two_words, "random"),
    Fault("a packet is not emptied", drop(r"st\.relaxed[^;]*\{-1")),
    Fault(
        "a packet's words are exchanged",
        swap(r"(st\.relaxed[^;]*)\{(%r\d+), (%r\d+)", r"\1{\3, \2"),
    ),
    # hazards: values are right here, and nothing but the rules makes them right on a GPU
    Fault("peers are told of barriers without a fence", drop(r"fence\.mbarrier_init")),
    Fault("TMEM is read without the fence after", drop(r"tcgen05\.fence::after_thread_sync")),
    Fault("TMEM is released without the fence before", drop(r"tcgen05\.fence::before_thread_sync")),
    Fault("a wait acquires too small a scope", swap(r"\.acquire\.cluster", "")),
    # memory
    Fault(
        "bias is read beyond its end", swap(r"(ld\.global\.b32\s+%r\d+, \[%rd\d+)\]", r"\1+512]")
    ),
    Fault(
        "shared memory is written beyond its end",
        swap(r"(st\.shared\.b32\s+\[%r\d+)\+\d+\]", r"\1+259040]"),
    ),
    Fault("ids are stored misaligned", swap(r"(st\.global\.b32\s+\[%rd\d+)\]", r"\1+2]", 0)),
]


def orders(under: str) -> list[str]:
    return [f"random{seed}" for seed in range(SEEDS)] if under == "random" else [under]


def shown(fault: Fault, order: str) -> Exception | None:
    """What is seen to be wrong in a run of the faulty kernel."""
    inputs = exact_inputs(fault.config.spec, N, ties=False)
    ptx = fault.edit(ptx_of(fault.config))
    try:
        routing = simulate(fault.config, *inputs, policy=order, ptx=ptx)
        assert_same(routing, expected(fault.config.spec, *inputs))
    except (SimulationError, AssertionError) as error:
        return error
    return None


@pytest.mark.parametrize("config", [RESIDENT, RING, WIDE], ids=["resident", "ring", "wide"])
def test_without_a_fault_nothing_is_wrong(config):
    for order in ("eager", "lazy", *orders("random")):
        error = shown(Fault("none", lambda ptx: ptx, config=config), order)
        assert error is None, f"{order}: {error}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_faults_are_caught(fault):
    assert fault.edit(ptx_of(fault.config)) != ptx_of(fault.config)
    assert any(shown(fault, order) for order in orders(fault.under))
