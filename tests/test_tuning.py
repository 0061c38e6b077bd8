"""Tuning: what is wrong is dropped, what is fastest is chosen, and the choice is used.

On the CPU kernels and their times are fakes; the judgement of their results is the real one.
"""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plans import as_on_an_h200

import cute_router
from cute_router import RouterSpec, cpu
from cute_router import __main__ as cli
from cute_router import compile as compiler
from cute_router.gemm import decode, prefill
from cute_router.gemm.config import DecodeConfig
from cute_router.heuristics import candidates, decode_config
from cute_router.tuning import bench, report, store, tune
from cute_router.tuning.bench import Bench
from cute_router.tuning.report import Progress
from cute_router.tuning.store import Choice, Gpu, Key, key_of, knobs_of
from cute_router.tuning.tune import Job, choose

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
GPU = Gpu("NVIDIA H200", (9, 0), 132, 16)
SPEC = RouterSpec(64, 128)
JOB = Job("decode", 8)
CONFIGS = list(candidates(SPEC, 8, "sm_90a"))[:4]
OWN, SECOND, THIRD, FOURTH = CONFIGS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, in a process that has read nothing."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_tables", {})
    return tmp_path / "cache"


def launcher(faults=None, spec=SPEC):
    """Launches of the reference, spoilt for the configurations of `faults`."""

    def of(config, device):
        def launch(x, W, bias, weights, ids, factor):
            cpu.dense(x, W, bias, weights, ids, spec, factor, (False, True))
            fault = (faults or {}).get(config)
            if fault is not None:
                fault(weights, ids)

        return launch

    return of


class FakeTimes(Bench):
    """A bench on the CPU whose times are given: a list is read one by one, then stays."""

    def __init__(self, times, faults=None, spec=SPEC, tokens=8):
        super().__init__(spec, tokens, CPU, launcher(faults, spec))
        self.times = times
        self.timed = []

    def us(self, config):
        self.timed.append(config)
        time = self.times[config]
        return time.pop(0) if isinstance(time, list) and len(time) > 1 else time_of(time)


def time_of(time):
    return time[0] if isinstance(time, list) else time


def choice(runner, configs=CONFIGS):
    with Progress(len(configs)) as progress:
        return choose(JOB, configs, runner, progress)


# --- the choice -----------------------------------------------------------------------------------


def test_the_fastest_is_chosen_and_reported_beside_the_heuristics_own():
    runner = FakeTimes({OWN: 3.0, SECOND: 2.5, THIRD: 2.0, FOURTH: 2.8})
    assert choice(runner) == Choice(knobs_of(THIRD), 2.0, 3.0)
    assert runner.timed == [*CONFIGS, OWN, THIRD]  # both once more


@pytest.mark.parametrize(("us", "kept"), [(2.94, True), (2.939, False)])
def test_the_heuristics_own_is_kept_unless_it_is_beaten_by_2_percent(us, kept):
    times = dict.fromkeys(CONFIGS, 5.0) | {OWN: 3.0, SECOND: us}
    expected = Choice(knobs_of(OWN), 3.0, 3.0) if kept else Choice(knobs_of(SECOND), us, 3.0)
    assert choice(FakeTimes(times)) == expected


def test_a_time_that_was_luck_is_not_enough():
    """The second look, side by side, decides."""
    runner = FakeTimes(dict.fromkeys(CONFIGS, 5.0) | {OWN: [3.0, 2.9], SECOND: [2.5, 2.89]})
    assert choice(runner) == Choice(knobs_of(OWN), 2.9, 2.9)


def test_where_the_heuristics_own_is_fastest_nothing_is_timed_twice():
    runner = FakeTimes(dict.fromkeys(CONFIGS, 5.0) | {OWN: 3.0})
    assert choice(runner) == Choice(knobs_of(OWN), 3.0, 3.0)
    assert runner.timed == CONFIGS


# --- what is wrong --------------------------------------------------------------------------------


def swap_two_experts(weights, ids):
    ids[0, :2] = ids[0, :2].flip(0)
    weights[0, :2] = weights[0, :2].flip(0)


def out_of_range(weights, ids):
    ids[2, 0] = 64


def weight_off_by_2e_5(weights, ids):
    weights[4, 3] += 2e-5 * bench.FACTOR


def unwritten(weights, ids):
    weights[4, 5] = -77


FAULTS = {
    swap_two_experts: "wrong: ids: token 0, slot 0: got expert ",
    out_of_range: "wrong: ids: token 2: got [64, ",
    weight_off_by_2e_5: "wrong: weights: token 4, slot 3: got ",
    unwritten: "wrong: weights: token 4, slot 5: got -77, wanted ",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_candidate_that_is_wrong_is_dropped_however_fast_it_is(capsys, fault):
    times = {OWN: 3.0, SECOND: 2.5, THIRD: 0.1, FOURTH: 2.8}
    runner = FakeTimes(times, {THIRD: fault})
    assert choice(runner) == Choice(knobs_of(SECOND), 2.5, 3.0)
    assert THIRD not in runner.timed
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dropped decode N=8 {report.in_words(knobs_of(THIRD))}: ")
    assert FAULTS[fault] in line


def test_a_candidate_whose_results_vary_is_dropped(capsys):
    calls = []

    def unsteady(weights, ids):
        calls.append(1)
        if len(calls) % 2 == 0:
            weights.view(torch.int32)[0, 0] += 1  # well within the bound

    runner = FakeTimes(dict.fromkeys(CONFIGS, 3.0) | {THIRD: 0.1}, {THIRD: unsteady})
    assert choice(runner) == Choice(knobs_of(OWN), 3.0, 3.0)
    assert "wrong: two calls differ: " in capsys.readouterr().err


def test_a_candidate_that_does_not_run_is_dropped_with_the_reason(capsys):
    def refuse(weights, ids):
        raise RuntimeError("CUDA error 912: invalid cluster size\nand a long story")

    runner = FakeTimes(dict.fromkeys(CONFIGS, 3.0) | {SECOND: 1.0}, {SECOND: refuse})
    assert choice(runner) == Choice(knobs_of(OWN), 3.0, 3.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": RuntimeError: CUDA error 912: invalid cluster size")


def test_where_the_heuristics_own_is_wrong_the_best_of_the_others_takes_its_place():
    times = {OWN: 1.0, SECOND: 2.5, THIRD: 2.49, FOURTH: 2.8}
    runner = FakeTimes(times, {OWN: swap_two_experts})
    assert choice(runner) == Choice(knobs_of(THIRD), 2.49, None)


def test_where_none_is_right_there_is_an_error():
    runner = FakeTimes({}, dict.fromkeys(CONFIGS, out_of_range))
    with pytest.raises(RuntimeError, match="no configuration of decode is right at N=8"):
        choice(runner)


def test_a_candidate_that_ends_the_device_ends_the_tuning():
    def refuse(weights, ids):
        raise RuntimeError("unspecified launch failure")

    runner = FakeTimes(dict.fromkeys(CONFIGS, 3.0), {SECOND: refuse})

    def lost():
        raise RuntimeError("the device is lost")

    runner.settle = lost
    with pytest.raises(RuntimeError, match="the device is lost"):
        choice(runner)
    assert runner.timed == [OWN]


@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(64, 128, 4, "sigmoid", True, False, 8, 4),
        RouterSpec(7, 64, 2, "softmax", False),
        RouterSpec(300, 264, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [2, 64, 256, 768])
def test_a_right_kernel_of_any_router_is_right_at_any_batch_size(spec, tokens):
    assert FakeTimes({}, spec=spec, tokens=tokens).faults(OWN) == []


@pytest.mark.parametrize("token", [0, 250, 260, 505, 515, 760])
def test_of_a_large_batch_the_first_and_last_tokens_are_judged(token):
    def fault(weights, ids):
        weights[token, 0] *= 2

    spec = RouterSpec(64, 128)
    faults = FakeTimes({}, {OWN: fault}, spec, 768).faults(OWN)
    assert bool(faults) == (not 256 <= token < 512)


def test_half_of_the_data_is_full_of_ties():
    """Equal scores must go to the lower id: a kernel that does otherwise is dropped."""

    def of(config, device):
        def launch(x, W, bias, weights, ids, factor):
            flipped = W.flip(0), None if bias is None else bias.flip(0)
            cpu.dense(x, *flipped, weights, ids, SPEC, factor, (False, True))
            ids.copy_(63 - ids)

        return launch

    runner = FakeTimes({})
    runner.launcher = of
    assert any(fault.startswith("ids: token ") for fault in runner.faults(OWN))


# --- tune() ---------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch) -> dict:
    """An H200 as far as `tune` is concerned, where every configuration takes 3 us or as said."""
    times: dict[DecodeConfig, float] = {}

    class AnyTimes(FakeTimes):
        def __init__(self, spec, tokens, device, launcher_of):
            super().__init__(times, spec=spec, tokens=tokens)

        def us(self, config):
            return times.get(config, 3.0)

    monkeypatch.setattr(tune, "device_index", lambda device: 0)
    monkeypatch.setattr(tune, "target_for", lambda device: ("sm_90", "sm_90a"))
    monkeypatch.setattr(tune, "Bench", AnyTimes)
    monkeypatch.setattr(store, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    return times


def test_tune_stores_what_it_chooses_for_each_bucket_once(hopper):
    hopper[SECOND] = 2.0
    choices = cute_router.tune(SPEC, (5, 8, 64))
    own = decode_config(SPEC, 64, "sm_90a")
    assert choices == {
        Key("decode", SPEC, 8, True): Choice(knobs_of(SECOND), 2.0, 3.0),
        Key("decode", SPEC, 64, True): Choice(knobs_of(own), 3.0, 3.0),
    }
    assert store.read(store.file_of(GPU), GPU) == choices
    assert store.find(GPU, OWN, 8) == SECOND


def test_tune_serves_large_batches_by_the_prefill_kernel(hopper):
    (key,) = cute_router.tune(SPEC, (200,), pdl=False)
    assert key == Key("prefill", SPEC, 256, False)


def test_a_choice_takes_effect_where_plans_were_made_before(hopper, monkeypatch):
    asked = as_on_an_h200(monkeypatch)
    call = (64, 128, True, 6, "sqrtsoftplus", True, 1, 1, False, True, 8, 0)
    decode.plan_of(*call)
    hopper[SECOND] = 2.0
    cute_router.tune(SPEC, (8,))
    decode.plan_of(*call)
    decode.plan_of.cache_clear()
    assert asked == [OWN, SECOND]


def test_every_kernel_forgets_its_plans(monkeypatch):
    cleared = []
    for module, name in ((decode, "plan_of"), (prefill, "kernel_of")):
        function = getattr(module, name)
        monkeypatch.setattr(function, "cache_clear", lambda name=name: cleared.append(name), False)
    tune.use()
    assert cleared == ["plan_of", "kernel_of"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((64, 128), (8,)), TypeError, "spec must be a RouterSpec; got tuple"),
        ((SPEC, 8), TypeError, "Ns must be batch sizes; got int"),
        ((SPEC, ("8",)), TypeError, "Ns must be an int; got str"),
        ((SPEC, (0,)), ValueError, "Ns must be at least 1; got 0"),
        ((SPEC, ()), ValueError, "Ns must hold at least one batch size; got none"),
        ((SPEC, (8,), "cpu"), ValueError, r"device must be a CUDA device .*; got cpu$"),
        ((SPEC, (8,), "gpu"), ValueError, r"device must be a CUDA device .*; got 'gpu'$"),
        ((SPEC, (8,), "cuda:99"), ValueError, r"device must be a CUDA device .*; got cuda:99; "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_tuned_is_an_error_that_says_why(arguments, error, message):
    with pytest.raises(error, match=message):
        cute_router.tune(*arguments)


def test_pdl_is_a_bool():
    with pytest.raises(TypeError, match="pdl must be a bool; got int"):
        cute_router.tune(SPEC, pdl=1)


def test_a_device_without_kernels_of_its_own_has_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(tune, "backend_for", lambda index: "generic")
    with pytest.raises(ValueError, match=r"got cuda, which has 8\.9"):
        cute_router.tune(SPEC)


# --- what is shown --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(4) as progress:
        for name in "abcd":
            progress.step(name)
            report.say("a word")
    lines = sys.stderr.getvalue().split("\r\033[K")
    assert lines[1] == f"[{' ' * 24}] 1/4  a"
    assert lines[3] == f"[{'#' * 6}{' ' * 18}] 2/4, 0 s left  b"
    assert lines[2] == "a word\n"
    assert lines[-1] == ""


def test_progress_is_silent_elsewhere(capsys):
    with Progress(1) as progress:
        progress.step("a")
    assert capsys.readouterr() == ("", "")


# --- the command line -----------------------------------------------------------------------------

ROUTER = ["tune", "--experts", "64", "--hidden", "128", "--top-k", "6"]


def test_the_command_prints_what_is_chosen_and_shows_and_forgets_it(hopper, capsys):
    hopper[SECOND] = 2.0
    assert cli.main([*ROUTER, "--tokens", "8"]) == 0
    path = store.file_of(GPU)
    words = report.in_words(knobs_of(SECOND))
    line = f"decode N=8 E=64 K=128 k=6 sqrtsoftplus | 2.00 us | heuristic 3.00 us | {words}"
    assert capsys.readouterr().out.splitlines() == [line, f"kept in {path}"]

    foreign = path.with_name("tuning-other.json")
    foreign.write_text("{}")
    assert cli.main(["tune", "--show"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(path),
        f"  {line}",
        str(foreign),
        "  not used: KeyError: 'gpu'",
    ]

    assert cli.main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out == f"removed {path}\n"
    assert cli.main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out == "nothing was stored for this GPU\n"
    assert foreign.exists()


def test_the_commands_options_reach_the_tuner(hopper, capsys):
    options = ["--scoring", "sigmoid", "--no-bias", "--no-renormalize", "--no-pdl"]
    cli.main([*ROUTER, *options, "--n-group", "4", "--topk-group", "2", "--tokens", "1", "30"])
    spec = RouterSpec(64, 128, 6, "sigmoid", False, False, 4, 2)
    assert list(store.table(GPU)) == [
        Key("decode", spec, 2, False),
        Key("decode", spec, 32, False),
    ]
    shown = "E=64 K=128 k=6 sigmoid raw no bias groups 2/4 no pdl | 3.00 us"
    assert capsys.readouterr().out.count(shown) == 2


def test_without_tokens_the_command_tunes_every_bucket_up_to_64(hopper):
    cli.main(ROUTER)
    assert [key.tokens for key in store.table(GPU)] == [2, 8, 16, 32, 64]


def test_where_no_candidate_is_right_the_command_fails(hopper, monkeypatch, capsys):
    monkeypatch.setattr(tune.Bench, "faults", lambda self, config: ["all wrong"])
    assert cli.main([*ROUTER, "--tokens", "8"]) == 1
    assert "FAILED: no configuration of decode is right at N=8" in capsys.readouterr().err


BAD = [
    (["tune"], "the following arguments are required: --experts, --hidden, --top-k"),
    (["tune", "--experts", "64"], "the following arguments are required: --hidden, --top-k"),
    ([*ROUTER, "--hidden", "100"], "hidden_size must be a multiple of 8; got 100"),
    ([*ROUTER, "--tokens", "0"], "argument --tokens: must be a positive integer; got '0'"),
    ([*ROUTER, "--device", "cpu"], "device must be a CUDA device of compute capability 9.0"),
    ([*ROUTER, "--device", "cuda:99"], "got cuda:99; there are "),
    (["tune", "--clear", "--device", "cuda:99"], "got cuda:99; there are "),
    (["tune", "--clear", "--show"], "not allowed with argument"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_arguments_exit_with_2_and_say_why(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so():
    result = subprocess.run(
        [sys.executable, "-m", "cute_router", *ROUTER], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("got cuda; there are 0")
    assert "Traceback" not in result.stderr


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def real():
    """Plans of the GPU that is there, which are forgotten afterwards."""
    tune.use()
    yield store.gpu_of(torch.cuda.current_device())
    tune.use()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 256])
def test_a_router_is_tuned_and_its_choice_is_stored(real, monkeypatch, tokens):
    kernel = "decode" if tokens <= 64 else "prefill"
    maker = tune.MAKERS[kernel]
    few = maker._replace(candidates=lambda *call: maker.candidates(*call)[:3])
    monkeypatch.setitem(tune.MAKERS, kernel, few)
    spec = RouterSpec(256, 512)
    choices = cute_router.tune(spec, (tokens,))
    ((key, chosen),) = choices.items()
    assert key == Key(kernel, spec, tokens, True)
    assert 0 < chosen.us < 1000
    assert chosen.heuristic_us is not None
    assert chosen.us <= chosen.heuristic_us
    assert store.read(store.file_of(real), real) == choices


@pytest.mark.gpu
def test_a_stored_choice_is_what_the_next_call_runs(real, monkeypatch):
    """The second candidate is made the fastest; a call is right and runs its kernel."""
    E, K, N = 256, 512, 8
    spec = RouterSpec(E, K)
    x = torch.randn(N, K, device="cuda").bfloat16()
    W = (torch.randn(E, K, device="cuda") * K**-0.5).bfloat16()
    bias = torch.randn(E, device="cuda") * 0.1
    call = (E, K, True, 6, "sqrtsoftplus", True, 1, 1, False, True, N, x.get_device())
    before = cute_router.dense_decode(x, W, bias)

    maker = tune.MAKERS["decode"]
    few = maker._replace(candidates=lambda *call: maker.candidates(*call)[:2])
    monkeypatch.setitem(tune.MAKERS, "decode", few)
    target = decode.target_for(x.get_device())[1]
    own, other = list(candidates(spec, N, target, max_cluster=real.max_cluster))[:2]
    monkeypatch.setattr(Bench, "us", lambda self, config: 2.0 if config == other else 3.0)
    assert decode.plan_of(*call).kernel is compiler.kernel(own)
    cute_router.tune(spec, (N,))
    assert key_of(own, N) in store.table(real)
    assert decode.plan_of(*call).kernel is compiler.kernel(other)
    after = cute_router.dense_decode(x, W, bias)
    assert torch.equal(after.ids, before.ids)
    assert (after.weights - before.weights).abs().max() <= 2e-5
