"""The benchmarks call what they say they call: on the CPU, where nothing can be timed."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def host():
    """benchmarks/host.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import host
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return host


def test_every_call_whose_host_time_is_measured_is_right(host):
    found = list(host.calls(torch.device("cpu")))
    assert [call.fault() for call in found] == [None] * len(found)
    for call in found:
        call.run()
    names = [call.name for call in found]
    assert len(set(names)) == len(names)
    for function in ("dense_decode", "hash_route, uniform", "hash_route, gated", "topk"):
        assert f"{function}, outputs given" in names
        assert f"{function}, outputs allocated" in names


@pytest.mark.parametrize("name", ["dense_decode", "hash_route", "activation_topk", "topk"])
def test_a_wrong_result_is_seen_before_it_is_timed(host, monkeypatch, name):
    right = getattr(host.cute_router, name)

    def wrong(*inputs, **options):
        result = right(*inputs, **options)
        result[0][3, 2] *= 1.001
        return result

    monkeypatch.setattr(host.cute_router, name, wrong)
    for call in host.calls(torch.device("cpu")):
        assert (call.fault() is not None) == call.name.startswith(f"{name},"), call.name


def test_a_verdict_says_what_was_met_and_what_was_missed(host):
    assert host.FUNCTION.verdict(7.9) == "mark 10: met | aim 8: met"
    assert host.FUNCTION.verdict(9.0) == "mark 10: met | aim 8: missed"
    assert host.FUNCTION.verdict(10.1) == "mark 10: missed | aim 8: missed"
    assert host.Mark(0.3).verdict(0.2) == "mark 0.3: met"


@pytest.mark.parametrize("name", ["import cute_router, beyond torch", "import torch"])
def test_imports_are_timed_in_processes_of_their_own(host, name):
    seconds, compiler = host.fresh(name, dict(host.os.environ))
    assert 0 < seconds < 60
    assert not compiler
