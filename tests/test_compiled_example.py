"""The torch.compile example works as a subprocess, on whatever is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SMALL = ["--experts", 32, "--hidden", 64, "--tokens", 3, "--layers", 3, "--steps", 4]


def example(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "compiled_decode.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )


def test_the_compiled_loop_generates_what_it_should():
    result = example(*SMALL)
    assert result.returncode == 0, result.stderr
    assert "3 routers of 32 experts, hidden size 64" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(": passed")
    (tokens,) = (line for line in result.stdout.splitlines() if line.startswith("tokens "))
    assert len(tokens.partition(": ")[2].split()) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_example_says_what_it_ran_on():
    result = example(*SMALL, "--layers", 1)
    assert "runs on   the CPU, on the fp64 reference" in result.stdout
    assert "compiled  by aot_eager" in result.stdout


@pytest.mark.gpu
def test_on_a_gpu_the_loop_is_replayed():
    result = example(*SMALL)
    assert "the same tokens from replays of a CUDA graph: passed" in result.stdout, result.stderr


def test_a_bad_argument_exits_with_2():
    result = example("--layers", 0)
    assert result.returncode == 2
    assert "argument --layers: must be at least 1; got 0" in result.stderr
