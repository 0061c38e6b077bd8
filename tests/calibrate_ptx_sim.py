"""Holds the PTX simulator to a Hopper GPU: the same kernels, the same inputs, both results.

    python tests/calibrate_ptx_sim.py simulate FILE               anywhere; about half a minute
    python tests/calibrate_ptx_sim.py compare FILE [--record OUT] on a GPU of capability 9.0

`simulate` writes what the simulator makes of `ptx_sim.calibration.CASES`; `compare` launches the
same configurations, and prints a line for each case. Its exit status is 0 only if all agree. With
--record it also writes what the GPU gave; kept as tests/ptx_sim/h200.json, that holds the simulator
to the GPU in `test_ptx_sim_calibration.py` from then on.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from ptx_sim import calibration
from ptx_sim.calibration import (
    CASES,
    FACTOR,
    KINDS,
    Agreement,
    Case,
    Inputs,
    agreement,
    name_of,
)

from cute_router import Routing
from cute_router import compile as compiler
from cute_router.gemm.config import TICKETS


def simulate(path: Path) -> bool:
    """Write the simulator's results."""
    from ptx_sim.launch import simulate as run

    results = {}
    for case in CASES:
        for kind in KINDS:
            inputs = calibration.draw(case, kind)
            routing = run(case.config, *inputs, factor=FACTOR)
            results[name_of(case, kind)] = calibration.pack(inputs, routing)
    calibration.save(path, source("simulator"), results)
    return True


def compare(path: Path, record: Path | None) -> bool:
    """Run on the GPU; whether every case agrees."""
    theirs, simulated = calibration.read(path)
    ours = source(torch.cuda.get_device_properties(0).name)
    found: dict[str, Any] = {}
    rows, outside = [], 0
    for case in CASES:
        for kind in KINDS:
            name, inputs = name_of(case, kind), calibration.draw(case, kind)
            routing = on_gpu(case, inputs)
            found[name] = calibration.pack(inputs, routing)
            expected = calibration.unpack(simulated[name], inputs)
            try:
                row = agreement(case, kind, inputs, routing, expected)
            except AssertionError as error:
                outside += 1
                print(f"{name:48} outside the specification: {error}")
                continue
            rows.append(row)
            print(f"{name:48} {'agree' if row.holds else 'DIFFER':6} | {row}")
    if ours["kernels"] == theirs["kernels"]:  # git may know less of a copy of the tree
        ours["commit"] = theirs["commit"]
    if record:
        calibration.save(record, ours, found)
    *counts, errors = zip(*rows, strict=True)
    total = Agreement(*map(sum, counts), max(errors))
    print(f"{len(rows)} cases | {total}")
    good = total.holds and not outside
    print(f"{'all agree' if good else 'the simulator differs'}: {ours}")
    if ours["kernels"] != theirs["kernels"]:
        print("but the simulated kernels come from other sources or tools: simulate again here")
    return good


def on_gpu(case: Case, inputs: Inputs) -> Routing:
    """One launch, as `gemm.decode` makes it, and another that must find the scratch as it was."""
    k = case.config.spec.top_k
    words = TICKETS + case.N * case.config.packet_words
    scratch = torch.full((words,), -1, dtype=torch.int32, device="cuda")
    scratch[:TICKETS] = 0
    x, W, bias = (None if t is None else t.cuda() for t in inputs)
    kernel, runs = compiler.kernel(case.config), []
    for _ in range(2):
        weights = torch.full((case.N, k), -123.0, device="cuda")
        ids = torch.full((case.N, k), -7, dtype=torch.int32, device="cuda")
        kernel(x, W, bias, weights, ids, scratch, FACTOR)
        runs.append(Routing(weights.cpu(), ids.cpu()))
    first, second = runs
    assert torch.equal(first.ids, second.ids), f"{case.name}: ids differ from launch to launch"
    assert torch.equal(first.weights.view(torch.int32), second.weights.view(torch.int32)), case.name
    assert not scratch[:TICKETS].any(), f"{case.name}: tickets are left"
    assert (scratch[TICKETS:] == -1).all(), f"{case.name}: packets are left"
    return first


def source(machine: str) -> dict[str, str]:
    """Where results come from."""
    import cutlass

    return {
        "machine": machine,
        "torch": torch.__version__,
        "dsl": cutlass.__version__,
        "kernels": compiler.symbol(CASES[0].config),  # changes with the kernels' sources
        "commit": commit(),
    }


def commit() -> str:
    """The commit that is checked out, if git knows."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("simulate", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--record", type=Path, help="write what the GPU gave")
    arguments = parser.parse_args()
    if arguments.command == "simulate":
        return not simulate(arguments.file)
    return not compare(arguments.file, arguments.record)


if __name__ == "__main__":
    sys.exit(main())
