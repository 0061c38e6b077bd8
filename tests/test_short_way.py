"""The short ways launch what the full way would, and nothing that it would refuse.

Most of what they leave out is checked by the host code of the kernels themselves. Here that code
runs as it is compiled for Hopper, on CPU tensors that it takes for CUDA's. There is no driver, so
that a launch ends in an error of CUDA's.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import test_functional_cpu as dense_calls
import test_hash_cpu as hash_calls
import test_topk_cpu as selection_calls
import torch
from refused import CHOOSING, WEIGHING, outputs, over_tensors, spoiled
from torch import Tensor

pytest.importorskip("cutlass")

import tvm_ffi

from cute_router import compile as compiler
from cute_router import short_way
from cute_router.gemm import decode, prefill
from cute_router.spec import HIDDEN_MULTIPLE, RouterSpec
from cute_router.topk import gate, radix, rows, standalone
from cute_router.topk import hash as hashing

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a driver, kernels would run on such tensors"
)

HEADER = 24  # bytes of a tvm-ffi object, ahead of its DLTensor: data, device type, device index
CUDA = 2  # as a DLPack device type
CACHES = [
    decode.plan_of,
    prefill.kernel_of,
    hashing.uniform_kernel,
    hashing.gate_kernel,
    gate.plan_of,
    gate.kernel_of,
    standalone.plan_of,
    rows.kernel_of,
    radix.kernel_of,
]


class Scratch:
    """Stands for a device's `Workspace`."""

    def slot(self, stream: int, words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int32)


class Machine:
    """What the kernels' host code sees, and lets pass."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...]]] = []  # configurations and arguments
        self.elsewhere: Tensor | None = None  # what is on another device than all else
        self.on_cpu: Tensor | None = None
        self.load = compiler.kernel

    def seen(self, t: Any) -> Any:
        """An argument as it is on CUDA device 0, unless it is said to be elsewhere."""
        if not isinstance(t, Tensor):
            return t
        foreign = tvm_ffi.from_dlpack(t)
        device = (ctypes.c_int * 2).from_address(foreign.__chandle__() + HEADER + 8)
        if t is not self.on_cpu:
            device[:] = CUDA, int(t is self.elsewhere)
        return foreign

    def kernel(self, config: Any) -> Callable[..., None]:
        """The compiled kernel of `config`, whose launches are noted."""
        return partial(self.run, self.load(config), config)

    def run(self, function: Callable[..., None], config: Any, *arguments: Any) -> None:
        try:
            function(*map(self.seen, arguments))
        except RuntimeError as error:
            if "cudaError" not in str(error):
                raise
            self.launches.append((config, arguments))

    def note(self, config: Any) -> Callable[..., None]:
        """A kernel that takes everything, and is not compiled."""
        return lambda *arguments: self.launches.append((config, arguments))


@pytest.fixture
def machine(monkeypatch) -> Iterator[Machine]:
    """A Hopper machine without a driver."""
    found = Machine()
    monkeypatch.setattr(compiler, "kernel", found.kernel)
    for module in (decode, prefill, hashing, gate, rows, radix):
        monkeypatch.setattr(module, "target_for", lambda device: ("sm_90", "sm_90a"))
    for module in (decode, prefill, radix):
        monkeypatch.setattr(module, "max_cluster", lambda device: 16)
    for module in (decode, prefill):
        monkeypatch.setattr(module, "tuned", lambda config, bucket, device: config)
    monkeypatch.setattr(prefill, "sm_count", lambda device: 132)
    monkeypatch.setattr(decode, "workspace", lambda device: Scratch())
    for module in (short_way, standalone):
        monkeypatch.setattr(module, "seed", lambda dtype, device: torch.empty((), dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    for cached in CACHES:
        cached.cache_clear()
    yield found
    for cached in CACHES:
        cached.cache_clear()


# --- the short ways, called as the public functions are -----------------------------------------


def router_options(
    top_k=6,
    routed_scaling_factor=1.0,
    scoring="sqrtsoftplus",
    renormalize=True,
    n_group=1,
    topk_group=1,
    batch_invariant=False,
    pdl=True,
    out_weights=None,
    out_ids=None,
):
    options = (top_k, scoring, renormalize, n_group, topk_group, batch_invariant, pdl)
    return routed_scaling_factor, options, out_weights, out_ids


def dense_decode(x, W, bias=None, **options):
    return decode.fast(x, W, bias, *router_options(**options))


def dense_prefill(x, W, bias=None, **options):
    return prefill.fast(x, W, bias, *router_options(**options))


def activation_topk(logits, bias=None, **options):
    return gate.fast(logits, bias, *router_options(**options))


def hash_route(token_ids, table, x=None, W=None, **options):
    factor, (_, scoring, renormalize, *_, pdl), *out = router_options(**options)
    return hashing.fast(token_ids, table, x, W, factor, scoring, renormalize, pdl, *out)


def topk(scores, k=6, sorted=True, lengths=None, index_dtype=torch.int64, out=(None, None)):
    return standalone.fast(scores, k, sorted, lengths, index_dtype, *out)


SHORT_WAYS = [dense_decode, dense_prefill, activation_topk, hash_route, topk]


def good(function) -> tuple[list[Any], dict[str, Any]]:
    """A call as an engine makes it, outputs given."""
    weights, ids = torch.empty(5, 6), torch.empty(5, 6, dtype=torch.int32)
    given = {"out_weights": weights, "out_ids": ids}
    if function in (dense_decode, dense_prefill):
        return list(dense_calls.inputs()), given
    if function is hash_route:
        token_ids, table, x, W = hash_calls.inputs()
        given = {name: t[:, : table.shape[1]].clone() for name, t in given.items()}
        return [token_ids, table, x, W], given
    if function is activation_topk:
        return [torch.randn(5, 40), torch.randn(40)], given
    lengths = torch.full((5,), 40)
    return [torch.randn(5, 40)], {"lengths": lengths, "out": (weights, ids.long())}


def tensors_of(arguments, options) -> list[Tensor]:
    flat = [*arguments, *options.pop("out", ()), *options.values()]
    return [t for t in flat if isinstance(t, Tensor)]


# --- what is launched ---------------------------------------------------------------------------


@pytest.mark.parametrize("function", SHORT_WAYS)
def test_the_call_of_an_engine_is_launched(function, machine):
    arguments, options = good(function)
    result = function(*arguments, **options)
    given = options["out"] if "out" in options else (options["out_weights"], options["out_ids"])
    assert all(r is t for r, t in zip(result, given, strict=True))
    options = {n: v for n, v in options.items() if not n.startswith("out")}
    fresh = function(*arguments, **options)
    assert [(t.shape, t.dtype) for t in fresh] == [(t.shape, t.dtype) for t in given]
    assert len(machine.launches) == 2


LAYOUTS = [  # rows, padding of a row, offset of the first: in elements
    *[(n, 0, 0) for n in (1, 2, 5, 2049, 20_000, 70_000)],
    *[(n, padding, 0) for n in (1, 2, 5) for padding in (1, 4, 8)],
    *[(n, padding, 1) for n in (1, 5) for padding in (0, 4)],
]


def laid_out(layout, length, dtype) -> Tensor:
    n, padding, offset = layout
    whole = torch.empty(offset + n * (length + padding), dtype=dtype)
    return whole[offset:].view(n, length + padding)[:, :length]


def same_launches(machine: Machine) -> None:
    """Of two launches: the same kernel on the same memory."""
    (config, short), (expected, full) = machine.launches
    machine.launches.clear()
    assert config == expected
    for a, b in zip(short, full, strict=True):
        assert (a.data_ptr(), a.shape) == (b.data_ptr(), b.shape) if a is not b else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("E", [1, 7, 40, 256])
def test_logits_take_the_kernel_that_they_take_in_full(E, layout, dtype, machine, monkeypatch):
    monkeypatch.setattr(compiler, "kernel", machine.note)
    logits, bias, k = laid_out(layout, E, dtype), torch.empty(E), min(E, 6)
    weights, ids = torch.empty(layout[0], k), torch.empty(layout[0], k, dtype=torch.int32)
    for batch_invariant in (False, True):
        form = {"scoring": "sigmoid", "batch_invariant": batch_invariant, "pdl": False}
        given = {"out_weights": weights, "out_ids": ids}
        assert activation_topk(logits, bias, top_k=k, **form, **given)
        spec = RouterSpec(E, HIDDEN_MULTIPLE, k, form.pop("scoring"))
        gate.launch(logits, bias, weights, ids, spec, 1.0, **form)
        same_launches(machine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("L", "k"), [(1, 1), (7, 6), (256, 6), (256, 33), (1028, 6), (1029, 6)])
def test_scores_take_the_kernel_that_they_take_in_full(L, k, layout, dtype, machine, monkeypatch):
    monkeypatch.setattr(compiler, "kernel", machine.note)
    scores = laid_out(layout, L, dtype)
    for lengths in (None, torch.empty(layout[0], dtype=torch.int32)):
        values = torch.empty(layout[0], k, dtype=dtype)
        indices = torch.empty(layout[0], k, dtype=torch.int64)
        assert topk(scores, k, lengths=lengths, out=(values, indices))
        standalone.launch(scores, lengths, values, indices)
        same_launches(machine)


@pytest.mark.parametrize("function", [activation_topk, topk])
def test_overlapping_rows_are_scores_and_no_logits(function, machine, monkeypatch):
    monkeypatch.setattr(compiler, "kernel", machine.note)
    overlapping = torch.empty(100).as_strided((5, 40), (4, 1))
    assert (function(overlapping) is None) == (function is activation_topk)
    assert len(machine.launches) == (function is topk)


@pytest.mark.parametrize("shape", [(40,), (2, 5, 40), (0, 40)])
@pytest.mark.parametrize("function", [activation_topk, topk])
def test_what_is_no_matrix_or_empty_is_left_to_the_full_way(function, shape, machine):
    assert function(torch.empty(shape)) is None
    assert not machine.launches


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("function", SHORT_WAYS)
def test_tensors_on_different_devices_are_refused(function, machine):
    arguments, options = good(function)
    assert function(*arguments, **options) is not None
    machine.launches.clear()
    for place in ("elsewhere", "on_cpu"):
        for t in tensors_of(arguments, dict(options)):
            setattr(machine, place, t)
            assert function(*arguments, **options) is None
        setattr(machine, place, None)
    assert not machine.launches


@over_tensors(dense_calls.BAD_TENSORS)
@pytest.mark.parametrize("function", [dense_decode, dense_prefill])
def test_a_bad_tensor_is_refused(function, spoil, error, message, machine):
    x, W, bias = dense_calls.inputs()
    assert function(*spoiled({"x": x, "W": W, "bias": bias}, spoil).values()) is None
    assert not machine.launches


@over_tensors(hash_calls.BAD_TENSORS)
def test_a_bad_tensor_of_hash_route_is_refused(spoil, error, message, machine):
    arguments = dict(zip(("token_ids", "table", "x", "W"), hash_calls.inputs(), strict=True))
    assert hash_route(*spoiled(arguments, spoil).values()) is None
    assert not machine.launches


@over_tensors(selection_calls.BAD_LOGITS)
def test_bad_logits_are_refused(spoil, error, message, machine):
    arguments = {"logits": torch.randn(5, 40), "bias": torch.randn(40)}
    assert activation_topk(*spoiled(arguments, spoil).values()) is None
    assert not machine.launches


@over_tensors(selection_calls.BAD_SCORES)
def test_bad_scores_are_refused(spoil, error, message, machine):
    assert topk(*spoiled({"scores": torch.randn(5, 40)}, spoil).values()) is None
    assert not machine.launches


OPTIONS = [
    *[(dense_decode, options) for options, *_ in [*WEIGHING, *CHOOSING, *outputs("x")]],
    *[(activation_topk, options) for options, *_ in [*WEIGHING, *CHOOSING, *outputs("logits")]],
    *[(hash_route, options) for options, *_ in [*WEIGHING, *outputs("token_ids")]],
    *[
        (topk, options)
        for options, *_ in selection_calls.BAD_TOPK_OPTIONS
        if "out" not in options or len(options["out"]) == 2  # `functional.topk` takes them apart
    ],
]


@pytest.mark.parametrize(
    ("function", "options"),
    OPTIONS,
    ids=[f"{i}-{f.__name__}-{'+'.join(o)}" for i, (f, o) in enumerate(OPTIONS)],
)
def test_a_bad_option_is_refused(function, options, machine):
    arguments, _ = good(function)
    one = {} if function is hash_route else {"k" if function is topk else "top_k": 1}
    assert function(*arguments, **one), "so that a memoised good call is there to be mistaken"
    machine.launches.clear()
    assert function(*arguments, **options) is None
    assert not machine.launches


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(
    "change",
    {
        "fewer columns": lambda t: t[:, :-1].contiguous(),
        "fewer rows": lambda t: t[:-1],
        "gaps between rows": lambda t: t.repeat(1, 2)[:, :6],
        "columns first": lambda t: t.T.contiguous().T,
        "bytes": Tensor.byte,
    }.items(),
    ids=lambda change: change[0],
)
def test_long_rows_refuse_outputs_that_do_not_fit(which, change, machine):
    scores = torch.randn(5, 1100)
    out = [torch.empty(5, 6), torch.empty(5, 6, dtype=torch.int64)]
    assert topk(scores, out=tuple(out))
    machine.launches.clear()
    for i in which:
        out[i] = change[1](out[i])
    assert topk(scores, out=tuple(out)) is None
    assert not machine.launches


def test_rows_of_more_than_2_to_the_20_entries_are_refused(machine):
    assert topk(torch.empty(1, 2**20 + 1)) is None
    assert not machine.launches


@pytest.mark.parametrize("scores", [torch.empty(40, 5).T, torch.empty(5, 80)[:, ::2]])
def test_no_kernel_is_looked_up_for_scores_that_are_copied_first(scores, machine, monkeypatch):
    def looked_up(config):
        raise AssertionError("a kernel is looked up")

    monkeypatch.setattr(compiler, "kernel", looked_up)
    assert topk(scores) is None
    with pytest.raises(AssertionError, match="looked up"):
        topk(scores.contiguous())
