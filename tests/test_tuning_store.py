"""The tuning file: what was written is found again, and nothing else ever is.

Nothing here needs a GPU: a `Gpu` is a name and three numbers.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from plans import as_on_an_h200

from cute_router import RouterSpec
from cute_router import compile as compiler
from cute_router.gemm import decode
from cute_router.gemm.config import DecodeConfig
from cute_router.heuristics import candidates, decode_config
from cute_router.prefill_heuristics import candidates as prefill_candidates
from cute_router.prefill_heuristics import prefill_config
from cute_router.tuning import store
from cute_router.tuning.store import Choice, Gpu, Key, key_of, knobs_of

ROOT = Path(__file__).parent.parent
GPU = Gpu("NVIDIA H200", (9, 0), 132, 16)
SPEC = RouterSpec(256, 4096)
OWN, OTHER, THIRD = list(candidates(SPEC, 8, "sm_90a"))[:3]
PREFILL_OWN = prefill_config(SPEC, 1024, "sm_90a")
PREFILL = next(c for c in prefill_candidates(SPEC, "sm_90a") if c != PREFILL_OWN)
DECODE_KEY, PREFILL_KEY = key_of(OWN, 8), key_of(PREFILL_OWN, 1024)
CHOICES = {
    DECODE_KEY: Choice(knobs_of(OTHER), 2.33, 2.41),
    PREFILL_KEY: Choice(knobs_of(PREFILL), 11.5, None),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty cache folder, in a process that has read nothing and warned of nothing yet."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    start_anew(monkeypatch)
    store.warn.cache_clear()
    yield tmp_path / "cache"
    assert not list(tmp_path.glob("**/*.part"))  # no test leaves half a file


def start_anew(monkeypatch) -> None:
    """As if this were a new process."""
    monkeypatch.setattr(store, "_tables", {})


def warned(call) -> list[str]:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(issubclass(w.category, RuntimeWarning) for w in caught)
    return [str(w.message) for w in caught]


# --- found again ----------------------------------------------------------------------------------


def test_a_later_process_finds_what_was_kept(folder, monkeypatch):
    path = store.keep(GPU, CHOICES)
    assert path == store.file_of(GPU)
    assert path.parent == folder
    assert store.files() == [path]
    start_anew(monkeypatch)
    assert store.table(GPU) == CHOICES
    assert store.find(GPU, OWN, 8) == OTHER
    assert store.find(GPU, PREFILL_OWN, 1024) == PREFILL


def test_the_file_is_of_the_documented_form():
    path = store.keep(GPU, {DECODE_KEY: CHOICES[DECODE_KEY]})
    assert json.loads(path.read_text()) == {
        "format": 1,
        "gpu": {"name": "NVIDIA H200", "capability": [9, 0], "sms": 132, "max_cluster": 16},
        "versions": store.versions(),
        "choices": [
            {
                "kernel": "decode",
                "spec": {
                    "num_experts": 256,
                    "hidden_size": 4096,
                    "top_k": 6,
                    "scoring": "sqrtsoftplus",
                    "renormalize": True,
                    "has_bias": True,
                    "n_group": 1,
                    "topk_group": 1,
                },
                "tokens": 8,
                "pdl": True,
                "knobs": {
                    "tile_experts": OTHER.tile_experts,
                    "tile_tokens": OTHER.tile_tokens,
                    "split_k": OTHER.split_k,
                    "stages": OTHER.stages,
                    "trigger": OTHER.trigger,
                    "exclusive": OTHER.exclusive,
                },
                "us": 2.33,
                "heuristic_us": 2.41,
            }
        ],
    }


def test_a_choice_serves_nothing_but_what_it_was_made_for():
    store.keep(GPU, CHOICES)
    for changed in (
        decode_config(replace(SPEC, top_k=7), 8, "sm_90a"),
        decode_config(replace(SPEC, has_bias=False), 8, "sm_90a"),
        replace(OWN, pdl=False),
    ):
        assert store.find(GPU, changed, 8) == changed
    assert store.find(GPU, OWN, 16) == OWN
    assert store.find(GPU, PREFILL_OWN, 8) == PREFILL_OWN
    for gpu in (
        replace(GPU, name="NVIDIA H100"),
        replace(GPU, sms=20),
        replace(GPU, max_cluster=8),
    ):
        assert store.find(gpu, OWN, 8) == OWN


def test_each_gpu_and_version_has_a_file_of_its_own(monkeypatch):
    gpus = [
        GPU,
        replace(GPU, name="NVIDIA H200 MIG 1g.18gb"),
        replace(GPU, capability=(10, 0)),
        replace(GPU, sms=20),
        replace(GPU, max_cluster=8),
    ]
    names = {store.file_of(gpu).name for gpu in gpus}
    monkeypatch.setattr(store, "versions", lambda: {"cute_router": "9.9", store.DSL: "4.8.1"})
    assert len(names | {store.file_of(GPU).name}) == len(gpus) + 1
    assert all("/" not in name and " " not in name for name in names)


def test_a_new_choice_replaces_that_of_the_same_router_and_leaves_the_others(monkeypatch):
    store.keep(GPU, CHOICES)
    newer = Choice(knobs_of(THIRD), 2.2, 2.4)
    start_anew(monkeypatch)
    store.keep(GPU, {DECODE_KEY: newer})
    assert store.table(GPU) == CHOICES | {DECODE_KEY: newer}
    start_anew(monkeypatch)
    assert store.table(GPU) == CHOICES | {DECODE_KEY: newer}


def test_what_is_forgotten_is_gone_here_and_later(monkeypatch):
    path = store.keep(GPU, CHOICES)
    assert store.forget(GPU) == path
    assert store.find(GPU, OWN, 8) == OWN
    assert store.forget(GPU) is None
    start_anew(monkeypatch)
    assert store.find(GPU, OWN, 8) == OWN


def test_a_process_reads_a_file_once(monkeypatch):
    store.keep(GPU, CHOICES)
    start_anew(monkeypatch)
    reads = []
    read = store.read
    monkeypatch.setattr(store, "read", lambda *call: reads.append(call) or read(*call))
    for _ in range(3):
        store.find(GPU, OWN, 8)
    assert len(reads) == 1


def test_knobs_that_a_call_has_no_memory_for_are_left_alone(monkeypatch):
    """What else is in a configuration may need memory that the knobs have used up."""
    store.keep(GPU, CHOICES)
    monkeypatch.setattr(store.decode, "runs", lambda config, _: config != OTHER)
    assert store.find(GPU, OWN, 8) == OWN


# --- files that are not what they should be -------------------------------------------------------


def edited(**changes):
    """A sound file with fields replaced: those of its first choice, or `header` fields."""

    def text(sound: str) -> str:
        held = json.loads(sound)
        for name, value in changes.items():
            (held if name in held else held["choices"][0])[name] = value
        return json.dumps(held)

    return text


def knobs(**changes):
    return edited(knobs=knobs_of(OTHER) | changes)


UNFIT = {
    "empty": lambda _: "",
    "torn": lambda sound: sound[:200],
    "not JSON": lambda _: "\x00\x7fELF",
    "another thing": lambda _: "[1, 2, 3]",
    "too deep": lambda _: "[" * 100_000,
    "no choices": lambda sound: json.dumps({"format": 1}),
    "another format": edited(format=2),
    "of another GPU": edited(gpu={"name": "NVIDIA H100"}),
    "of another version": edited(versions={"cute_router": "0.0.1"}),
    "choices that are none": edited(choices=[7]),
    "an unknown kernel": edited(kernel="encode"),
    "an impossible router": edited(spec={"num_experts": 0, "hidden_size": 64}),
    "a router of another kind": edited(spec={"heads": 8}),
    "tokens of another type": edited(tokens="8"),
    "pdl of another type": edited(pdl=1),
    "a knob too few": edited(knobs={"tile_tokens": 8}),
    "a knob too many": knobs(warps=4),
    "a knob of another type": knobs(tile_tokens=8.0),
    "a flag of another type": knobs(exclusive=1),
    "a knob out of range": knobs(tile_tokens=12),
    "more memory than there is": knobs(tile_tokens=64, split_k=2, stages=32),
    "no time": edited(us=None),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT.keys())
def test_a_file_that_is_not_sound_counts_as_absent_and_costs_one_warning(monkeypatch, change):
    path = store.keep(GPU, CHOICES)
    path.write_text(change(path.read_text()))

    def use() -> None:
        for _ in range(3):
            start_anew(monkeypatch)
            assert store.find(GPU, OWN, 8) == OWN

    (warning,) = warned(use)
    assert f"tuning file {path} is ignored: " in warning
    store.keep(GPU, CHOICES)  # and it is replaced by a sound one
    start_anew(monkeypatch)
    assert warned(lambda: store.table(GPU)) == []
    assert store.find(GPU, OWN, 8) == OTHER


def test_a_cluster_that_the_gpu_does_not_start_is_not_taken_from_a_file():
    small = replace(GPU, max_cluster=8)
    record = store.record_of(DECODE_KEY, CHOICES[DECODE_KEY])
    assert record["knobs"]["split_k"] == 16
    store.choice_of(record, GPU)
    with pytest.raises(ValueError, match="a cluster must have at most 8 CTAs; got 16"):
        store.choice_of(record, small)


def test_a_file_that_cannot_be_read_counts_as_absent(folder):
    store.file_of(GPU).mkdir(parents=True)
    (warning,) = warned(lambda: store.table(GPU))
    assert "cannot be read: Is a directory" in warning
    assert store.find(GPU, OWN, 8) == OWN


# --- folders that take no file, processes at once -------------------------------------------------


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def read_only(tmp_path: Path) -> Path:
    return Path("/proc")  # even root makes no file there


@pytest.mark.parametrize("unusable", [below_a_file, read_only])
def test_in_a_folder_that_takes_no_file_choices_live_as_long_as_the_process(
    tmp_path, monkeypatch, unusable
):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(unusable(tmp_path)))
    kept = []
    (warning,) = warned(lambda: kept.append(store.keep(GPU, CHOICES)))
    assert kept == [None]
    assert "cannot be written: " in warning
    assert store.find(GPU, OWN, 8) == OTHER


WRITER = """
import sys
from cute_router import RouterSpec
from cute_router.heuristics import decode_config
from cute_router.tuning.store import Choice, Gpu, keep, key_of, knobs_of
gpu = Gpu("NVIDIA H200", (9, 0), 132, 16)
print("ready", flush=True)
sys.stdin.readline()
for i in range(20):
    config = decode_config(RouterSpec(64 + i, 64 * (1 + int(sys.argv[1]))), 8, "sm_90a")
    keep(gpu, {key_of(config, 8): Choice(knobs_of(config), 1.0, 1.0)})
"""


def test_processes_that_write_at_once_lose_nothing_and_tear_nothing():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(i)], text=True, cwd=ROOT, **pipes)
        for i in range(3)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        assert warned(lambda: store.read(store.file_of(GPU), GPU)) == []
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(store.table(GPU)) == 60


# --- in use ---------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch) -> Iterator[list[DecodeConfig]]:
    """An H200 as far as plans are concerned; the configurations whose kernels they ask for."""
    monkeypatch.setattr(store, "gpu_of", lambda device: GPU)
    yield as_on_an_h200(monkeypatch)
    decode.plan_of.cache_clear()


def plan(batch_invariant: bool = False, bucket: int = 8, pdl: bool = True):
    options = (6, "sqrtsoftplus", True, 1, 1, batch_invariant, pdl)
    return decode.plan_of(256, 4096, True, *options, bucket, 0)


def test_a_plan_is_made_of_what_was_chosen(hopper):
    store.keep(GPU, CHOICES)
    made = plan()
    assert hopper == [OTHER]
    assert (made.max_tokens, made.token_words) == (256 * OTHER.tile_tokens, OTHER.packet_words)


def test_a_plan_is_the_heuristics_where_nothing_was_chosen(hopper):
    store.keep(GPU, CHOICES)
    plan(bucket=16)
    plan(pdl=False)
    assert hopper == [
        decode_config(SPEC, 16, "sm_90a"),
        decode_config(SPEC, 8, "sm_90a", pdl=False),
    ]


def test_a_batch_invariant_plan_ignores_what_was_chosen(hopper):
    invariant = decode_config(SPEC, 8, "sm_90a", batch_invariant=True)
    key = Key("decode", SPEC, 8, True)
    assert key == key_of(invariant, 8)
    store.keep(GPU, CHOICES)
    plan(batch_invariant=True)
    assert hopper == [invariant]
