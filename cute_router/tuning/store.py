"""What was measured to be best, kept beside the compiled kernels.

One JSON file for each GPU model and version of this package and of the kernel compiler:

    {"format": 1,
     "gpu": {"name": "NVIDIA H200", "capability": [9, 0], "sms": 132, "max_cluster": 16},
     "versions": {"cute_router": "0.1.0", "nvidia-cutlass-dsl": "4.8.1"},
     "choices": [{"kernel": "decode", "spec": {"num_experts": 256, ...}, "tokens": 8, "pdl": true,
                  "knobs": {"tile_experts": 64, "tile_tokens": 8, ...},
                  "us": 2.33, "heuristic_us": 2.41}, ...]}

A choice serves one router, under one `pdl`, at the batch sizes that share the bucket `tokens`. Its
knobs are the fields of a configuration that change nothing but its speed and the order of sums.

A process reads a file once for each GPU, and again only before it writes it. A file that is not of
this form, or not of its GPU and versions, or that holds a configuration which cannot run, counts as
absent and costs one warning. Writers follow one another, and each replaces the file whole.
"""

import importlib.metadata
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import cute_router
from cute_router import arch
from cute_router.compile import cache_dir
from cute_router.gemm import config as decode
from cute_router.gemm import prefill_config as prefill
from cute_router.gemm.config import DecodeConfig
from cute_router.gemm.prefill_config import PrefillConfig
from cute_router.spec import RouterSpec

FORMAT = 1
PREFIX = "tuning-"
DSL = "nvidia-cutlass-dsl"
# What a file raises that is not one of ours, by what it lacks or has too much.
UNFIT = (ValueError, TypeError, KeyError, AttributeError, RecursionError)

Config = DecodeConfig | PrefillConfig
AnyConfig = TypeVar("AnyConfig", DecodeConfig, PrefillConfig)
Knobs = dict[str, Any]  # int, str or bool, by the names of fields


class Kernel(NamedTuple):
    """A kernel that is tuned: its configurations, and which of them can run."""

    config: type[Config]
    can_implement: Callable[[Any], None]


KERNELS = {
    "decode": Kernel(DecodeConfig, decode.can_implement),
    "prefill": Kernel(PrefillConfig, prefill.can_implement),
}
NAMES: dict[type, str] = {kernel.config: name for name, kernel in KERNELS.items()}


def knob_types(config: type[Config]) -> dict[str, type]:
    """The names of a configuration's knobs, and their types."""
    types = {field.name: type(field.default) for field in fields(config) if field.name != "pdl"}
    return {name: kind for name, kind in types.items() if kind in (int, str, bool)}


KNOBS = {name: knob_types(kernel.config) for name, kernel in KERNELS.items()}


@dataclass(frozen=True)
class Gpu:
    """A model of GPU, as far as it decides which configuration is best."""

    name: str
    capability: tuple[int, int]
    sms: int
    max_cluster: int


class Key(NamedTuple):
    """What a choice is found by."""

    kernel: str
    spec: RouterSpec
    tokens: int  # a bucket
    pdl: bool


class Choice(NamedTuple):
    """The knobs that were best and the microseconds they took, beside the heuristics' own."""

    knobs: Knobs
    us: float
    heuristic_us: float | None  # None: that was wrong, or could not be launched


Table = dict[Key, Choice]

_lock = threading.Lock()
_tables: dict[Gpu, Table] = {}


def tuned(config: AnyConfig, tokens: int, device: int) -> AnyConfig:
    """The configuration in place of the heuristics' `config` for a bucket: often that itself."""
    return find(gpu_of(device), config, tokens)


def find(gpu: Gpu, config: AnyConfig, tokens: int) -> AnyConfig:
    """`tuned`, on a GPU like this."""
    choice = table(gpu).get(key_of(config, tokens))
    if choice is None:
        return config
    chosen = replace(config, **choice.knobs)
    # What a config has beside the router and the knobs can need memory that the knobs have used up.
    can_implement = KERNELS[NAMES[type(config)]].can_implement
    return chosen if decode.runs(chosen, can_implement) else config


def key_of(config: Config, tokens: int) -> Key:
    """What the choice in place of `config` is found by."""
    return Key(NAMES[type(config)], config.spec, tokens, config.pdl)


def knobs_of(config: Config) -> Knobs:
    """The knobs of a configuration."""
    return {name: getattr(config, name) for name in KNOBS[NAMES[type(config)]]}


@cache
def gpu_of(device: int) -> Gpu:
    """The GPU of a device."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the GPU cannot be asked for what it is inside a CUDA graph capture: make such a call"
            " once before it"
        )
    about = torch.cuda.get_device_properties(device)
    capability = about.major, about.minor
    return Gpu(about.name, capability, about.multi_processor_count, arch.max_cluster(device))


def table(gpu: Gpu) -> Table:
    """Every choice for a GPU; read at the first call."""
    with _lock:
        if gpu not in _tables:
            _tables[gpu] = read(file_of(gpu), gpu)
        return _tables[gpu]


def keep(gpu: Gpu, choices: Table) -> Path | None:
    """Add choices, for this process and for those to come; the file, or None where none is taken.

    A folder that takes no file costs a warning; the choices then live as long as the process.
    """
    path = file_of(gpu)
    with _lock:
        try:
            with sole_writer(path):
                merged = read(path, gpu) | choices
                write(path, gpu, merged)
        except OSError as error:
            _tables[gpu] = _tables.get(gpu, {}) | choices
            warn(path, f"cannot be written: {error.strerror or error}; only this process uses it")
            return None
        _tables[gpu] = merged
    return path


def forget(gpu: Gpu) -> Path | None:
    """Remove every choice for a GPU; the file that is no more, or None where there was none."""
    path = file_of(gpu)
    with _lock:
        _tables[gpu] = {}
        try:
            path.unlink()
        except FileNotFoundError:
            return None
    return path


# --- files ----------------------------------------------------------------------------------------


def file_of(gpu: Gpu) -> Path:
    """Where the choices for a GPU are kept."""
    parts = [gpu.name, "sm_{}{}".format(*gpu.capability), f"{gpu.sms}", f"{gpu.max_cluster}"]
    parts += [f"{name}-{version}" for name, version in versions().items()]
    return cache_dir() / (PREFIX + "-".join(re.sub(r"[^\w.]+", "_", p) for p in parts) + ".json")


def files() -> list[Path]:
    """Every file of choices in the cache folder, those of other GPUs and versions among them."""
    return sorted(cache_dir().glob(f"{PREFIX}*.json"))


@cache
def versions() -> dict[str, str]:
    """What a measurement depends on beside the GPU."""
    return {"cute_router": cute_router.__version__, DSL: importlib.metadata.version(DSL)}


def read(path: Path, gpu: Gpu) -> Table:
    """The choices in a file; none, and a warning, if it is not what it should be."""
    try:
        return parsed(path.read_text(encoding="utf-8"), gpu)
    except FileNotFoundError:
        return {}
    except OSError as error:
        warn(path, f"cannot be read: {error.strerror or error}")
    except UNFIT as error:
        warn(path, f"is ignored: {type(error).__name__}: {error}")
    return {}


def parsed(text: str, gpu: Gpu) -> Table:
    """The choices that a file holds; raises where it is not one for this GPU and these versions."""
    held = json.loads(text)
    for name, wanted in header(gpu).items():
        if held[name] != wanted:
            raise ValueError(f"{name} must be {wanted}; got {held[name]}")
    return dict(choice_of(record, gpu) for record in held["choices"])


def header(gpu: Gpu) -> dict[str, Any]:
    """What a file for a GPU begins with."""
    about = asdict(gpu) | {"capability": list(gpu.capability)}
    return {"format": FORMAT, "gpu": about, "versions": versions()}


def choice_of(record: dict[str, Any], gpu: Gpu) -> tuple[Key, Choice]:
    """A choice of a file, and what it is found by."""
    kernel, knobs = KERNELS[record["kernel"]], record["knobs"]
    types = {name: type(value) for name, value in knobs.items()}
    wanted = KNOBS[record["kernel"]]
    if types != wanted:  # 8.0 equals 8, and is no number of tokens
        raise TypeError(f"knobs must be {wanted}; got {knobs}")
    if type(record["pdl"]) is not bool or type(record["tokens"]) is not int:
        raise TypeError(f"pdl must be a bool and tokens an int; got {record}")
    spec, target = RouterSpec(**record["spec"]), arch.TARGETS[gpu.capability]
    config = kernel.config(spec=spec, arch=target, pdl=record["pdl"], **knobs)
    kernel.can_implement(config)
    cluster = config.split_k if isinstance(config, DecodeConfig) else config.cluster
    if cluster > gpu.max_cluster:
        raise ValueError(f"a cluster must have at most {gpu.max_cluster} CTAs; got {cluster}")
    us, heuristic_us = record["us"], record["heuristic_us"]
    choice = Choice(knobs, float(us), None if heuristic_us is None else float(heuristic_us))
    return key_of(config, record["tokens"]), choice


def record_of(key: Key, choice: Choice) -> dict[str, Any]:
    """A choice as a file holds it."""
    return key._asdict() | {"spec": asdict(key.spec)} | choice._asdict()


def write(path: Path, gpu: Gpu, choices: Table) -> None:
    """Put a file in place, at once and whole."""
    records = [record_of(key, choice) for key, choice in choices.items()]
    text = json.dumps(header(gpu) | {"choices": records}, indent=1) + "\n"
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(draft, 0o644)  # others may share the folder
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep other processes from writing `path` between reading and writing it."""
    import fcntl  # of Linux, as the kernels are

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def warn(path: Path, fault: str) -> None:
    """Warn once of each fault."""
    warnings.warn(f"cute_router's tuning file {path} {fault}", RuntimeWarning, stacklevel=2)
