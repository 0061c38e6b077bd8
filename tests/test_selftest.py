"""The self-test passes where all is right, and says what is not where something is not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cute_router import __main__ as cli
from cute_router import functional, reference, selftest
from cute_router.selftest import cases, plain, timing, verdict
from cute_router.selftest.cases import HashCase, RouterCase, TopKCase
from cute_router.spec import Routing, TopK

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
DENSE = RouterCase("dense_decode", 64, 128, 9)
FEW = [
    DENSE,
    RouterCase("dense_decode", 64, 128, 9, ties=True),
    RouterCase("activation_topk", 64, 64, 9, 4, "sigmoid", True, 8, 4),
    RouterCase("activation_topk", 64, 64, 9, 4, "softmax", False),
    TopKCase(6, 300, 8, torch.bfloat16, ragged=True),
    HashCase(8),
    HashCase(8, 64),
]


@pytest.fixture
def few(monkeypatch):
    """A short list of small cases in place of the real ones."""
    monkeypatch.setattr(cases, "QUICK", FEW)
    monkeypatch.setattr(cases, "MORE", [])


def command(*arguments, code=None):
    start = ["-m", "cute_router", "selftest"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_on_the_cpu_it_passes_and_says_that_no_kernel_ran():
    result = command("--quick", "--device", "cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NO KERNEL IS RUN: this is the CPU." in result.stdout
    assert f"PASSED: {len(cases.QUICK)} checks" in result.stdout
    assert result.stdout.endswith("No kernel was run.\n")
    assert "backend   reference" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout
    for kernel in ("dense_decode", "activation_topk", "topk", "hash_route"):
        assert f"\n{kernel} " in result.stdout
    assert " us " not in result.stdout  # nothing is timed
    assert "FAILED" not in result.stdout


@pytest.mark.gpu(capability=(8, 0))
def test_on_a_gpu_it_passes_and_times_the_kernels():
    result = command("--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    assert torch.cuda.get_device_name() in result.stdout
    assert "NO KERNEL" not in result.stdout
    assert result.stdout.count(" us | W at ") == len(cases.TIMED)


def test_all_cases_have_names_of_their_own():
    names = [case.name for case in cases.QUICK + cases.MORE]
    assert len(set(names)) == len(names)


def test_the_quick_cases_compile_the_decode_kernels_of_the_table_and_one_more():
    sizes = {(c.E, c.K, c.N) for c in cases.QUICK if getattr(c, "kernel", "") == "dense_decode"}
    assert sizes - {(300, 264, 17)} == set(cases.TIMED)


# --- planted faults ------------------------------------------------------------------------------


def swap_two_experts(weights, ids):
    ids[0, :2] = ids[0, :2].flip(0)
    weights[0, :2] = weights[0, :2].flip(0)


def last_expert_of_all(weights, ids):
    ids[3, -1] = next(e for e in range(64) if e not in ids[3].tolist())


def out_of_range(weights, ids):
    ids[2, 0] = 64


def repeated(weights, ids):
    ids[2, 1] = ids[2, 0]


def weight_off_by_2e_5(weights, ids):
    weights[4, 3] += 2e-5 * cases.FACTOR


def nan_weight(weights, ids):
    weights[5, 0] = torch.nan


def number_for_nan(weights, ids):
    weights[1] = 0.0  # the row of x that holds a NaN


def unwritten(weights, ids):
    weights[8, 5] = selftest.POISON


FAULTS = {
    swap_two_experts: "ids: token 0, slot 0: got expert ",
    last_expert_of_all: "ids: token 3, slot 5: got expert ",
    out_of_range: "ids: token 2: got [64, ",
    repeated: "ids: token 2: got [",
    weight_off_by_2e_5: "weights: token 4, slot 3: got ",
    nan_weight: "weights: token 5, slot 0: got nan, wanted 0.",
    number_for_nan: "weights: token 1, slot 0: got 0, wanted nan",
    unwritten: "weights: token 8, slot 5: got -77, wanted ",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_fails_and_is_named_and_the_other_checks_go_on(
    few, monkeypatch, capsys, fault
):
    right = functional.dense_decode

    def wrong(x, W, bias, **options):
        routing = right(x, W, bias, **options)
        fault(*routing)
        return routing

    monkeypatch.setattr(functional, "dense_decode", wrong)
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    at = lines.index(f"{DENSE.name} ... FAILED")
    assert lines[at + 1].startswith(f"    {FAULTS[fault]}")
    assert "wanted" in lines[at + 1]
    assert f"  {DENSE.name}" in lines[-2:]
    assert f"of {len(FEW)} checks" in printed
    for case in FEW[2:]:
        assert f"{case.name} ... ok" in lines


def test_a_call_that_raises_fails_and_the_other_checks_go_on(few, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(functional, "topk", broken)
    assert selftest.run(CPU, quick=True) == 1
    printed = capsys.readouterr().out
    assert "    raised RuntimeError at test_selftest.py:" in printed
    assert ": no such kernel" in printed
    assert f"FAILED: 1 of {len(FEW)} checks" in printed
    assert f"{FEW[-1].name} ... ok" in printed


def test_two_calls_of_different_bits_fail(few, monkeypatch, capsys):
    right, calls = functional.dense_decode, []

    def unsteady(*inputs, **options):
        weights, _ = right(*inputs, **options)
        calls.append(1)
        if len(calls) % 2 == 0:
            weights.view(torch.int32)[0, 0] += 1  # well within the bound

    monkeypatch.setattr(functional, "dense_decode", unsteady)
    assert selftest.run(CPU, quick=True) == 1
    assert "    two calls differ: weights or values at (0, 0): 0." in capsys.readouterr().out


def test_another_bit_of_topk_fails():
    scores = torch.tensor([[3.0, 0.0, -0.0, 1.0]])
    wanted = reference.topk(scores, 3)
    assert verdict.wrong_topk(wanted, wanted) == []
    values = wanted.values.clone()
    values[0, 2] = -0.0
    (fault,) = verdict.wrong_topk(TopK(values, wanted.indices), wanted)
    assert fault.startswith("row 0, place 2: got -0 at 1, wanted 0 at 1")


def test_a_wrong_expert_of_the_table_fails(few, monkeypatch, capsys):
    right = functional.hash_route

    def wrong(*inputs, **options):
        right(*inputs, **options).ids[2, 4] = 5  # the token id that the table has not

    monkeypatch.setattr(functional, "hash_route", wrong)
    assert selftest.run(CPU, quick=True) == 1
    assert (
        "    ids: token 2, slot 4: got 5, wanted -1; 1 of 48 are wrong" in capsys.readouterr().out
    )


def test_a_kernel_that_never_ends_ends_the_process_and_is_named():
    result = command(
        code="""
import time, torch
from cute_router import functional, selftest
selftest.HUNG_AFTER = 0.5
functional.dense_decode = lambda *_, **__: time.sleep(60)
selftest.run(torch.device("cpu"), True)
"""
    )
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[-1] == f"FAILED: {cases.QUICK[0].name} hangs"


def test_a_device_that_no_backend_serves_fails_and_says_why(monkeypatch, capsys):
    def refuse(device):
        raise ValueError("cute_router needs a CUDA device of compute capability 8.0 or newer")

    monkeypatch.setattr(selftest.place, "backend_for", refuse)
    assert selftest.run(CPU, quick=True) == 1
    assert "FAILED: this device cannot be used: cute_router needs" in capsys.readouterr().out


def test_wrong_kernels_are_not_timed_and_times_that_fail_count(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("capture failed")

    monkeypatch.setattr(timing, "table", broken)
    assert selftest.print_times(CPU, [DENSE.name])
    assert "not timed: dense_decode is wrong here" in capsys.readouterr().out
    assert not selftest.print_times(CPU, [])
    assert "raised RuntimeError: capture failed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_exits_with_2(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["selftest", "--device", name])
    assert stop.value.code == 2
    assert "argument --device: " in capsys.readouterr().err


# --- the second opinion ---------------------------------------------------------------------------


def test_two_opinions_agree_on_groups_with_nan_and_infinities():
    case = RouterCase("activation_topk", 64, 64, 33, 6, "sigmoid", True, 8, 2)
    x, W, bias = case.draw()
    s = reference.activations(plain.logits(x, W), "sigmoid") + bias
    assert torch.equal(plain.select(s, 6, 8, 2), reference.select(s, 6, 8, 2))


def test_experts_whose_scores_fp32_cannot_tell_apart_may_trade_places():
    logits = torch.tensor([[1.0, 1.0 + 1e-7, 0.0, -1.0]], dtype=torch.float64)
    options = {
        "top_k": 2,
        "scoring": "sqrtsoftplus",
        "renormalize": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    }
    routing = Routing(torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]], dtype=torch.int32))
    for exact in (False, True):
        about = verdict.Logits(logits, torch.zeros_like(logits), torch.tensor([exact]))
        faults = verdict.wrong_routing(routing, reference, about, None, **options)
        assert len(faults) == exact, faults
