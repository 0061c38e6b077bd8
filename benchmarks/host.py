"""What calls cost the host: microseconds of the calling thread, by function, op and module.

    python benchmarks/host.py
    python benchmarks/host.py --first-call --json host.json

Every call is first held to the reference, then repeated by `timing.host_us`: batches of calls that
nothing waits for in between, each drained before the next so that the launch queue never blocks;
batches of all calls take turns, and a call's number is the median over its own. `--first-call`
measures, in processes of its own, what comes before the first result: imports, and the first call
with its kernel in the disk cache.

    dense_decode, outputs given | 8.31 us | mark 10: met | aim 8: missed
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contest import misrouted
from problem import FACTOR, FLASH, TOP_K
from timing import HOST_BATCHES, HOST_CALLS, environment, host_us
from torch import Tensor

import cute_router
from cute_router import Router, RouterSpec, reference

N = 8
VOCAB = 1024
PROCESSES = 5  # fresh ones, for each number of the first call
METHOD = (
    f"median over {HOST_BATCHES} batches of {HOST_CALLS} calls each, the queue drained before each;"
    f" N={N} E={FLASH[0]} K={FLASH[1]} k={TOP_K}"
)


class Mark(NamedTuple):
    """What a number must not exceed, and what it is hoped not to."""

    mark: float
    aim: float | None = None

    def verdict(self, value: float) -> str:
        """How a number stands to it."""
        parts = [("mark", self.mark), ("aim", self.aim)]
        said = [
            f"{name} {limit:g}: {'met' if value <= limit else 'missed'}"
            for name, limit in parts
            if limit is not None
        ]
        return " | ".join(said)


FUNCTION, OP = Mark(10, 8), Mark(14, 10)  # microseconds


@dataclass
class Call:
    """A way to call, what is wrong with its result, and what it may cost."""

    name: str
    run: Callable[[], Any]
    fault: Callable[[], str | None]  # of a run of its own
    mark: Mark | None = None


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Time what calls cost the host.")
    parser.add_argument("--first-call", action="store_true", help="imports and first calls too")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--commit", help="the commit, where this is not a git checkout")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/host.py needs a CUDA device; there is none")
    torch.manual_seed(0)
    where = environment(args.commit)
    print(" | ".join(f"{name} {value}" for name, value in where.items()), end="\n\n")

    found = list(calls(torch.device("cuda")))
    for call in found:
        fault = call.fault()
        if fault is not None:
            raise SystemExit(f"{call.name}: {fault}")
    marks = {call.name: call.mark for call in found if call.mark is not None}
    us: dict[str, float] = {}
    for call, value in zip(found, host_us(*(call.run for call in found)), strict=True):
        us[call.name] = value
        show(call.name, value, "us", call.mark)

    seconds: dict[str, float] = {}
    if args.first_call:
        print()
        seconds = first_call(marks)
    if args.json:
        report = {
            "environment": where,
            "method": METHOD,
            "us": {name: round(value, 3) for name, value in us.items()},
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "marks": {name: mark._asdict() for name, mark in marks.items()},
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def show(name: str, value: float, unit: str, mark: Mark | None) -> None:
    """A number as one line."""
    verdict = "" if mark is None else f" | {mark.verdict(value)}"
    print(f"{name} | {value:.2f} {unit}{verdict}", flush=True)


# --- calls ----------------------------------------------------------------------------------------


def calls(device: torch.device) -> Iterator[Call]:
    """Every way to call; outputs given and allocated. The raw kernel is there on a GPU only."""
    E, K = FLASH
    x = torch.randn(N, K, device=device).bfloat16()
    W = (torch.randn(E, K, device=device) * K**-0.5).bfloat16()
    bias = torch.randn(E, device=device) * 0.1
    token_ids = torch.randint(VOCAB, (N,), device=device)
    table = torch.randint(E, (VOCAB, TOP_K), device=device)
    logits = reference.logits(x, W)
    fp32 = logits.float()
    bound = reference.logit_error_bound(x, W)
    weights = torch.empty(N, TOP_K, device=device)
    ids = torch.empty(N, TOP_K, dtype=torch.int32, device=device)
    indices = ids.long()
    factor = {"routed_scaling_factor": FACTOR}
    given = {"out_weights": weights, "out_ids": ids}
    values_given = {"out_values": weights, "out_indices": indices}
    gate = {"x": x, "W": W}

    def dense(found: Any) -> str | None:
        return misrouted(found, logits, bias, bound)

    def chosen(found: Any) -> str | None:
        return misrouted(found, fp32.double(), bias)

    def looked_up(found: Any, **gate: Tensor) -> str | None:
        right = reference.hash_route(token_ids, table, **gate, **factor)
        off = (found[0] - right.weights).abs().max()
        if not torch.equal(found[1].int(), right.ids.int()) or not off <= 1e-5 * FACTOR:
            return "other experts or weights than the reference"
        return None

    def ordered(found: Any) -> str | None:
        right = reference.topk(fp32, TOP_K)
        same = torch.equal(found[0], right.values) and torch.equal(found[1], right.indices)
        return None if same else "another order than the reference"

    def both(name: str, run: Callable[..., Any], judge: Any, **out: Any) -> Iterator[Call]:
        """A function with outputs given and allocated."""
        given_run = partial(run, **out)
        yield Call(f"{name}, outputs given", given_run, lambda: judge(given_run()), FUNCTION)
        yield Call(f"{name}, outputs allocated", run, lambda: judge(run()), FUNCTION)

    def op(name: str, judge: Any, *arguments: Any, **out: Tensor) -> Iterator[Call]:
        """An op and its overload with outputs given, named as compiled graphs name them."""
        packet = getattr(torch.ops.cute_router, name)
        run = partial(packet.default, *arguments)
        yield Call(f"ops.{name}", run, lambda: judge(run()), OP)
        run_out = partial(packet.out, *arguments, **out)

        def fault() -> str | None:
            run_out()
            return judge(tuple(out.values()))

        yield Call(f"ops.{name}.out", run_out, fault, OP)

    yield from both(
        "dense_decode", partial(cute_router.dense_decode, x, W, bias, **factor), dense, **given
    )
    yield from both(
        "hash_route, uniform",
        partial(cute_router.hash_route, token_ids, table, **factor),
        looked_up,
        **given,
    )
    yield from both(
        "hash_route, gated",
        partial(cute_router.hash_route, token_ids, table, **gate, **factor),
        partial(looked_up, **gate),
        **given,
    )
    yield from both(
        "activation_topk",
        partial(cute_router.activation_topk, fp32, bias, **factor),
        chosen,
        **given,
    )
    yield from both("topk", partial(cute_router.topk, fp32, TOP_K), ordered, out=(weights, indices))

    yield from op("dense_decode", dense, x, W, bias, TOP_K, FACTOR, **given)
    uniform, gated = (token_ids, table, None, None, FACTOR), (token_ids, table, x, W, FACTOR)
    yield from op("hash_route", looked_up, *uniform, **given)
    for call in op("hash_route", partial(looked_up, **gate), *gated, **given):
        call.name += ", gated"
        yield call
    yield from op("activation_topk", chosen, fp32, bias, TOP_K, FACTOR, **given)
    yield from op("topk", ordered, fp32, TOP_K, **values_given)

    router = Router(RouterSpec(E, K, TOP_K), device=device, **factor)
    router.load_weights([("weight", W), ("e_score_correction_bias", bias)])
    by_handle = partial(torch.ops.cute_router.route_by_handle.default, router.handle, x)
    yield Call("ops.route_by_handle", by_handle, lambda: dense(by_handle()), OP)
    yield Call("Router(x)", partial(router, x), lambda: dense(router(x)))
    if device.type == "cuda":
        raw = raw_kernel(x, W, bias, weights, ids)

        def fault() -> str | None:
            raw()
            return dense((weights, ids))

        yield Call("the raw kernel of dense_decode", raw, fault)


def raw_kernel(x: Tensor, W: Tensor, bias: Tensor, weights: Tensor, ids: Tensor) -> Any:
    """The launch that a call of `dense_decode` ends in."""
    from cute_router.gemm import decode
    from cute_router.gemm.config import TICKETS

    options = (TOP_K, "sqrtsoftplus", True, 1, 1, False, True)
    plan = decode.plan_of(*W.shape, True, *options, decode.BUCKETS[N], x.get_device())
    if plan is None:
        raise SystemExit("this GPU has no kernel of its own for dense_decode")
    stream = torch.cuda.current_stream().cuda_stream
    scratch = plan.scratch.slot(stream, TICKETS + N * plan.token_words)
    return partial(plan.kernel, x, W, bias, weights, ids, scratch, FACTOR)


# --- the first call -------------------------------------------------------------------------------

TIMED = """
import time
start = time.perf_counter()
{}
seconds = time.perf_counter() - start
"""
SCRIPTS = {
    "import torch": TIMED.format("import torch"),
    "import cute_router, beyond torch": "import torch" + TIMED.format("import cute_router"),
    "import the compiler, beyond torch": "import torch" + TIMED.format("import cutlass.cute"),
    "first call, kernel cached": f"""
import torch
x = torch.randn({N}, {FLASH[1]}, device="cuda").bfloat16()
W = (torch.randn({FLASH[0]}, {FLASH[1]}, device="cuda") / 64).bfloat16()
bias = torch.zeros({FLASH[0]}, device="cuda")
torch.cuda.synchronize()
import cute_router
{TIMED.format("cute_router.dense_decode(x, W, bias); torch.cuda.synchronize()")}
""",
}
IMPORT_TORCH, IMPORT, COMPILER, FIRST = SCRIPTS
BEYOND = 0.3  # seconds that our own import, and a first call beside the compiler's, may take
FIRST_AIM = 0.5


def first_call(marks: dict[str, Mark]) -> dict[str, float]:
    """Seconds in fresh processes, medians; adds their marks."""
    with tempfile.TemporaryDirectory(prefix="cute_router-") as cache:
        environ = os.environ | {"CUTE_ROUTER_CACHE_DIR": cache}
        cold, _ = fresh(FIRST, environ)
        seconds = {"first call, kernel compiled": cold}
        show("first call, kernel compiled", cold, "s", None)
        for name in SCRIPTS:
            runs = [fresh(name, environ) for _ in range(PROCESSES)]
            seconds[name] = statistics.median(taken for taken, _ in runs)
            if name == IMPORT:
                marks[name] = Mark(BEYOND)
            elif name == FIRST:
                marks[name] = Mark(round(seconds[COMPILER] + BEYOND, 2), FIRST_AIM)
                brought = "with" if any(compiler for _, compiler in runs) else "without"
                print(f"the first call comes {brought} the compiler")
            show(name, seconds[name], "s", marks.get(name))
    return seconds


def fresh(name: str, environ: dict[str, str]) -> tuple[float, bool]:
    """The seconds of a script in a process of its own, and whether that imported the compiler."""
    code = SCRIPTS[name] + "\nimport sys; print(seconds, 'cutlass' in sys.modules)"
    root = Path(__file__).parent.parent
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, compiler = said.stdout.split()
    return float(seconds), compiler == "True"


if __name__ == "__main__":
    sys.exit(main())
