"""The benchmarks call what they say they call: on the CPU, where nothing can be timed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def benchmark(name):
    """benchmarks/{name}.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def host():
    return benchmark("host")


@pytest.fixture(scope="module")
def router():
    return benchmark("router")


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


# --- benchmarks/contest.py ----------------------------------------------------------------------


@pytest.fixture
def contest(monkeypatch):
    """The module, with a clock in place of CUDA graphs: 1 us a call of the first, 2 of the next."""
    module = benchmark("contest")
    monkeypatch.setattr(module, "captured", lambda call, buffers: (call, buffers))
    monkeypatch.setattr(module, "replay_us", lambda *graphs: [1.0 + i for i in range(len(graphs))])
    return module


def test_only_contenders_that_are_right_are_timed(contest):
    def broken(i):
        raise RuntimeError("no such kernel\nand more")

    calls = {
        contest.OURS: lambda i: i,
        "off": lambda i: 2 * i,
        "broken": broken,
        "peer": lambda i: i,
    }
    us, absent = contest.contest(
        calls, lambda name, found, i: None if found == i else f"{found} for {i}", buffers=9
    )
    assert us == {contest.OURS: 1.0, "peer": 2.0}
    assert absent == {"off": "wrong result: 2 for 1", "broken": "RuntimeError: no such kernel"}


def test_a_contest_without_us_is_none(contest):
    with pytest.raises(SystemExit, match="wrong result: all of it"):
        contest.contest({contest.OURS: lambda i: i}, lambda *_: "all of it", buffers=2)
    with pytest.raises(ZeroDivisionError):
        contest.contest({contest.OURS: lambda i: 1 // i}, lambda *_: None, buffers=2)


def test_rested_contenders_take_turns_and_the_median_of_all_replays_counts(monkeypatch):
    timing = benchmark("timing")
    now, log = [0.0], []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: log.append("-"))

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def __init__(self, name, ms):
            self.name, self.ms = name, ms

        def replay(self):
            log.append(self.name)
            slow = len(log) > 28  # the second round and the third
            now[0] += self.ms * (2 if slow else 1)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    contenders = timing.Captured(Graph("a", 1.0), 10), timing.Captured(Graph("b", 3.0), 20)
    assert timing.replay_us(*contenders) == [200.0, 300.0]
    assert "".join(log) == ("-" + "a" * 13 + "-" + "b" * 13) * 3


# --- benchmarks/router.py -----------------------------------------------------------------------


def result(router, N, ours=10.0, gated=25.0, cublas=20.0, shape=(256, 4096)):
    """A result with invented times."""
    us = {router.OURS: ours, router.OWN_GATE: gated, router.CUBLAS: cublas, router.EAGER: 99.0}
    us |= {router.FLOOR: 2.0} if N <= 64 else {}
    floors = router.floors(*shape, N, bandwidth=4.0)
    return router.Result(*shape, N, "route (some kernel)", us, floors, {"QuACK": "not installed"})


def test_the_floors_are_bytes_over_bandwidth_and_flop_over_peak(router):
    found = router.floors(256, 4096, 16384, bandwidth=4.0)
    assert found["memory floor"] == pytest.approx(137_101_312 / 4e6)
    assert found["compute floor"] == pytest.approx(34_359_738_368 / 989.4e6)


def test_a_line_has_the_rate_the_higher_floor_and_the_verdicts(router):
    line = result(router, 4096, ours=20.0, cublas=19.0).line()  # 27.67 us is recorded
    for part in (
        "N=4096 E=256 K=4096 k=6 bf16 | route (some kernel) | 20.00 us | 429 TFLOP/s",
        "| 2.2x memory floor |",
        "| 0.72x best recorded peer (cuBLAS + gate 27.67 us) | mark 0.85: met |",
        "| 1.05x cuBLAS GEMM alone | aim 1: missed | 0.80x cuBLAS + own gate | 0.20x eager",
    ):
        assert part in line
    assert "| 5.0x W-stream |" in result(router, 64).line()
    assert "x compute floor |" in result(router, 16384, shape=(384, 7168)).line()


def test_marks_are_stricter_below_1024_tokens_and_counted(router):
    peer = 11.91  # recorded for 256 tokens
    shape = (384, 7168)
    met = result(router, 256, ours=0.799 * peer, shape=shape)
    missed = result(router, 256, ours=0.801 * peer, shape=shape)
    many = result(router, 1024, ours=0.849 * 19.87, cublas=10.0, shape=shape)
    assert [r.line().split("mark ")[1][:9] for r in (met, missed)] == ["0.8: met ", "0.8: miss"]
    assert "mark 0.85: met" in many.line()
    assert router.summary([met, missed, many]).splitlines() == [
        "marks met: 2 of 3 (missed: N=256 E=384)",
        "aims met: 2 of 3 (missed: N=1024 E=384)",
    ]


def test_every_number_of_tokens_timed_has_a_recorded_peer(router):
    for E, K in (router.FLASH, router.PRO):
        assert all(result(router, N, shape=(E, K)).recorded for N in router.TOKENS)


def test_the_best_gate_of_the_run_is_the_one_behind_cublas(router):
    found = result(router, 256)
    found.us["cuBLAS + vLLM gate"] = 24.0
    found.us["vLLM LL GEMM + vLLM gate"] = 3.0
    assert found.gated == (24.0, "cuBLAS + vLLM gate")


@pytest.mark.parametrize("N", [1, 2, 511, 512, 513, 1024, 16383, 16384])
def test_the_rows_judged_span_the_call(router, N):
    rows = router.rows_checked(N).tolist()
    assert (rows[0], rows[-1], len(set(rows))) == (0, N - 1, min(N, 512))
    assert {row // 64 for row in rows} == set(range(-(-N // 64)))


def problem_of(router, N, K=64):
    """A small problem on the CPU."""
    x, W = torch.randn(N, K).bfloat16(), (torch.randn(16, K) / 8).bfloat16()
    return router.Problem(16, K, N, [W], [x], torch.zeros(16))


@pytest.mark.parametrize("N", [5, 700])
def test_a_wrong_last_token_is_seen_before_the_router_is_timed(router, N):
    problem = problem_of(router, N)
    weights, ids = router.ours(problem)(0)
    assert router.disagreement((weights, ids), problem, 0) is None
    assert router.disagreement((weights[:-1], ids[:-1]), problem, 0) is not None
    weights[-1, 2] *= 1.001
    assert router.disagreement((weights, ids), problem, 0) is not None


def test_wrong_logits_are_seen_before_the_product_is_timed(router):
    problem = problem_of(router, 700)
    logits = router.reference.logits(problem.xs[0], problem.Ws[0]).float()
    assert router.miscalculated(logits, problem, 0) is None
    logits[-1, 2] += 1e-3
    assert router.miscalculated(logits, problem, 0) is not None


@pytest.mark.parametrize(
    ("N", "function", "subject"),
    [
        (64, "dense_decode", "dense_decode"),
        (128, "route", "route (decode kernel)"),
        (129, "route", "route (prefill kernel)"),
    ],
)
def test_the_subject_is_what_is_called(router, monkeypatch, N, function, subject):
    called = []
    for name in ("dense_decode", "route"):
        monkeypatch.setattr(router, name, lambda *_, name=name, **__: called.append(name))
    problem = problem_of(router, N, 4096)
    router.ours(problem)(0)
    assert called == [function]
    assert router.subject_of(problem.xs[0], problem.Ws[0]) == subject


def test_many_tokens_get_fewer_sets_that_are_larger_than_the_cache(router, monkeypatch):
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device: randn(1).expand(*size))
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    for (E, K), sets in ((router.FLASH, 40), (router.PRO, 16)):
        Ws = router.random_weights(E, K)
        for N in router.TOKENS:
            problem = router.make_problem(Ws, N)
            assert len(problem.Ws) == len(problem.xs) <= len(Ws) == sets
            assert N > 1024 or len(problem.Ws) == sets
            assert len(problem.Ws) * 2 * N * K <= 2**30
            assert len(problem.Ws) * 2 * (E + N) * K > 80 * 2**20


def test_a_report_is_drawn_again(router, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plot = sys.modules["router_plot"]
    results = [
        result(router, N, shape=shape)
        for shape in (router.FLASH, router.PRO)
        for N in router.TOKENS
    ]
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"
    where = {"gpu": "a GPU", "date": "a day"}
    router.write_report(report, where, results=[r.as_dict() for r in results])
    monkeypatch.setattr(sys, "argv", ["router_plot.py", str(report), str(picture)])
    assert plot.main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_report_keeps_what_is_drawn(router):
    plot = sys.modules["router_plot"]
    results = [result(router, N) for N in (16384, 64)]
    read = [router.Result.from_dict(json.loads(json.dumps(r.as_dict()))) for r in results]
    drawn = plot.curves(read)
    assert set(drawn) == set(plot.STYLES) - {router.COMPILED}
    for points in drawn.values():
        assert [N for N, _ in points] == [64, 16384]
    assert drawn[plot.GATED] == [(64, 25.0), (16384, 25.0)]
    assert drawn["compute floor"][1][1] == pytest.approx(34.728, abs=1e-3)
    assert plot.gates(read) == "own gate"
