"""The contenders at one point: each is first held to what is right, then timed in turns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from problem import FACTOR, TOP_K, Call
from timing import METHOD, Captured, captured, replay_us
from torch import Tensor

from cute_router import reference

OURS = "cute_router"
SETS_CHECKED = 2  # of tensors, before a contender is timed: fewest that show which one was read

Judge = Callable[[str, Any, int], str | None]  # name, result, number of the set -> what is wrong


def contest(
    calls: dict[str, Call], wrong: Judge, buffers: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of the contenders that are right, and why the others have none."""
    graphs: dict[str, Captured] = {}
    absent: dict[str, str] = {}
    for name, call in calls.items():
        try:
            found = (wrong(name, call(i), i) for i in range(min(SETS_CHECKED, buffers)))
            fault = next(filter(None, found), None)
            if fault is None:
                graphs[name] = captured(call, buffers)
            else:
                absent[name] = f"wrong result: {fault}"
        except Exception as error:
            if name == OURS:
                raise
            # A peer that breaks is no reason to lose the rest.
            absent[name] = reason(error)
    if OURS not in graphs:
        raise SystemExit(f"{OURS}: {absent[OURS]}")
    return dict(zip(graphs, replay_us(*graphs.values()), strict=True)), absent


def made(
    makers: dict[str, Callable[..., Call]], *arguments: Any
) -> tuple[dict[str, Call], dict[str, str]]:
    """The peers that can be called here, and why the others cannot."""
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            calls[name] = make(*arguments)
        except (ImportError, NotImplementedError) as error:
            absent[name] = str(error)
        except Exception as error:  # an engine that imports but does not work here
            absent[name] = reason(error)
    return calls, absent


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def misrouted(
    result: tuple[Tensor, Tensor], logits: Tensor, bias: Tensor, bound: Tensor | float = 0.0
) -> str | None:
    """What is wrong with the routing of these fp64 logits [N, E], known to ± bound; or None.

    An id may differ from the reference's where their scores lie within the bound, for fp32 logits
    cannot tell them apart; weights are compared at the chosen ids.
    """
    weights, ids = result[0].double(), result[1].long()
    N, E = logits.shape
    if ids.shape != (N, TOP_K) or ((ids < 0) | (ids >= E)).any():
        return "ids of a wrong shape or out of range"
    if (ids.sort(-1).values.diff(dim=-1) == 0).any():
        return "repeated ids"
    a = reference.activations(logits)
    s = reference.selection_scores(a, bias)
    expected = reference.select(s, TOP_K)
    # sqrt(softplus(l)) rises by less than l does; 1e-6 is the error of the activation itself.
    error = bound + 1e-6 * s.abs()
    apart = (s.gather(-1, expected) - s.gather(-1, ids)).abs()
    wrong = apart > error.gather(-1, expected) + error.gather(-1, ids)
    if wrong.any():
        return f"{int(wrong.sum())} of {ids.numel()} ids differ beyond the logit error bound"
    off = float((weights - reference.weigh(a, ids, FACTOR)).abs().max())
    if not off <= 1e-5 * FACTOR:
        return f"weights differ by {off:.1e}, {1e-5 * FACTOR:.1e} allowed"
    return None


def write_report(path: Path, where: dict[str, Any], **parts: Any) -> None:
    """Write where it was measured, how, and what."""
    report = {"environment": where, "method": METHOD, **parts}
    path.write_text(json.dumps(report, indent=2) + "\n")
